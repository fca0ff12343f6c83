"""Megatron-core modules of the SEDD transformer, as a list of layers a pipeline can cut."""
