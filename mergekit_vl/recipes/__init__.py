"""Recipes: their YAML, overrides, references and schemas; the recipes themselves are in the folder recipes/ of the repository."""
