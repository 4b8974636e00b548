"""Backbones: frozen pretrained models, and the one way through every text tower."""
