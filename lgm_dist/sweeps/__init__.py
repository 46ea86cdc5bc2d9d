"""Sweeps with Ray Tune, and the table of ways and shots."""
