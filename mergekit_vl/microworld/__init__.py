"""The microworld: concepts, renderer, captions, shifts and tasks of the built-in test world."""
