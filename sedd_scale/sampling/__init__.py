"""Drawing text from a trained model: samplers, infilling and batch generation."""

SAMPLERS = ("analytic", "euler")
