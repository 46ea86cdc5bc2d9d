"""The mirror of a run on Weights & Biases."""
