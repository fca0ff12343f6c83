"""DeepSpeed's engines behind one interface."""

import os

import torch

from sedd_scale.version import require_tested

require_tested("deepspeed")

# DeepSpeed looks for its accelerator when it is imported, and complains where there is none.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
