"""The groups of settings of a configuration, each checked at construction. Standard library only."""

from lgm_dist.settings.data import DataConfig
from lgm_dist.settings.episodes import EpisodesConfig, EpisodeShape
from lgm_dist.settings.generator import GeneratorConfig
from lgm_dist.settings.mark import SPLITS, Protocol, Split
from lgm_dist.settings.model import ModelConfig
from lgm_dist.settings.optim import OptimConfig
from lgm_dist.settings.pretraining import PretrainingConfig
from lgm_dist.settings.run import RunConfig

__all__ = [
    "SPLITS",
    "DataConfig",
    "EpisodeShape",
    "EpisodesConfig",
    "GeneratorConfig",
    "ModelConfig",
    "OptimConfig",
    "PretrainingConfig",
    "Protocol",
    "RunConfig",
    "Split",
]
