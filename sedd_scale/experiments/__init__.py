"""Comparisons: objectives, graphs and schedules trained alike, evaluated alike, in one report."""
