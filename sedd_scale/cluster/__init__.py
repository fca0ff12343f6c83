"""Runs on a Slurm cluster: task environment, node health, job scripts, restarts and status."""
