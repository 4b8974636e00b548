"""The comparison of all strategies on a grid of datasets, seeds and shots."""
