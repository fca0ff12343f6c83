"""The mathematics of score-entropy diffusion: no processes, no files, no network."""
