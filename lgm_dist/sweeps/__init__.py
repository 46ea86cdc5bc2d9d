"""Sweeps and grids: everything that imports Ray Tune."""
