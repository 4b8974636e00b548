"""Statistics of weights that need images: Fisher information, Gram matrices, BatchNorm statistics; and distances between weights."""
