"""Faults put into real runs, counted: every part is a function from a share of its cases to a report of what failed.

`make test-all` tries a small share of each, `make stress` more, `make stress-long` all of it.
"""
