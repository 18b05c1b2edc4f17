"""The command line: `verbs` has the commands, `flags` reads their words, `help` prints what there is."""

from lora_alpaca.cli.verbs import main

__all__ = ["main"]
