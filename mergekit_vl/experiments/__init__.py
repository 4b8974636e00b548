"""From a recipe to rows of scores: build, tune, merge and evaluate, cell by cell."""
