"""`pukd make-demo-data`, for `ray job submit`."""

import sys

from pukd_ray.commands import main

if __name__ == "__main__":
    sys.exit(main(["make-demo-data", *sys.argv[1:]]))
