"""Models that do not share a start: known architectures, their symmetries, and the reordering that matches another model."""
