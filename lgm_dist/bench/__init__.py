"""The benchmark behind `lgm-dist bench`. Contenders are measured in turn in one run, so that all see the same machine."""
