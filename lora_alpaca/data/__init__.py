"""Rows to conversations to examples, in stages.

`readers` read bytes to raw rows, `formats` makes conversations of them, `rows` has them all, checked and counted.
`tokenization` and `encoding` make token ids, `examples` holds them, `preparation` is the whole stage in one stream,
`cache` keeps what it made, `statistics` counts what became of the rows. `sampler` says which rows make a step,
`detokenization` makes text of token ids, `visualization` shows rows as training sees them.
"""

from lora_alpaca.data.readers.sources import demo_file
from lora_alpaca.data.rows import Rows, held_out

__all__ = ["Rows", "demo_file", "held_out"]
