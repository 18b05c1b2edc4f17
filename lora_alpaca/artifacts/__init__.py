"""The folders that a run leaves: what is in them, read and checked, and written whole.

`adapter_folder` is an adapter with all that belongs to it, `checkpoint` what a run resumes from, `run_record` the
identity of a run, `prompt_contract` the prompt down to the token. `source` finds base, adapter, tokenizer and template.
"""
