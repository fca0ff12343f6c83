"""`sedd-scale prepare_data` in a checkout: python tools/prepare_data.py, or under torchrun."""

import sys

from sedd_scale.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["prepare_data", *sys.argv[1:]]))
