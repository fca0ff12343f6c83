"""Comparisons of objectives, graphs and schedules under equal conditions, each in one report."""

# Of coverage and robustness: forward processes, noise schedules and what is planted in sequences.
GRAPHS = ("absorb", "uniform", "uniform-mean")
SCHEDULES = ("loglinear", "geometric", "cosine", "linear")
DAMAGE = ("noise", "missing")
