"""Checkpoints on disk: which tensors a file holds, where their bytes lie, and how a folder of them is written."""
