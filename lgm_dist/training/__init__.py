"""Training: the loop of one worker, its steps, its evaluations. Knows torch, not Ray."""
