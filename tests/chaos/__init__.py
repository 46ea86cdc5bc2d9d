"""Faults that a training survives: `python tests/chaos kills` ends its processes at random; `--help` lists the other parts.

Each part trains a tiny network on the built-in glyphs, does the real thing to its processes, its storage or its cluster, and
compares the result bit for bit with an undisturbed run. Linux only: processes are found in /proc.
"""
