"""Comparisons: objectives, graphs and schedules trained alike, evaluated alike, in one report."""

# Of coverage and robustness: forward processes, noise schedules and what is planted in sequences.
GRAPHS = ("absorb", "uniform", "uniform-mean")
SCHEDULES = ("loglinear", "geometric", "cosine", "linear")
DAMAGE = ("noise", "missing")
