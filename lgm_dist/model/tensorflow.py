"""Loads the weights of the authors' TensorFlow graph by its variable names (kernels HWIO, generator columns in its order)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lgm_dist.model.backbones.conv4 import Conv4
from lgm_dist.model.generators.lgm import LGMGenerator
from lgm_dist.model.lgmnet import LGMNet

Variables = Mapping[str, npt.NDArray[np.floating]]
"""Name of a TensorFlow variable -> its value."""

_NORM_NAMES = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}


def load_tf_variables(model: LGMNet, variables: Variables) -> None:
    """Set all parameters and moving statistics of `model` (conv4 and lgm) from the authors' variables.

    Names are `extractor/conv_layers/g_conv{1..4}/…`, `TaskContext/TaskTransformer/t_conv{1..3}/…` and
    `Classifier/meta_conv{1,2}/MetaNetwork_meta_conv/meta_weights/{w1,b1}`; others, such as the optimizer's, are ignored.
    Raises ValueError for a variable that is missing or has another shape, and for other parts; the model is then unchanged.
    """
    values = [(target, _value(variables, name, target)) for name, target in tf_names(model)]
    with torch.no_grad():
        for target, value in values:
            target.copy_(value)


def tf_names(model: LGMNet) -> Iterator[tuple[str, Tensor]]:
    """The authors' name of each parameter and moving statistic of `model`, with the tensor."""
    backbone, generator = model.backbone, model.generator
    if not isinstance(backbone, Conv4) or not isinstance(generator, LGMGenerator):
        raise ValueError(
            f"the authors' variables fit model.backbone conv4 and model.generator lgm, not {model.config.backbone} and "
            f"{model.config.generator}; build the network with ModelConfig()"
        )
    for i, (conv, norm) in enumerate(zip(backbone.convs, backbone.norms, strict=True), 1):
        scope = f"extractor/conv_layers/g_conv{i}/"
        yield from _conv_names(scope, conv)
        yield from _norm_names(scope, norm)
    for i, conv in enumerate(generator.encoder.convs, 1):
        scope = f"TaskContext/TaskTransformer/t_conv{i}/"
        yield from _conv_names(scope, conv)
        if i <= len(generator.encoder.norms):
            yield from _norm_names(scope, generator.encoder.norms[i - 1])
    for i, layer in enumerate(generator.layers, 1):
        for name, parameter in layer.named_parameters():
            yield f"Classifier/meta_conv{i}/MetaNetwork_meta_conv/meta_weights/{name}", parameter


def _conv_names(scope: str, conv: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield scope + "conv2d/kernel", conv.get_parameter("weight")
    yield scope + "conv2d/bias", conv.get_parameter("bias")


def _norm_names(scope: str, norm: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for theirs, ours in _NORM_NAMES.items():
        yield scope + "BatchNorm/" + theirs, getattr(norm, ours)


def _value(variables: Variables, name: str, target: Tensor) -> Tensor:
    if name not in variables:
        raise ValueError(f"variable {name} is missing; pass all variables of the authors' checkpoint")
    value = torch.from_numpy(np.array(variables[name]))
    if name.endswith("kernel"):
        value = value.permute(3, 2, 0, 1)  # (O, I, 3, 3)
    elif name.endswith(("w1", "b1")):
        value = _generator_columns(value)
    if value.shape != target.shape:
        raise ValueError(f"variable {name} has shape {variables[name].shape}, which does not fit {tuple(target.shape)}")
    return value


def _generator_columns(value: Tensor) -> Tensor:
    """(…, 9FF + F) with columns (O, I, W, H), as the authors' graph transposes generated kernels, -> (O, I, H, W)."""
    # 9FF + F = value.shape[-1], so F = (sqrt(1 + 36 * value.shape[-1]) - 1) / 18
    filters = round(((1 + 36 * value.shape[-1]) ** 0.5 - 1) / 18)
    kernel, bias = value[..., :-filters], value[..., -filters:]
    kernel = kernel.unflatten(-1, (-1, 3, 3)).transpose(-1, -2).flatten(-3)  # (…, 9FF)
    return torch.cat([kernel, bias], dim=-1)  # (…, 9FF + F)
