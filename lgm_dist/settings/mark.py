"""`setting`: a field of a group of settings and its marks; the types that several groups share."""

from __future__ import annotations

from dataclasses import field
from typing import Any, Literal, get_args

Protocol = Literal["standard", "paper"]
Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

TARGET = "all trials share the target episodes"
TARGET_SHAPE = f"give --target-ways and --target-shot; {TARGET}"
MACHINE = "the sweep shares the machine out among trials"
LENGTH = "all trials see equally many images; see --epochs"
SWEEP = "it belongs to the sweep"
"""Reasons why a sweep cannot search over a setting."""


def setting(
    default: Any,
    *,
    flag: str = "",
    most: int = 0,
    basic: bool = False,
    resumable: bool = False,
    costly: bool = False,
    perturbed: bool = False,
    compared: bool = False,
    not_searched: str = "",
) -> Any:
    """A field of a group, with its default and what the rest of the package has to know about it.

    Args:
        flag: Name on the command line, if it differs from the field's name.
        most: Largest value that is accepted; a larger one is a typing error that would exhaust the memory.
        basic: `--help` lists it among the options to look at first.
        resumable: A run may be resumed with another value.
        costly: Larger values make a training step slower and larger; sweeps plan their memory for the largest.
        perturbed: May differ between a checkpoint and the network that takes it over in population-based training.
        compared: An evaluation may give it another value for any checkpoint (`lgm-dist evaluate --compare`).
        not_searched: Why a sweep cannot search over it; empty if it can.
    """
    marks = {"flag": flag, "most": most, "basic": basic, "resumable": resumable, "costly": costly}
    return field(
        default=default, metadata=marks | {"perturbed": perturbed, "compared": compared, "not_searched": not_searched}
    )
