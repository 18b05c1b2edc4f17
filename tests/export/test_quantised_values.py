"""The values of a base in 8 and 4 bits, without the base: those of the model that transformers loads, to the bit."""

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt

from lora_alpaca.export.merge.quantised_values import QuantisedValues
from lora_alpaca.models import quantization
from lora_alpaca.models.base import load_base, locate_base, weight_files
from lora_alpaca.models.device import DeviceSpec
from lora_alpaca.models.meta import meta_model
from lora_alpaca.models.shards import Shards
from lora_alpaca.models.tensor_names import TensorNames


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "GPT2"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_values_are_those_that_training_holds(tiny_model, family, bits, dtype):
    base = locate_base(str(tiny_model(family)))
    spec = DeviceSpec(torch.device("cpu"), dtype, bits=bits)
    held = quantization.held(str(spec))
    assert held == quantization.Held(bits, dtype)
    shards, bare = Shards(weight_files(base)), meta_model(base)
    names = TensorNames(bare, {name: info.shape for name, info in shards.infos.items()}).stored
    values = QuantisedValues(shards, bare, names, held)
    model, _ = load_base(base, spec)
    layers = {name: part for name, part in model.named_modules() if isinstance(part, (Linear8bitLt, Linear4bit))}
    assert len(layers) > 4
    for name, layer in layers.items():
        if bits == 8:
            stored, scale = quantization.eight_bit_weight(layer)
            expected = stored.float() * scale[:, None]
        else:
            expected = quantization.four_bit_weight(layer).float()
        found = values.read(names[f"{name}.weight"])
        assert torch.equal(found.T if family == "GPT2" else found, expected), name
    others = shards.infos.keys() - {names[f"{name}.weight"] for name in layers}
    assert all(torch.equal(values.read(name), shards.read(name)) for name in others)


def test_a_base_that_was_held_as_it_is_stored_has_no_other_values():
    assert quantization.held(str(DeviceSpec(torch.device("cpu"), torch.float32, bits=16))) is None
    assert quantization.held("") is None
