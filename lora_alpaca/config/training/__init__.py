"""The options of training, one module for each group of them."""

from lora_alpaca.config.training.config import RECORDED_FACTS, FinetuneConfig

__all__ = ["RECORDED_FACTS", "FinetuneConfig"]
