"""`sedd-scale eval_ppl` in a checkout: python tools/eval_ppl.py, or under torchrun."""

import sys

from sedd_scale.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["eval_ppl", *sys.argv[1:]]))
