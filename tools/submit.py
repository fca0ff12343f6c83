"""`sedd-scale submit` in a checkout: python tools/submit.py, or under torchrun."""

import sys

from sedd_scale.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["submit", *sys.argv[1:]]))
