"""`python -m pukd_ray COMMAND`, the same as `pukd COMMAND`."""

import sys

from pukd_ray.commands import main

if __name__ == "__main__":
    sys.exit(main())
