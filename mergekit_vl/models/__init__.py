"""Models (class names in, logits out), the contract of adapters, image features, the evaluator, and the inputs of strategies."""
