"""Evaluation protocols: what is tuned on and what is tested, one file per protocol."""
