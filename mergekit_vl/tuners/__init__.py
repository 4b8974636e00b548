"""Tuners: one file per method, and the two training loops that they share."""
