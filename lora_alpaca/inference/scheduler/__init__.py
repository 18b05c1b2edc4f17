"""Many answers at the same time: each step is one forward of the model, with one token of every answer.

`scheduler` is the token generator: a thread that owns the model. `lane` holds the answers of one adapter, `cache` their
keys and values, `prefixes` those of prompts that were there before, `attention` is what the model's layers call,
`choosing` takes the next tokens from logits, and `equivalence` asks whether all this is right for a model.
"""
