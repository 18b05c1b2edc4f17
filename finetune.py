"""Train a LoRA adapter: python finetune.py --base_model ... --data_path ... (--help lists all options)."""

import sys

from lora_alpaca.cli.verbs import main

if __name__ == "__main__":
    main(["finetune", *sys.argv[1:]])
