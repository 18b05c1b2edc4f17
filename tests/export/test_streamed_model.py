"""A model without weights, streamed from its files, computes what the loaded model does, in fp64 too."""

import functools

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

from lora_alpaca.export.proof.adapted_model import with_adapters
from lora_alpaca.export.proof.streamed_model import Precision, StreamedModel, _Weights, state_of
from lora_alpaca.models.base import locate_base, weight_files
from lora_alpaca.models.meta import meta_model
from lora_alpaca.models.shards import Shards
from lora_alpaca.models.tensor_names import TensorNames

IDS = torch.arange(3, 51).reshape(3, 16)
CPU = torch.device("cpu")
FP32, FP64 = Precision(CPU, torch.float32), Precision(CPU, torch.float64)


def opened(folder):
    base = locate_base(str(folder))
    shards = Shards(weight_files(base))
    names = TensorNames(meta_model(base), {name: info.shape for name, info in shards.infos.items()})
    tied = base.config.get_text_config().tie_word_embeddings
    return base, tied, lambda name: shards.read(names.stored[name])


@torch.inference_mode()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Gemma", "GPT2", "OPT", "Bloom", "GPTNeoX"])
def test_the_logits_are_those_of_the_loaded_model(tiny_model, family):
    folder = tiny_model(family)
    base, tied, read = opened(folder)
    streamed = StreamedModel(base, tied)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert torch.equal(streamed.logits(IDS, read, FP32), logits(loaded))
    assert (streamed.logits(IDS, read, FP64) - logits(loaded.double())).abs().max() < 1e-6
    assert all(parameter.is_meta for parameter in streamed.model.parameters())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in streamed.model.modules())


@pytest.fixture(scope="module")
def adapters(tiny_llama, tmp_path_factory):
    """Return the folders of two adapters of PEFT's on the tiny Llama, other layers and ranks each."""
    found = []
    for number, targets in enumerate((["q_proj", "lm_head", "embed_tokens"], ["q_proj", "down_proj"])):
        torch.manual_seed(number)
        config = LoraConfig(r=2 + number, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
        base = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
        model = get_peft_model(base, config)
        model.save_pretrained(folder := tmp_path_factory.mktemp("adapter"), save_embedding_layers=False)
        found.append(folder)
    return found


def test_an_adapter_is_computed_as_peft_does(tiny_llama, adapters):
    base, tied, read = opened(tiny_llama)
    streamed = StreamedModel(base, tied, functools.partial(with_adapters, adapters=[(adapters[0], 1.0)]))
    plain = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    without = logits(plain)
    tuned = PeftModel.from_pretrained(plain, adapters[0]).eval()
    assert (streamed.logits(IDS, read, FP32) - logits(tuned)).abs().max() < 1e-6
    assert torch.equal(streamed.logits(IDS, read, FP32, adapted=False), without)
    assert (streamed.logits(IDS, read, FP64) - logits(tuned.double())).abs().max() < 1e-6
    assert (logits(tuned).float() - without).abs().max() > 1e-2


def test_memory_holds_a_layer_at_a_time(tiny_llama, adapters, monkeypatch):
    """With an adapter too, whose model is wrapped by PEFT's: there is a layer, or what is around the layers."""
    base, tied, read = opened(tiny_llama)
    streamed = StreamedModel(base, tied, functools.partial(with_adapters, adapters=[(adapters[1], 1.0)]))
    there, most = [0], [0]
    take, drop = _Weights.take, _Weights.drop

    def taking(self, *given):
        take(self, *given)
        there[0] += sum(parameter.is_meta for _, _, parameter, _ in self._slots)
        most[0] = max(most[0], there[0])

    def dropping(self, *given):
        there[0] -= sum(parameter.is_meta for _, _, parameter, _ in self._slots) if self._taken else 0
        drop(self, *given)

    monkeypatch.setattr(_Weights, "take", taking)
    monkeypatch.setattr(_Weights, "drop", dropping)
    streamed.logits(IDS, read, FP64)
    assert 0 < most[0] <= 9 and there == [0]


def test_several_adapters_are_the_sum_that_peft_calls_cat(tiny_llama, adapters):
    base, tied, read = opened(tiny_llama)
    weighted = [(adapters[1], 0.5), (adapters[0], -2.0)]
    streamed = StreamedModel(base, tied, functools.partial(with_adapters, adapters=weighted))
    plain = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    model = PeftModel.from_pretrained(plain, adapters[1], adapter_name="one")
    model.load_adapter(adapters[0], adapter_name="two")
    merged = {name: tensor.clone() for name, tensor in plain.named_parameters() if "lora_" not in name}
    for adapter, weight in (("one", 0.5), ("two", -2.0)):
        for name, layer in plain.named_modules():
            if adapter in getattr(layer, "lora_A", ()) or adapter in getattr(layer, "lora_embedding_A", ()):
                merged[f"{name}.base_layer.weight"] += weight * layer.get_delta_weight(adapter)
    expected = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    expected.load_state_dict({name.replace(".base_layer", ""): tensor for name, tensor in merged.items()}, strict=False)
    assert (streamed.logits(IDS, read, FP32) - logits(expected)).abs().max() < 1e-5


def test_a_loaded_model_generates_and_is_empty_again(tiny_llama):
    base, tied, read = opened(tiny_llama)
    streamed = StreamedModel(base, tied)
    expected = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with streamed.loaded(read, FP32) as model:
        assert torch.equal(model.generate(IDS[:1], **options), expected.generate(IDS[:1], **options))
    assert all(parameter.is_meta for parameter in streamed.model.parameters())


def test_experts_that_transformers_stacks(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.MixtralConfig(vocab_size=64, num_key_value_heads=2, num_local_experts=4, **sizes)
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path)
    base = locate_base(str(tmp_path))
    shards = Shards(weight_files(base))
    state = state_of(base, {name: shards.read(name) for name in shards.infos}, tied=False)
    expected = transformers.MixtralForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(StreamedModel(base, False).logits(IDS, state.__getitem__, FP32), logits(expected))
