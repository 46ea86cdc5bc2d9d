"""Heads: maps of support and query images to log-probabilities, one file each; `vectors` is what they share."""
