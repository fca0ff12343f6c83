"""Megatron-core modules of the SEDD transformer, as a list of layers a pipeline can cut."""

# Before Megatron-core is imported: its release is checked, its warnings are silenced.
import sedd_scale.parallel  # noqa: F401
