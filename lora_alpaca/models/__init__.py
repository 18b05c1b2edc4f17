"""A base model and its adapter on a device.

`device` says where and how to compute, `base` finds and loads a model, `tokenizer` its tokenizer, whose special tokens
`special_tokens` checks; `meta` builds a model without weights. `weights` reads safetensors, `fingerprint` hashes them,
`quantization` holds them in fewer bits, `memory` says how much is free. `lora` puts an adapter on a live model.
"""
