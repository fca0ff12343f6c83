"""Measurements of the parts of a training step, each beside a straightforward formulation of it.

One module a subcommand of sedd-scale benchmark. Each has `add_arguments(subparsers)`, which needs
nothing heavy, and `measure(arguments)`, whose dictionary `report.run_measured` prints.
"""
