"""`python -m lora_alpaca` is the command `lora-alpaca`, wherever the script of that name is not on the path."""

from lora_alpaca.cli import main

if __name__ == "__main__":
    main()
