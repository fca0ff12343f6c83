"""Reverse-process samplers and infilling."""
