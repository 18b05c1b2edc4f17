"""Examples to batches to losses, on the library's own model with our attention, pointwise and loss functions.

`fitting` makes a model ready to train: `patches` replaces its layers, `equivalence` compares packs with single rows,
which `reference` computes, in the memory that a step takes (`recomputation`). `engines` compute the losses of
`batches`, packed (`packing`, `attention`, on CUDA `block_attention`) or padded; `transfer` brings them to a card.
`loss`, `pointwise` and `int8_linear` are our layers, `allocator` keeps buffers. They reach a model through
`model_access`, since its weights may be spread over ranks.
"""

from lora_alpaca.engine.batches import Batch
from lora_alpaca.engine.engines import Engine, Packed, Padded
from lora_alpaca.engine.fitting import EngineChoices, fitted
from lora_alpaca.engine.model_access import ModelAccess, WholeModel

__all__ = ["Batch", "Engine", "EngineChoices", "ModelAccess", "Packed", "Padded", "WholeModel", "fitted"]
