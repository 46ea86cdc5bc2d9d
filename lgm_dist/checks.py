"""Checks of single settings. Each raises ValueError with the setting, its value and the fix. Standard library only."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from typing import Any

LARGEST = 3e38
"""Largest float32, rounded down."""


def positive(group: Any, *names: str) -> None:
    """Each field is a whole number of at least 1."""
    _whole(group, names, 1)


def not_negative(group: Any, *names: str) -> None:
    """Each field is a whole number of at least 0."""
    _whole(group, names, 0)


def _whole(group: Any, names: Iterable[str], least: int) -> None:
    fields = {f.name: f for f in dataclasses.fields(group)}
    for name in names:
        value, most = getattr(group, name), fields[name].metadata["most"]
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{_called(group, name)} ({value}) must be a whole number of at least {least}")
        if most and value > most:
            raise ValueError(f"{_called(group, name)} ({value}) must be at most {most:,}")


def between(group: Any, name: str, low: float, high: float) -> None:
    """The field lies in [low, high]."""
    value = getattr(group, name)
    if not low <= value <= high:
        raise ValueError(f"{_called(group, name)} ({value}) must lie between {low:g} and {high:g}")


def choice(group: Any, name: str, choices: tuple[Any, ...]) -> None:
    """The field is one of `choices`."""
    value = getattr(group, name)
    if value not in choices:
        raise ValueError(f"{_called(group, name)} ({value!r}) must be one of {', '.join(map(str, choices))}")


def paths(group: Any) -> None:
    """Every text of the group can name a file or folder: no control characters, and it can be encoded."""
    for field in dataclasses.fields(group):
        value = getattr(group, field.name)
        if not isinstance(value, str):
            continue
        try:
            good = all(byte >= 32 and byte != 127 for byte in value.encode())
        except UnicodeEncodeError:
            good = False
        if not good:
            name = field.metadata["flag"] or field.name
            raise ValueError(f"{name} ({value!r}) must be text without control characters; it names a file or folder")


def typed(name: str, value: Any, default: Any) -> Any:
    """`value` as the type of `default`: a list becomes a tuple, and a whole number may stand for a float."""
    expected = type(default)
    if expected is tuple and isinstance(value, list) and all(isinstance(item, _items(default)) for item in value):
        return tuple(value)
    if type(value) is not expected and not (expected is float and type(value) is int):
        raise ValueError(f"{name} ({value!r}) must be of type {expected.__name__}")
    return value


def _called(group: Any, name: str) -> str:
    """The setting as messages call it: with the group's prefix if its flags have one that messages need."""
    return f"{getattr(group, 'prefix', '')}{name}"


def _items(default: tuple[Any, ...]) -> tuple[type, ...]:
    """Types that the items of a tuple may have."""
    return (int, float) if default and isinstance(default[0], float) else (str,)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint at the most similar known name, else the list of all of them."""
    known = list(known)
    close = difflib.get_close_matches(name, known, 1)
    return f"did you mean {close[0]}?" if close else f"the known ones are {', '.join(known)}"
