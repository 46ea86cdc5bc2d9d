"""The benchmark behind scripts/bench.py. Contenders take turns in one run, so that whatever is compared saw one machine."""
