"""Training under Ray Train: everything that imports Ray Train."""
