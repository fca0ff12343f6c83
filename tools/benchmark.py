"""`sedd-scale benchmark` in a checkout: python tools/benchmark.py, or under torchrun."""

import sys

from sedd_scale.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["benchmark", *sys.argv[1:]]))
