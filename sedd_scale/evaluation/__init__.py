"""Bounds on the likelihood."""
