"""Models: class names in, logits out; their inputs, image features and the one evaluator."""
