"""Backbones: images to feature maps, one file each. Import a new file here."""

from lgm_dist.model.backbones import conv4

__all__ = ["conv4"]
