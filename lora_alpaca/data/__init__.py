"""From files or the hub to checked conversations: `files` reads, `formats` understands, `rows` has them all.

Below `files` are `json_rows`, JSON by the book, and `texts`, which decodes and keeps count of lines and bytes.
"""

from lora_alpaca.data.rows import Rows, demo_file, held_out, uncollected

__all__ = ["Rows", "demo_file", "held_out", "uncollected"]
