"""Merging strategies: one file per method, named after it."""
