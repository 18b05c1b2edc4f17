"""The formats: writers of merged tensors and of adapters, and the small files beside them."""
