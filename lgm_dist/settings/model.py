"""The settings of the network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lgm_dist import checks
from lgm_dist.settings.mark import setting


@dataclass(frozen=True)
class ModelConfig:
    """The network. The defaults are the paper's model as its authors wrote it (2,661,376 parameters)."""

    backbone: str = setting("conv4")
    """Images to feature maps: the name of a registered backbone."""
    generator: str = setting("lgm", compared=True)
    """Support features to weights: the name of a registered generator; none switches it off."""
    head: str = setting("cosine", compared=True)
    """Maps to log-probabilities: the name of a registered head. cosine: the paper's matching head. class_means: cosine to the
    class means with a learned temperature. cnaps: distance to the class means by covariances of the episode. ridge: dense
    matching of maps. logistic: a regression fitted to each episode."""
    rotations: int = setting(1, compared=True)
    """4: the maps of an image are those of its four rotations by 90 degrees, one after the other, and the head gives each
    rotation the same weight. It suits a backbone that was pretrained with rotations. 1: the maps of the image alone."""
    blocks: int = setting(1, compared=True)
    """2: the maps of an image are those of the last two blocks of the backbone, which has to be conv4. 1: those of the last."""
    pool: int = setting(0, compared=True)
    """Squares a side to which the head averages the maps (0: as they are)."""
    power: float = setting(1.0, compared=True)
    """Power of each value of the maps in the head, with its sign kept."""
    centre: bool = setting(False, compared=True)
    """The head subtracts the mean over the images of the base classes."""
    shrinkage: float = setting(1.0, compared=True)
    """The head whitens with the covariance within the base classes, mixed with a multiple of the identity. This is the share
    of the identity (1: no whitening)."""
    base_share: float = setting(0.2, compared=True)
    """How far generator=base_directions moves class means of one image along the directions of the base classes, as a share of
    their length; K images are moved by a K-th of it."""
    episode_share: float = setting(0.3, compared=True)
    """Share of the mean of the episode's class weights that generator=base_directions subtracts from all vectors."""
    map_size: int = setting(0, most=64)
    """Height and width to which the backbone's maps are averaged before generator and head see them (0: as they are)."""
    kernels: Literal["auto", "reference"] = setting("auto", resumable=True, not_searched="it changes the speed alone")
    """auto: the fast version of an operation if the device has one. reference: plain operations only."""
    channels: int = setting(0, not_searched="it is the data's")
    """Channels of an image: 1 or 3 (0: as the data set has; 3 for a network that is built without one)."""
    filters: int = setting(64, most=4096)
    """Filters of each convolution of conv4 and lgm, learned or generated, and of the first block of resnet12; the other
    blocks have 2.5, 5 and 10 times as many."""
    pool_last: bool = setting(False)
    """Pool the last block of resnet12 too: maps of 2 x 2 for 32 x 32 images, not 4 x 4."""
    drop_block: float = setting(0.0)
    """Share of the activations that resnet12 drops in training: single ones in blocks 1 and 2, squares in blocks 3 and 4
    (0: none; 0.1 is usual)."""
    drop_size: int = setting(2, most=64)
    """Height and width of the squares of drop_block: 2 for 32 x 32 images, 5 for 84 x 84."""
    noise_size: int = setting(32, most=4096)
    """Z: length of the noise of one generated layer; the context is twice as long (mean, log-variance)."""
    norm: Literal["batch", "group", "instance", "layer"] = setting("batch")
    """Normalisation of the backbone and the context encoder."""
    norm_scope: Literal["global", "worker", "episode"] = setting("global")
    """Images over which batch statistics are taken in training: the global meta-batch (the paper's intertask normalisation),
    the worker's slice of it, or each episode. Evaluation always uses the moving averages."""
    norm_decay: float = setting(0.99, perturbed=True)
    """Decay of the moving averages: m <- decay * m + (1 - decay) * statistic."""
    norm_epsilon: float = setting(1e-3, perturbed=True)
    """Added to the variance before the square root."""
    norm_groups: int = setting(8)
    """Groups of norm=group."""
    weight_norm: bool = setting(True)
    """Scale each generated filter to L2 norm 1."""
    base_outputs: int = setting(0, not_searched="it is the data's")
    """Outputs of the linear classifier of the base classes that pretraining trains: classes times rotations (0: none; a run
    with a stage pretraining sets it)."""

    def __post_init__(self) -> None:
        checks.positive(self, "filters", "noise_size", "norm_groups", "drop_size")
        checks.not_negative(self, "channels", "base_outputs", "map_size")
        checks.choice(self, "rotations", (1, 4))
        checks.choice(self, "blocks", (1, 2))
        checks.choice(self, "pool", (0, 1, 2, 3, 4))
        checks.choice(self, "kernels", ("auto", "reference"))
        checks.choice(self, "norm", ("batch", "group", "instance", "layer"))
        checks.choice(self, "norm_scope", ("global", "worker", "episode"))
        checks.between(self, "norm_decay", 0.0, 1.0)
        if not 0 <= self.drop_block < 1:
            raise ValueError(f"drop_block ({self.drop_block}) must be in [0, 1); 0 turns it off")
        checks.between(self, "base_share", 0.0, 1.0)
        checks.between(self, "episode_share", 0.0, 1.0)
        if not 0 < self.norm_epsilon <= checks.LARGEST:
            raise ValueError(f"norm_epsilon ({self.norm_epsilon}) must be positive; the paper's is 1e-3")
        if not 0 < self.power <= 4:
            raise ValueError(f"power ({self.power}) must be above 0 and at most 4; 1 leaves the values as they are")
        if not 0 < self.shrinkage <= 1:
            raise ValueError(f"shrinkage ({self.shrinkage}) must be above 0 and at most 1, which is no whitening")
        if self.norm == "group" and self.filters % self.norm_groups:
            fix = max(groups for groups in range(1, self.norm_groups) if self.filters % groups == 0)
            raise ValueError(f"norm_groups ({self.norm_groups}) must divide filters ({self.filters}); use {fix}")
