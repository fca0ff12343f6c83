"""Runs on a Slurm cluster: node health, job scripts, restarts and status."""
