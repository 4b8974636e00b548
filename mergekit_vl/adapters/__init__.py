"""Adapters: what is tuned on a frozen backbone, one file per kind, with its network."""
