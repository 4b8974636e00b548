"""The engine of closed forms: aligned tensors chunk by chunk, and the maths that methods share."""
