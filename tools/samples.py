"""`sedd-scale samples` in a checkout: python tools/samples.py, or under torchrun."""

import sys

from sedd_scale.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["samples", *sys.argv[1:]]))
