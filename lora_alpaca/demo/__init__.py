"""The embedded demo: a tiny language model, facts to ask it about, and the scripts that made both.

Nothing in the library depends on this package; see the README beside this file.
"""
