"""Checkpoint files: which tensors a file contains and at which bytes, how to read them, and how to write a folder of them."""
