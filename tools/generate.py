"""`sedd-scale generate` in a checkout: python tools/generate.py, or under torchrun."""

import sys

from sedd_scale.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))
