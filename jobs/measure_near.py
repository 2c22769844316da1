"""`pukd measure-near`, for `ray job submit`."""

import sys

from pukd_ray.commands import main

if __name__ == "__main__":
    sys.exit(main(["measure-near", *sys.argv[1:]]))
