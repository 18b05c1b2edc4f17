"""The way in: old adapters, pickled bases and Meta's checkpoints made what is read here."""
