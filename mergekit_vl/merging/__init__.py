"""The engine of closed forms: it merges aligned tensors chunk by chunk, with the maths that methods share."""
