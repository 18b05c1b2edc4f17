"""Examples to batches to losses, on the library's own model with our attention, pointwise and loss functions.

`fitting` puts them in and takes them out, `patches` are the places, `equivalence` checks that nothing changes.
`batches` are packed (`packing`, `attention`) or padded; `loss`, `pointwise` and `int8_linear` compute, `allocator`
keeps buffers.
"""

from lora_alpaca.engine.batches import Batch, Engine, Packed, Padded
from lora_alpaca.engine.fitting import Settings, fitted

__all__ = ["Batch", "Engine", "Packed", "Padded", "Settings", "fitted"]
