"""Merging checkpoints on disk: the plan, its memory, the merge itself, what it records."""
