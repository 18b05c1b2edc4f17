"""An adapter merged into its base, one tensor after another, and written for other programs.

`merge` makes the tensors, `receipt` proves that the merged model answers as base + adapter, `huggingface` writes a
transformers folder. `convert_adapter` rewrites an old adapter's pickle as safetensors.
"""
