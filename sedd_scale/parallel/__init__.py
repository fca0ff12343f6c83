"""Who shares what with whom, and the vocabulary-parallel losses."""

from sedd_scale.version import require_tested

require_tested("megatron-core")
