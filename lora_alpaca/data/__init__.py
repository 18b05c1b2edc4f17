"""From files or the hub to checked conversations: `files` reads, `formats` understands, `rows` has them all."""

from lora_alpaca.data.rows import Rows, demo_file, held_out

__all__ = ["Rows", "demo_file", "held_out"]
