"""Checkpoint formats of other programs."""
