"""Answer instructions with an adapter: python generate.py --instruction "..." (--help lists all options)."""

import sys

from lora_alpaca.cli.verbs import main

if __name__ == "__main__":
    main(["generate", *sys.argv[1:]])
