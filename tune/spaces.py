"""The search spaces of tune/sweep.py, by name. Edit this file to change a space or to add one.

A space maps the name of a setting, as on the command line, to the values to draw from:

    Choice((5, 10))            one of these values
    Uniform(0.0, 0.3)          a number between the two
    LogUniform(1e-4, 1e-2)     a positive number between the two, uniform in its logarithm

`when` makes a setting conditional. For example, this space draws norm_groups only if norm is "group":

    SPACES["group_norm"] = {
        "lr": LogUniform(1e-4, 1e-2),
        "model.norm": Choice(("batch", "group")),
        "model.norm_groups": Choice((4, 8, 16), when={"model.norm": ("group",)}),
    }
"""

from lgm_dist.sweeps import spaces
from lgm_dist.sweeps.spaces import Choice, LogUniform, Space, Uniform

__all__ = ["SPACES", "Choice", "LogUniform", "Space", "Uniform"]

SPACES: dict[str, Space] = {**spaces.SPACES}
