"""`sedd-scale quickstart` in a checkout: python tools/quickstart.py, or under torchrun."""

import sys

from sedd_scale.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["quickstart", *sys.argv[1:]]))
