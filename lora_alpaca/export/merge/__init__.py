"""What adapters change of a base, and the tensors that come of it."""
