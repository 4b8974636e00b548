"""Merging checkpoint files: the plan, its memory and time, the merge itself, and the record of its inputs."""
