"""What `python -m sedd_scale doctor` looks at and tries, and what it says of it."""
