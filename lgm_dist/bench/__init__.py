"""The benchmark behind lgm-dist bench. Contenders take turns in one run, so that whatever is compared saw one machine."""
