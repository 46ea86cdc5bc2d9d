"""Generators: support features to weights, one file each."""
