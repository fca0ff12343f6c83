"""Files, locks and processes of this machine: what every room needs and none owns."""
