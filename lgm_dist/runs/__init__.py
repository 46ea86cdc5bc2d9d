"""A run's folder: what is checked before it, its configuration, checkpoints, metrics and result."""
