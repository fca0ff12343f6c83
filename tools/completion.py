"""`sedd-scale completion` in a checkout: python tools/completion.py, or under torchrun."""

import sys

from sedd_scale.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["completion", *sys.argv[1:]]))
