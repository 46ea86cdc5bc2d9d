"""Backbones: images to feature maps, one file each."""
