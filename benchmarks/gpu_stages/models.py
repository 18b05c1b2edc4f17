"""What the stages train: a random Llama with an adapter, made on the device, rows, and what takes a step with them."""

import contextlib
from typing import Any

import numpy as np
import rivals
import torch
import transformers
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit

from gpu_stages.stage import Stage
from lora_alpaca.config import FinetuneConfig
from lora_alpaca.data.examples import Example
from lora_alpaca.distributed.strategy import Replicated
from lora_alpaca.distributed.world import World
from lora_alpaca.models import lora
from lora_alpaca.models.base import Base
from lora_alpaca.models.lora import LoraAdapter
from lora_alpaca.training.step import Stepper


def options(stage: Stage, **changes: Any) -> Any:
    """Return the options of a run of the stage."""
    return FinetuneConfig(device=stage.device, lora_dropout=0.0, batch_size=16, micro_batch_size=4, **changes)


def world(stage: Stage, **changes: Any) -> Any:
    """Return the world of one run."""
    return World(options(stage, **changes))


def stepper_of(stage: Stage, here: Any, engine: Any) -> Any:
    """Return what takes a step with an engine."""
    return Stepper(engine, LoraAdapter(engine.model), Replicated(here), here, options(stage), print)


def autocast(stage: Stage, dtype: Any) -> Any:
    """Return the context of a forward pass in a dtype."""
    if dtype == torch.float32:
        return contextlib.nullcontext
    return lambda: torch.autocast(stage.device, dtype)


def examples(shape: tuple[int, ...]) -> list[Any]:
    """Return rows of random tokens that share a beginning, half of each learned."""
    draw, (*_, vocabulary, count, length) = np.random.default_rng(0), shape
    preamble = draw.integers(3, vocabulary, length // 8).tolist()
    rows = [preamble + draw.integers(3, vocabulary, length - len(preamble)).tolist() for _ in range(count)]
    return [Example(row, [(length // 2, length)]) for row in rows]


def random_base(shape: tuple[int, ...]) -> Any:
    """Return a base of a shape that is on no disk."""
    width, layers, heads, vocabulary, *_ = shape
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=int(width * 2.6875), num_hidden_layers=layers,
        num_attention_heads=heads, max_position_embeddings=2048,
    )  # fmt: skip
    return Base("a random Llama", "", None, False, config)


def made(stage: Stage, shape: tuple[int, ...], bits: int, dtype: Any, rival: str = "") -> Any:
    """Return a random Llama with an adapter, made layer by layer on the device, its base in 8, 4 or 16 bits."""
    base, where = random_base(shape), torch.device(stage.device)
    torch.manual_seed(0)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(base.config, dtype=dtype)
    for name, part in list(model.named_modules()):
        if isinstance(part, torch.nn.Linear) and name != "lm_head" and bits != 16:
            above, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(above), attribute, _quantised(part, bits, dtype, where))
    for parameter_name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            above, _, attribute = parameter_name.rpartition(".")
            fill = torch.ones if parameter.dim() == 1 else lambda *size, **kind: torch.randn(*size, **kind) * 0.02
            setattr(
                model.get_submodule(above),
                attribute,
                torch.nn.Parameter(fill(*parameter.shape, dtype=dtype, device=where)),
            )
    with where:
        model.model.rotary_emb = type(model.model.rotary_emb)(base.config)
    model.requires_grad_(False)
    model.config.use_cache = False
    model.is_loaded_in_8bit, model.is_loaded_in_4bit = bits == 8, bits == 4  # as PEFT and trainers ask
    model = lora.attach(rivals.prepared(model, rival), options(stage), base)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def _quantised(part: Any, bits: int, dtype: Any, where: Any) -> Any:
    """Return a random layer of bitsandbytes of the size of another."""
    weight = torch.randn(part.out_features, part.in_features, dtype=dtype, device=where) * 0.02
    sizes = (part.in_features, part.out_features)
    if bits == 8:
        layer = Linear8bitLt(*sizes, bias=False, has_fp16_weights=False, device="meta")
        layer.weight = Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False).to(where)
    else:
        layer = Linear4bit(*sizes, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta")
        layer.weight = Params4bit(
            weight.cpu(), requires_grad=False, compress_statistics=True, quant_type="nf4", module=layer
        ).to(where)
        layer.support_avx512bf16_for_cpu = False  # which corrupts what is dequantised later
    return layer
