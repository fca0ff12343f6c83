"""Samples by the million: requests, batches, files, their quality, how they came about."""
