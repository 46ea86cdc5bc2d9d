"""Generators: support features to weights, one file each. Import a new file here."""

from lgm_dist.model.generators import lgm, none

__all__ = ["lgm", "none"]
