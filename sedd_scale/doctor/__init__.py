"""What `sedd-scale doctor` looks at and tries, and what it says of it."""
