"""One training step: the gradients of a batch and the optimizer. On one GPU a step is a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lgm_dist.training.arithmetic import arithmetic
from lgm_dist.training.tasks import Task

TakeStep = Callable[[Any, int], Tensor]
"""Takes step `step` of a stage on a batch of its task. Returns the figures of `gradients`, without waiting for a GPU."""


def make_step(
    task: Task, model: nn.Module, parallel: nn.Module, optimizer: torch.optim.Optimizer, step: int
) -> TakeStep:
    """The fastest way to take steps, from step `step` on: a CUDA graph if the task allows it, else eager.

    `parallel` is `model` in training mode, or `model` wrapped for data-parallel training.
    """
    if task.prepare_graphs():
        return GraphStep(task, model, optimizer, task.batch(step))
    return EagerStep(task, parallel, optimizer)


def gradients(task: Task, model: nn.Module, batch: Any, weight: float = 1.0) -> Tensor:
    """Add the gradients of a batch to those of the parameters.

    Returns (3,): the slice's mean loss and its accuracy, both times `weight`, and the L2 norm of the gradient. If the slices
    of the workers differ in size, a `weight` of slice * world_size / meta_batch makes the means over the workers those of the
    whole meta-batch.
    """
    with arithmetic(tf32=task.config.optim.precision == "tf32"):
        mean, accuracy = task.loss(model, batch)  # (), ()
        loss = weight * mean
        loss.backward()
    grad_norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])  # ()
    return torch.stack([loss.detach(), weight * accuracy, grad_norm])  # (3,)


def train_step(
    task: Task, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any, step: int, weight: float = 1.0
) -> Tensor:
    """One optimizer step, `step` of the stage, on this worker's slice of a batch. Returns the figures of `gradients`.

    `model` is in training mode, possibly wrapped for data-parallel training. Gradients that are not finite change no weight.
    """
    optimizer.zero_grad()
    figures = gradients(task, model, batch, weight)  # (3,)
    apply_gradients(task, optimizer, step, figures)
    return figures


def apply_gradients(task: Task, optimizer: torch.optim.Optimizer, step: int, figures: Tensor) -> None:
    """Let the optimizer take step `step` with gradients of these figures (3,). Gradients that are not finite change nothing."""
    task.set_rates(optimizer, step)
    # a fused optimizer then leaves weights and state alone, so that `diagnosis` sees the weights that gave the loss
    optimizer.found_inf = (~torch.isfinite(figures[2])).float()  # type: ignore[attr-defined]  # ()
    optimizer.step()


class EagerStep:
    """Takes steps one operation after the other, on any device and with any number of workers."""

    def __init__(self, task: Task, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._task, self._model, self._optimizer = task, model, optimizer
        self._weight = task.slice_of(0).weight

    def __call__(self, batch: Any, step: int) -> Tensor:
        return train_step(self._task, self._model, self._optimizer, batch, step, self._weight)


class GraphStep:
    """Takes steps as a CUDA graph of everything up to the gradients; the optimizer, whose rates change, stays outside.

    The task's batches lie in the same memory at every step, so the batch of the constructor stands for all of them.
    """

    def __init__(self, task: Task, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> None:
        self._task, self._optimizer = task, optimizer
        averages = {name: buffer.clone() for name, buffer in model.named_buffers()}
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # libraries choose their kernels and take their workspace before the capture
                optimizer.zero_grad()
                gradients(task, model, batch)
        torch.cuda.current_stream().wait_stream(stream)
        optimizer.zero_grad()  # so that the gradients lie in the memory of the graph
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._figures = gradients(task, model, batch)
        for name, buffer in model.named_buffers():
            buffer.copy_(averages[name])

    def __call__(self, batch: Any, step: int) -> Tensor:  # noqa: ARG002  (the graph reads it from its memory)
        self._graph.replay()  # overwrites the gradients
        figures = self._figures.clone()
        apply_gradients(self._task, self._optimizer, step, figures)
        return figures
