"""The laws of the reverse process, applied: samplers and infilling."""

SAMPLERS = ("analytic", "euler", "ancestral", "first-hitting", "confidence", "entropy", "margin")
LEFT_TO_RIGHT = "left-to-right"  # of autoregressive models, which have no other
TIME_GRIDS = ("uniform", "cosine", "schedule")
DRAW_DTYPES = ("float64", "float32")
