"""Programs that exports carry with them, whole in a file each; nothing here imports them."""
