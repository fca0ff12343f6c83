"""The training loop: batches, optimizer, guards, resume, signals."""
