"""Evaluate with several command lines of sedd-scale eval_ppl, one after the other, in one launch.

    torchrun --nproc-per-node N eval_worker.py COMMANDS.json REPORTS.json

COMMANDS.json lists argument lists; the first process writes their reports.
"""

import json
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
warnings.filterwarnings("ignore", module=r"megatron\\.")

from sedd_scale.commands.eval_ppl import build_parser, evaluate  # noqa: E402
from sedd_scale.parallel.layout import leave_layout, shutdown  # noqa: E402

reports = []
for words in json.loads(Path(sys.argv[1]).read_text()):
    reports.append(evaluate(build_parser().parse_args(words)))
    leave_layout()
if reports[0] is not None:
    Path(sys.argv[2]).write_text(json.dumps(reports))
shutdown()
