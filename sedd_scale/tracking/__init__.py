"""What a run reports: console, metrics, trackers, curves and pages."""
