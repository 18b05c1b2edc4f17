"""Adapters merged into their base, one tensor after another, and written for other programs, with proof.

`exporting` is the story. `merge` makes the tensors, `writers` write them, `proof` holds what was written to base +
adapter, `verify` holds a server to it, and `imports` is the way in.
"""
