"""Weights & Biases: a copy of each run, and a dashboard."""
