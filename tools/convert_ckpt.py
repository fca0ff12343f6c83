"""`sedd-scale convert_ckpt` in a checkout: python tools/convert_ckpt.py, or under torchrun."""

import sys

from sedd_scale.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["convert_ckpt", *sys.argv[1:]]))
