"""The paper's network as plain as it can be written: NCHW, one episode after the other; the reference for LGMNet.

Written from the description of the authors' graph, not from lgm_dist.model: batch normalisation over all images of all
episodes, then a loop in which every episode generates its own weights and compares its own images. Nothing here is fast.

Shape legend: B episodes, N ways, K shots, S = N * K support images (class-major), T query images, C channels, H x W
pixels, F filters, h x w feature map, Z noise of one generated layer, D features of the matching network.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

DECAY, EPSILON = 0.99, 1e-3  # of the moving averages; of batch normalisation


class EagerLGMNet:
    """The network of `ModelConfig()` (any filters, noise_size and channels) on the tensors of an LGMNet's state.

    `EagerLGMNet(model.state_dict(keep_vars=True))` shares the parameters and moving statistics of `model`: gradients
    arrive at its parameters, a training pass moves its statistics, and an optimizer of `model` trains this one too.
    """

    def __init__(self, state: Mapping[str, Tensor], training: bool = True) -> None:
        self.state = state
        self.training = training

    def __call__(self, support: Tensor, query: Tensor, ways: int, noise: Tensor | None = None) -> Tensor:
        """support (B, S, C, H, W), query (B, T, C, H, W), noise (B, 2, Z) or None -> log-probabilities (B, T, N)."""
        episodes, shots = support.shape[:2]
        images = torch.cat([support, query], dim=1)  # (B, S + T, C, H, W)
        features = self.extract(images.flatten(0, 1)).unflatten(0, images.shape[:2])  # (B, S + T, F, h, w)
        contexts = self.encode(features[:, :shots].flatten(0, 1)).unflatten(0, (episodes, shots))  # (B, S, 2Z)
        labels = torch.arange(ways).repeat_interleave(shots // ways).to(support.device)  # (S,)
        onehot = F.one_hot(labels, ways).to(support.dtype)  # (S, N)
        return torch.stack(
            [
                self.episode(features[b], contexts[b].mean(0), onehot, None if noise is None else noise[b])
                for b in range(episodes)
            ]
        )  # (B, T, N)

    def extract(self, x: Tensor) -> Tensor:
        """x (n, C, H, W) -> (n, F, h, w)."""
        for i in range(4):
            x = F.relu(self._norm(self._conv(x, f"backbone.convs.{i}"), f"backbone.norms.{i}"))  # (n, F, h, w)
            if i < 3:
                x = pool(x)  # (n, F, ceil(h / 2), ceil(w / 2))
        return x

    def encode(self, x: Tensor) -> Tensor:
        """x (n, F, h, w) -> (n, 2Z); here ReLU comes before the normalisation."""
        for i in range(2):
            x = self._norm(F.relu(self._conv(x, f"generator.encoder.convs.{i}")), f"generator.encoder.norms.{i}")
            x = pool(x)  # (n, F, ceil(h / 2), ceil(w / 2))
        return self._conv(x, "generator.encoder.convs.2").mean(dim=(2, 3))  # (n, 2Z)

    def episode(self, features: Tensor, context: Tensor, onehot: Tensor, noise: Tensor | None) -> Tensor:
        """features (S + T, F, h, w), context (2Z,), onehot (S, N), noise (2, Z) or None -> (T, N)."""
        mean, log_variance = context.tensor_split(2)  # (Z,)
        std = torch.exp(0.5 * log_variance)  # (Z,)
        z = [mean if noise is None else mean + std * noise[layer] for layer in range(2)]
        x = pool(F.relu(F.conv2d(features, *self.generated(z[0], 0), padding=1)))  # (S + T, F, h / 2, w / 2)
        x = F.conv2d(x, *self.generated(z[1], 1), padding=1).flatten(1)  # (S + T, D)
        shots = len(onehot)
        cosine = F.cosine_similarity(x[shots:, None], x[None, :shots], dim=2)  # (T, S)
        return (torch.softmax(cosine, dim=1) @ onehot).log()  # (T, N)

    def generated(self, z: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """z (Z,) -> kernel (F, F, 3, 3), out before in, every output filter of L2 norm 1, and bias (F,)."""
        flat = z @ self.state[f"generator.layers.{layer}.w1"] + self.state[f"generator.layers.{layer}.b1"]  # (9FF + F,)
        filters = len(self.state["backbone.convs.0.weight"])
        kernel = flat[: 9 * filters * filters].reshape(filters, filters, 3, 3)
        length = kernel.pow(2).sum(dim=(1, 2, 3), keepdim=True).sqrt()  # (F, 1, 1, 1)
        return kernel / length, flat[9 * filters * filters :]

    def _conv(self, x: Tensor, name: str) -> Tensor:
        return F.conv2d(x, self.state[f"{name}.weight"].contiguous(), self.state[f"{name}.bias"], padding=1)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        mean, var, weight, bias = (self.state[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, mean, var, weight, bias, self.training, 1 - DECAY, EPSILON)


def pool(x: Tensor) -> Tensor:
    """TensorFlow's SAME 2 x 2 maximum: a row and a column of -inf at the bottom and the right of odd sizes."""
    height, width = x.shape[-2:]
    return F.max_pool2d(F.pad(x, (0, width % 2, 0, height % 2), value=-torch.inf), 2)
