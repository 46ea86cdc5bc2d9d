"""LGM-Net: a network that reads the support set of an episode and generates the weights of a matching network for it.

Li et al., "LGM-Net: Learning to Generate Matching Networks for Few-Shot Learning", ICML 2019 (arXiv 1905.06331), as the
authors' code has it (github.com/likesiwell/LGM-Net at 55c035f), vectorised over the episodes of a meta-batch.

Shape legend
    B episodes   N ways   K shots   S = N * K support images (class-major: i * K + j is shot j of class i)   T query images
    C, H, W channels, height, width of an image   F filters   h, w spatial size of a feature map   Z noise size
    D length of a feature vector
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lgm_dist.config import ModelConfig
from lgm_dist.model.kernels.episode_convolution import convolve
from lgm_dist.model.kernels.first_block import first_block
from lgm_dist.model.kernels.fused_block import available, norm_relu_pool
from lgm_dist.model.norm import AllReduce, Norm


class Extractor(nn.Module):
    """Four convolutions with normalisation and ReLU, the first three pooled: images -> feature maps."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        channels = (config.channels, config.filters, config.filters, config.filters)
        self.convs = nn.ModuleList(_conv3x3(c, config.filters) for c in channels)
        self.norms = nn.ModuleList(Norm(config) for _ in channels)
        self.fused = config.norm == "batch" and config.norm_scope != "episode"
        """Whether training may take a block's layers together, where that is faster; single layers then are not called."""

    def forward(self, x: Tensor, episodes: int) -> Tensor:
        """x (n, C, H, W), the images of `episodes` episodes -> (n, F, h, w); h = w = 4 for 32 x 32 images."""
        blocks = list(zip(self.convs, self.norms, strict=True))
        conv, norm = blocks[0]
        fused = self.fused and self.training
        if fused and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu") and not x.requires_grad:
            assert isinstance(conv, nn.Conv2d)
            assert isinstance(norm, Norm)
            x = first_block(x, conv, norm)  # (n, F, ceil(h / 2), ceil(w / 2))
            del blocks[0]
        for conv, norm in blocks:
            pooled = conv is not self.convs[-1]
            if fused and x.is_cuda and norm.all_reduce is None and available(x):
                x = norm_relu_pool(F.conv2d(x, conv.weight, padding=1), conv.bias, norm, pooled)
                continue
            x = F.relu_(norm(conv(x), episodes))  # (n, F, h, w)
            if pooled:
                x = _pool(x)  # (n, F, ceil(h / 2), ceil(w / 2))
        return x


class ContextEncoder(nn.Module):
    """The task context encoder's part that works on single images; their mean over the support set is the context."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        filters = (config.filters, config.filters, 2 * config.noise_size)
        self.convs = nn.ModuleList(_conv3x3(config.filters, f) for f in filters)
        self.norms = nn.ModuleList(Norm(config) for _ in filters[:2])

    def forward(self, x: Tensor, episodes: int) -> Tensor:
        """x (n, F, h, w), feature maps of the support images of `episodes` episodes -> (n, 2Z)."""
        for conv, norm in zip(self.convs, self.norms, strict=False):
            x = _pool(norm(F.relu_(conv(x)), episodes))  # (n, F, ceil(h / 2), ceil(w / 2)); ReLU before the norm
        context: Tensor = self.convs[2](x).mean(dim=(2, 3))  # (n, 2Z)
        return context


class WeightGenerator(nn.Module):
    """One linear layer from z to the kernel and bias of a generated 3 x 3 convolution."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.filters = config.filters
        self.weight_norm = config.weight_norm
        size = (9 * config.filters + 1) * config.filters
        self.w1 = nn.Parameter(torch.empty(config.noise_size, size))
        self.b1 = nn.Parameter(torch.zeros(size))
        nn.init.xavier_uniform_(self.w1)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """z (B, Z) -> kernels (B, F, F, 3, 3), out before in, each filter of L2 norm 1; biases (B, F), not normalised."""
        flat = torch.addmm(self.b1, z, self.w1)  # (B, 9FF + F)
        kernel = flat[:, : -self.filters].unflatten(1, (self.filters, -1))  # (B, F, 9F)
        if self.weight_norm:
            kernel = kernel * kernel.square().sum(-1, keepdim=True).clamp_min(1e-12).rsqrt()
        return kernel.unflatten(2, (self.filters, 3, 3)), flat[:, -self.filters :]


