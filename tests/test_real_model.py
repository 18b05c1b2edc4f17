"""A really pretrained model: its packs are taken in every precision, and have the gradient that fp64 finds.

Random models have flat probabilities; this one is sure of its pieces, of which it has 49,152.
"""

from contextlib import nullcontext
from functools import partial

import pytest
import real_model
import torch
from engines import CPU, fit, reference, settings

from lora_alpaca.config import FinetuneConfig
from lora_alpaca.data.encoding import Encoder
from lora_alpaca.engine.equivalence import difference, loss_and_gradient
from lora_alpaca.models import lora
from lora_alpaca.models.base import load_base, locate_base
from lora_alpaca.models.device import DeviceSpec
from lora_alpaca.models.tokenizer import load_tokenizer
from lora_alpaca.prompts import load_template

pytestmark = [
    pytest.mark.real,
    pytest.mark.slow,
    pytest.mark.skipif(not real_model.is_there(), reason=real_model.MISSING),
]


@pytest.fixture(scope="module")
def examples(rows):
    tokenizer, _ = load_tokenizer(locate_base(str(real_model.FOLDER)))
    encoder = Encoder.for_prompts(tokenizer, load_template("alpaca_short").bound(tokenizer))
    return sorted(encoder.encode(rows), key=lambda row: len(row.ids))[:6]


def adapted(bits, dtype):
    base = locate_base(str(real_model.FOLDER))
    torch.manual_seed(0)
    model, _ = load_base(base, DeviceSpec(CPU, dtype, bits))
    return lora.attach(model, FinetuneConfig(lora_dropout=0.0), base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_packs_are_taken(bits, dtype, examples):
    precision = nullcontext if dtype == torch.float32 else partial(torch.autocast, "cpu", dtype)
    with fit(adapted(bits, dtype), settings(dtype=dtype), examples, precision) as (engine, lines):
        assert engine.name == "packed", lines
        assert len(lines) == 1, lines


def test_the_gradient_is_that_of_fp64(examples):
    model = adapted(16, torch.float32)
    expected = reference(model, examples)
    with fit(model, settings(checked=True), examples) as (engine, _):
        found = loss_and_gradient(engine, examples)
    assert engine.name == "packed"
    assert difference(found, expected) < 1e-5
