"""`pukd estimate`, for `ray job submit`."""

import sys

from pukd_ray.commands import main

if __name__ == "__main__":
    sys.exit(main(["estimate", *sys.argv[1:]]))