class LGMNet(nn.Module):
    """Call as `model(support, query, ways, noise=None)`; see `forward`."""

    def __init__(self, config: ModelConfig | None = None) -> None:
        super().__init__()
        config = config or ModelConfig()
        self.config = replace(config, channels=config.channels or 3)
        self.extractor = Extractor(self.config)
        self.context_encoder = ContextEncoder(self.config)
        self.generators = nn.ModuleList(WeightGenerator(self.config) for _ in range(2))

    def forward(self, support: Tensor, query: Tensor, ways: int, noise: Tensor | None = None) -> Tensor:
        """Log-probabilities of the classes for each query image.

        support (B, S, C, H, W) float, class-major; query (B, T, C, H, W); noise (B, 2, Z), standard normal, for the two
        generated layers, or None for the mean of the generated weights. Returns (B, T, N).

        In training the queries take part in the extractor's batch statistics, as they do in the authors' code; neither the
        context nor the generated weights see them. Raises ValueError for shapes that do not fit.
        """
        self._check(support, query, ways, noise)
        episodes, shots = support.shape[:2]
        images = torch.cat([support, query], dim=1).flatten(0, 1)  # (B * (S + T), C, H, W)
        features = self.extractor(images.contiguous(memory_format=torch.channels_last), episodes)
        features = features.unflatten(0, (episodes, -1))  # (B, S + T, F, h, w)
        context = self.context_encoder(features[:, :shots].flatten(0, 1), episodes)  # (B * S, 2Z)
        context = context.unflatten(0, (episodes, -1)).mean(dim=1)  # (B, 2Z)
        return self.classify(features, context, shots, ways, noise)

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images (n, C, H, W) -> feature maps (n, F, h, w) and contexts of the single images (n, 2Z).

        For evaluation, where images do not influence each other: each is embedded once, however many episodes use it.
        """
        assert not self.training, "in training the statistics tie the images of a meta-batch together"
        features = self.extractor(images.contiguous(memory_format=torch.channels_last), 1)  # (n, F, h, w)
        return features, self.context_encoder(features, 1)

    def classify(
        self, features: Tensor, context: Tensor, support: int, ways: int, noise: Tensor | None = None
    ) -> Tensor:
        """The part after embedding: feature maps (B, S + T, F, h, w) of which the first `support` per episode are the
        support set, context (B, 2Z), noise (B, 2, Z) or None -> log-probabilities (B, T, N)."""
        weights = self.generate(context, noise)
        vectors = matching_features(features, weights)  # (B, S + T, D)
        return match(vectors[:, :support], vectors[:, support:], ways)

    def generate(self, context: Tensor, noise: Tensor | None = None) -> list[tuple[Tensor, Tensor]]:
        """context (B, 2Z), noise (B, 2, Z) or None -> (kernels (B, F, F, 3, 3), biases (B, F)) of the two layers."""
        mean, log_variance = context.chunk(2, dim=1)  # (B, Z)
        draws = [mean, mean] if noise is None else [mean + (log_variance / 2).exp() * noise[:, i] for i in range(2)]
        return [generator(z) for generator, z in zip(self.generators, draws, strict=True)]

    def reduce_over(self, all_reduce: AllReduce | None) -> None:
        """Makes the normalisation's statistics those of all workers: `all_reduce` sums a tensor over them in place."""
        for module in self.modules():
            if isinstance(module, Norm):
                module.all_reduce = all_reduce

    def _check(self, support: Tensor, query: Tensor, ways: int, noise: Tensor | None) -> None:
        if support.ndim != 5 or query.ndim != 5 or support.shape[2:] != query.shape[2:] or len(support) != len(query):
            raise ValueError(
                f"support {tuple(support.shape)} and query {tuple(query.shape)} must be (B, S, C, H, W) and (B, T, C, H, W)"
            )
        if support.shape[2] != self.config.channels:
            raise ValueError(f"images have {support.shape[2]} channels, the model's channels is {self.config.channels}")
        if ways < 1 or support.shape[1] % ways:
            raise ValueError(f"ways ({ways}) must divide the {support.shape[1]} support images of an episode")
        if noise is not None and noise.shape != (len(support), 2, self.config.noise_size):
            raise ValueError(f"noise {tuple(noise.shape)} must be {(len(support), 2, self.config.noise_size)}")


def matching_features(features: Tensor, weights: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The generated matching network: feature maps (B, n, F, h, w) -> feature vectors (B, n, D), D = F * h/2 * w/2.

    Each episode's generated weights act on its own images: a convolution with one group an episode, which a GPU does as one
    matrix product an episode.
    """
    episodes, images = features.shape[:2]
    (kernel1, bias1), (kernel2, bias2) = weights
    if features.is_cuda:
        x = convolve(features, kernel1, bias1).flatten(0, 1)  # (B * n, F, h, w)
        x = _pool(F.relu(x)).unflatten(0, (episodes, images))  # (B, n, F, ceil(h / 2), ceil(w / 2))
        return convolve(x, kernel2, bias2).flatten(2)  # (B, n, D)
    x = features.permute(1, 3, 4, 0, 2).flatten(3).permute(0, 3, 1, 2)  # (n, B * F, h, w), channels last in memory
    x = F.conv2d(x, kernel1.flatten(0, 1), bias1.flatten(), padding=1, groups=episodes)  # (n, B * F, h, w)
    x = _pool(F.relu_(x))  # (n, B * F, ceil(h / 2), ceil(w / 2))
    x = F.conv2d(x, kernel2.flatten(0, 1), bias2.flatten(), padding=1, groups=episodes)
    return x.reshape(images, episodes, -1).transpose(0, 1)  # (B, n, D)


def match(support: Tensor, query: Tensor, ways: int) -> Tensor:
    """Matching head: support (B, S, D), class-major, query (B, T, D) -> log-probabilities (B, T, N).

    Softmax of the cosine similarities over all support images, without a temperature; a class's probability is the sum over
    its images.
    """
    with torch.autocast(query.device.type, enabled=False):  # similarities differ by less than bfloat16 or tf32 can tell
        query, support = (_unit(x.float() if x.dtype == torch.bfloat16 else x) for x in (query, support))
        if query.is_cuda:
            similarities = (query.double() @ support.double().transpose(1, 2)).to(query.dtype)  # (B, T, S)
        else:
            similarities = query @ support.transpose(1, 2)  # (B, T, S)
        by_class: Tensor = similarities.log_softmax(-1).unflatten(2, (ways, -1))  # (B, T, N, K)
        return by_class.logsumexp(-1)  # (B, T, N)


def _unit(x: Tensor) -> Tensor:
    return x * x.square().sum(-1, keepdim=True).clamp_min(1e-12).rsqrt()


def _pool(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 2, ceil_mode=True)


def _conv3x3(inputs: int, outputs: int) -> nn.Conv2d:
    conv = nn.Conv2d(inputs, outputs, 3, padding=1)
    nn.init.xavier_uniform_(conv.weight)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv.to(memory_format=torch.channels_last)
