"""What images tell about weights: Fisher information, Gram matrices, running statistics; distances between weights."""
