"""Merge an adapter into its base: python export_hf_checkpoint.py --lora_weights ... (--help lists all options)."""

import sys

from lora_alpaca.cli.verbs import main

if __name__ == "__main__":
    main(["export", *sys.argv[1:]])
