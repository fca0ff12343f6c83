"""`sedd-scale experiment` in a checkout: python tools/experiment.py, or under torchrun."""

import sys

from sedd_scale.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["experiment", *sys.argv[1:]]))
