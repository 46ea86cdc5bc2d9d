"""Where a loss or gradient that is not finite comes from. One more forward pass, after it has happened, finds out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lgm_dist.model import LGMNet, build_model
from lgm_dist.training.arithmetic import arithmetic
from lgm_dist.training.tasks import Stage, Task


def explain(stage: Stage, model: LGMNet, batch: Any, step: int) -> str:
    """Name the step, its first layer whose output is not finite, and the items of the batch for which it is not.

    `model` has the weights and gradients of step `step` of the stage (from 0), which the optimizer has not applied; `batch`
    is this worker's slice. All workers call this together and get the same.
    """
    task = stage.task
    worker, of_step = task.worker, task.slice_of(step)
    layers = _outputs(task, model, batch, of_step.size)
    order = next((i for i, (_, bad) in enumerate(layers) if bad.any()), len(layers))
    first = int(min(worker.gather(order)))
    start, meta_batch = step * task.meta_batch, torch.zeros(task.meta_batch, device=worker.device)
    if first < len(layers):
        begin = of_step.first - start
        meta_batch[begin : begin + of_step.size] = layers[first][1].float()
        where = f"output of {layers[first][0]}"
    else:
        where = f"gradient of {_deepest_gradient(model)}"
        meta_batch += 1
    items = [start + i for i in worker.sum(meta_batch).nonzero().flatten().tolist()]
    return f"at step {stage.first + step + 1} the {where} is not finite for train {_in_words(items, task.unit)}"


@torch.no_grad()
def _outputs(task: Task, model: LGMNet, batch: Any, count: int) -> list[tuple[str, Tensor]]:
    """Names of the layers in the order of the forward pass, each with a mask (count,) of its items that are not finite."""
    outputs: list[tuple[str, Tensor]] = []
    plain = build_model(replace(model.config, kernels="reference")).to(task.worker.device)  # kernels hide single layers
    plain.load_state_dict(model.state_dict())
    plain.reduce_over(task.worker.all_reduce)
    names = {module: name or "the network" for name, module in plain.named_modules()}

    def look(layer: nn.Module, _: Any, output: Tensor | tuple[Tensor, ...]) -> None:
        tensors = output if isinstance(output, tuple) else (output,)
        # the first dimension is a multiple of the items: the items, or their images
        bad = [~torch.isfinite(x).reshape(count, -1).all(1) for x in tensors]
        outputs.append((names[layer], torch.stack(bad).any(0)))

    for layer in names:
        layer.register_forward_hook(look)
    with arithmetic(tf32=task.config.optim.precision == "tf32"):
        task.loss(task.module(plain.train()), batch)
    return outputs


def _deepest_gradient(model: LGMNet) -> str:
    """The parameter nearest the loss whose gradient is not finite: it spreads from there towards the images."""
    names = [n for n, p in model.named_parameters() if p.grad is not None and not torch.isfinite(p.grad).all()]
    return names[-1] if names else "all layers together"  # then their norm overflows


def _in_words(items: list[int], unit: str) -> str:
    if items == list(range(items[0], items[-1] + 1)) and len(items) > 1:
        return f"{unit} {items[0]} to {items[-1]}"
    return f"{unit if len(items) > 1 else unit.removesuffix('s')} {', '.join(map(str, items))}"
