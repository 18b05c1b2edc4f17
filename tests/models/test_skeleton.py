"""A model whose weights are read in parts is the one that transformers loads."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lora_alpaca.errors import ModelError
from lora_alpaca.models import skeleton as skeletons
from lora_alpaca.models.base import load_base, locate_base
from lora_alpaca.models.device import DeviceSpec
from lora_alpaca.models.skeleton import Skeleton

CPU = torch.device("cpu")


def spec(bits=16, dtype=torch.float32):
    return DeviceSpec(CPU, dtype, bits)


def filled(base, how, ranks=2):
    """Return a model that each of some ranks, one after the other, has read its part of."""
    skeleton = Skeleton(base, how, "--shard full")
    skeleton.give_memory(skeleton.model)
    for rank in range(ranks):

        def part(parameter, rank=rank):
            rows = -(-len(parameter) // ranks)
            return parameter.data[rank * rows : (rank + 1) * rows], rank * rows

        skeleton.fill(part)
    return skeleton.model, skeleton.notes


@pytest.mark.parametrize(("bits", "dtype"), [(16, torch.bfloat16), (8, torch.float32), (4, torch.float32)])
@pytest.mark.parametrize("family", ["Llama", "Gemma", "OPT", "GPT2"])
def test_logits_are_those_of_the_loaded_base(tiny_model, family, bits, dtype):
    base, how = locate_base(str(tiny_model(family))), spec(bits, dtype)
    before = torch.get_rng_state()
    model, notes = filled(base, how)
    assert torch.equal(torch.get_rng_state(), before)
    expected, expected_notes = load_base(base, how)
    assert notes == expected_notes
    quantised = {name for name, part in model.named_modules() if type(part) in skeletons.QUANTISED.values()}
    of_library = {name for name, part in expected.named_modules() if type(part).__module__.startswith("bitsandbytes")}
    assert quantised == of_library
    assert bool(quantised) == (bits != 16)
    ids = torch.arange(30)[None]
    with torch.no_grad():
        found, wanted = (one(ids, use_cache=False).logits for one in (model, expected))
    if bits == 8:  # bitsandbytes rounds activations to 8 bits too
        assert (found - wanted).norm() < 0.05 * wanted.norm()
    else:
        assert torch.equal(found, wanted)
    for (name, buffer), (other, loaded) in zip(model.named_buffers(), expected.named_buffers(), strict=True):
        assert (name, buffer.dtype) == (other, loaded.dtype)
        assert torch.equal(buffer, loaded)


def test_placeholders_take_no_memory(tiny_model):
    model = Skeleton(locate_base(str(tiny_model("Llama"))), spec(8), "--shard full").model
    assert all(part.untyped_storage().nbytes() <= 4 for part in model.parameters())


def copied(source, folder, change):
    """Copy a base whose tensors are changed."""
    folder.mkdir()
    for file in source.iterdir():
        if file.suffix == ".json":
            (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return locate_base(str(folder))


@pytest.mark.parametrize("kind", ["missing", "another shape", "extra"])
def test_what_the_files_lack_is_said_as_by_the_loader(tiny_model, tmp_path, kind):
    name = "model.layers.1.mlp.up_proj.weight"

    def change(tensors):
        tensor = tensors.pop(name)
        if kind == "another shape":
            tensors[name] = tensor[:3].clone()
        elif kind == "extra":
            tensors |= {name: tensor, "model.layers.1.mlp.side.weight": tensor.clone()}

    base = copied(tiny_model("Llama"), tmp_path / "base", change)
    said = []
    for load in (lambda: load_base(base, spec()), lambda: filled(base, spec())):
        try:
            said.append(load()[1])
        except ModelError as error:
            said.append(str(error))
    assert said[0] == said[1]
    assert ("side" if kind == "extra" else name) in str(said[0])


def test_tied_weights_that_differ_are_parted(tiny_model, tmp_path):
    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

    base = copied(tiny_model("Gemma"), tmp_path / "base", change)
    model, _ = filled(base, spec())
    expected, _ = load_base(base, spec())
    assert torch.equal(model.lm_head.weight, expected.lm_head.weight)
    assert torch.equal(model.model.embed_tokens.weight, expected.model.embed_tokens.weight)


def test_what_is_not_sharded_is_refused_before_it_is_read(tiny_model, tmp_path):
    config = json.loads((tiny_model("Llama") / "config.json").read_text())
    config |= {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
    base = copied(tiny_model("Llama"), tmp_path / "stored", lambda tensors: None)
    (tmp_path / "stored" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="is stored quantised, and is not sharded; leave --shard out"):
        Skeleton(locate_base(base.path), spec(8), "--shard full")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    experts = transformers.MixtralConfig(vocab_size=50, num_key_value_heads=2, num_local_experts=2, **sizes)
    transformers.AutoModelForCausalLM.from_config(experts).save_pretrained(tmp_path / "experts")
    with pytest.raises(ModelError, match="is converted while it is loaded, and is not sharded; leave --shard out"):
        Skeleton(locate_base(str(tmp_path / "experts")), spec(), "--shard grads")
