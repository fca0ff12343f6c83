"""Drawing text from a trained model: samplers, infilling and batch generation."""

SAMPLERS = ("analytic", "euler", "ancestral", "first-hitting", "confidence", "entropy", "margin")
TIME_GRIDS = ("uniform", "cosine", "schedule")
DRAW_DTYPES = ("float64", "float32")
