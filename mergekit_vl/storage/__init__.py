"""Models as files: in a run folder, as folders of open_clip and timm, and tuned checkpoints read back."""
