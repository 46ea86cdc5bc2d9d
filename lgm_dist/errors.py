"""Errors that end a command with one sentence. Standard library only.

A mistake that a user can correct is a ValueError, or an OSError of the file that it is about.
"""

from __future__ import annotations


class RunFailed(Exception):
    """A run ended for a reason outside its configuration, such as workers that kept dying."""
