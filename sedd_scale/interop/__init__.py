"""Checkpoint formats, ours and those of other programs, in and out."""
