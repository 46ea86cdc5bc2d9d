"""Data: prepared shards, the bank of decoded images, and the stream of episodes. Imports with torch and numpy alone."""

from lgm_dist.data.bank import ImageBank, open_bank
from lgm_dist.data.episodes import EpisodeBatch, check_episodes, sample_episodes

__all__ = ["EpisodeBatch", "ImageBank", "check_episodes", "open_bank", "sample_episodes"]
