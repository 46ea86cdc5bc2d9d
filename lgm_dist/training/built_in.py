"""Imports the modules that register the built-in tasks."""

from lgm_dist.training import episodes_task, generator_task, pretraining_task

__all__ = ["episodes_task", "generator_task", "pretraining_task"]
