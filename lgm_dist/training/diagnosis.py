"""Where a loss or gradient that is not finite comes from: found by one more forward pass once it has happened."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lgm_dist.config import Config
from lgm_dist.data import EpisodeBatch
from lgm_dist.model import LGMNet, build_model
from lgm_dist.training.engine import Worker, arithmetic, log_probabilities


def explain(model: LGMNet, batch: EpisodeBatch, config: Config, step: int, worker: Worker) -> str:
    """A clause that names the step, its first layer that is not finite, and the episodes for which it is not finite.

    `model` has the weights and gradients of step `step` (from 0), which `train_step` has not applied; `batch` is this worker's
    slice of its meta-batch. All workers call it together and get the same clause.
    """
    layers = _outputs(model, batch, config, worker)
    order = next((i for i, (_, bad) in enumerate(layers) if bad.any()), len(layers))
    first = int(min(worker.gather(order)))
    start, meta_batch = step * config.meta_batch, torch.zeros(config.meta_batch, device=worker.device)
    if first < len(layers):
        begin, count = worker.slice_of(0, config.meta_batch)
        meta_batch[begin : begin + count] = layers[first][1].float()
        where = f"output of {layers[first][0]}"
    else:
        where = f"gradient of {_deepest_gradient(model)}"
        meta_batch += 1
    episodes = [start + i for i in worker.sum(meta_batch).nonzero().flatten().tolist()]
    return f"at step {step + 1} the {where} is not finite for train {_in_words(episodes)}"


@torch.no_grad()
def _outputs(model: LGMNet, batch: EpisodeBatch, config: Config, worker: Worker) -> list[tuple[str, Tensor]]:
    """The layers' names in the order of the forward pass, each with which of the B episodes are not finite there (B,)."""
    found: list[tuple[str, Tensor]] = []
    plain = build_model(replace(model.config, kernels="reference")).to(
        worker.device
    )  # a kernel would hide single layers
    plain.load_state_dict(model.state_dict())
    plain.reduce_over(worker.all_reduce)
    names = {module: name or "the network" for name, module in plain.named_modules()}

    def look(layer: nn.Module, _: Any, output: Tensor | tuple[Tensor, ...]) -> None:
        tensors = output if isinstance(output, tuple) else (output,)
        # the first dimension counts the B episodes, or their images
        bad = [~torch.isfinite(x).reshape(len(batch.labels), -1).all(1) for x in tensors]
        found.append((names[layer], torch.stack(bad).any(0)))

    for layer in names:
        layer.register_forward_hook(look)
    with arithmetic(tf32=config.precision == "tf32"):
        log_probabilities(plain.train(), batch, config)
    return found


def _deepest_gradient(model: LGMNet) -> str:
    """The parameter nearest the loss whose gradient is not finite: it spreads from there towards the images."""
    names = [n for n, p in model.named_parameters() if p.grad is not None and not torch.isfinite(p.grad).all()]
    return names[-1] if names else "all layers together"  # their norm overflows


def _in_words(episodes: list[int]) -> str:
    if episodes == list(range(episodes[0], episodes[-1] + 1)) and len(episodes) > 1:
        return f"episodes {episodes[0]} to {episodes[-1]}"
    return f"episode{'s' * (len(episodes) > 1)} {', '.join(map(str, episodes))}"
