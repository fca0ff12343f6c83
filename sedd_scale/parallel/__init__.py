"""Who shares what with whom, and the vocabulary-parallel losses."""

import warnings

from sedd_scale.version import require_tested

require_tested("megatron-core")
# It warns of every optional package that is not installed, in every process.
warnings.filterwarnings("ignore", module=r"megatron\.")
