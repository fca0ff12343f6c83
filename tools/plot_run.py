"""`sedd-scale plot_run` in a checkout: python tools/plot_run.py, or under torchrun."""

import sys

from sedd_scale.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["plot_run", *sys.argv[1:]]))
