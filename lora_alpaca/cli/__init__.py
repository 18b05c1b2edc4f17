"""The command line: `verbs` has the commands, `flags` reads their words, `help` prints what there is.

`streams` keeps standard input and outputs usable, of whatever kind they are.
"""

from lora_alpaca.cli.verbs import main

__all__ = ["main"]
