"""What adapters change of the tensors of a base: sums of several, refusals, vocabularies, ties, names and memory."""

import json
import shutil
import warnings

import peft
import pytest
import torch
import transformers
from every_kind import ARCHITECTURES, IDS, adapted, distance, lora, make_base, merge
from faults.scene import forked
from safetensors.torch import load_file, save_file

from lora_alpaca.errors import AdapterError, ExportError
from lora_alpaca.export.merge.deltas import Deltas
from lora_alpaca.export.merge.loaded_deltas import LoadedDeltas
from lora_alpaca.models.base import locate_base
from lora_alpaca.models.weights import TensorInfo

LLAMA, TIED = ARCHITECTURES["Llama"], ARCHITECTURES["Llama, tied"]
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folders = {}
    for name in ("Llama", "Llama, tied", "GPT-2"):
        folders[name] = tmp_path_factory.mktemp("base") / "model"
        make_base(ARCHITECTURES[name], folders[name])
    return folders


def saved(base, folder, facts=LLAMA, seed=1, **options):
    """Save a random adapter and return its folder, and base + adapter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = adapted(base, lora(**options), facts, seed)
        model.save_pretrained(folder)
    return folder, model


def deltas_of(base, *adapters):
    """Return the deltas of adapters, each a folder or a folder and its weight, and the tensors of the base."""
    stored = load_file(base / "model.safetensors")
    infos = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in stored.items()}
    weighted = [adapter if isinstance(adapter, tuple) else (adapter, 1.0) for adapter in adapters]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing of PEFT's reaches the user
        return Deltas(weighted, locate_base(str(base)), infos), stored


def merged_model(base, deltas, stored, folder):
    """Return the model of merged tensors, as transformers reads it from a folder."""
    shutil.copytree(base, folder)
    save_file(merge(deltas, stored, torch.float32), folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text()) | {"tie_word_embeddings": deltas.tied}
    config["vocab_size"] = deltas.vocabulary or config["vocab_size"]
    (folder / "config.json").write_text(json.dumps(config))
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


@torch.no_grad()
def logits(model, ids=IDS):
    return model(input_ids=ids).logits


# -------------------------------------------------------------------------------------------------- several adapters


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, -2.0)])
def test_several_adapters_are_summed(weights, bases, tmp_path):
    base = bases["Llama"]
    one, _ = saved(base, tmp_path / "one", seed=1)
    other, _ = saved(base, tmp_path / "other", seed=2, r=2, use_rslora=True, target_modules=["q_proj", "lm_head"])
    deltas, stored = deltas_of(base, (one, weights[0]), (other, weights[1]))
    model = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), one, "one")
    model.load_adapter(other, "other")
    model.add_weighted_adapter(["one", "other"], weights, "sum", combination_type="cat")
    model.set_adapter("sum")
    found = logits(merged_model(base, deltas, stored, tmp_path / "merged"))
    assert distance(found, logits(model.eval())) < 1e-5
    assert deltas.changed == {
        *(f"model.layers.{layer}.{name}.weight" for layer in (0, 1) for name in ("self_attn.q_proj", "mlp.down_proj")),
        "lm_head.weight",
    }


@pytest.mark.parametrize(
    ("options", "weights", "says"),
    [
        ({"modules_to_save": ["lm_head"]}, (1, 1), "lm_head.weight was trained itself, and another adapter changes it"),
        ({"use_dora": True}, (1, 1), "_proj.weight is changed by the rule of DoRA, and another adapter changes it"),
        ({"use_dora": True}, (0.5,), "--adapter_weights 0.5: .* is changed by the rule of DoRA, which is not weighted"),
        ({"modules_to_save": ["lm_head"]}, (2,), "--adapter_weights 2: .*lm_head.weight was trained itself"),
    ],
)
def test_what_is_no_sum_is_refused(options, weights, says, bases, tmp_path):
    base = bases["Llama"]
    folders = [saved(base, tmp_path / str(number), seed=number, **options)[0] for number in range(len(weights))]
    with pytest.raises(ExportError, match=says):
        deltas_of(base, *zip(folders, map(float, weights), strict=True))


def test_one_trained_whole_and_another_elsewhere_are_merged(bases, tmp_path):
    base = bases["Llama"]
    one, trained = saved(base, tmp_path / "one", modules_to_save=["lm_head"])
    other, _ = saved(base, tmp_path / "other", seed=2)
    deltas, stored = deltas_of(base, one, other)
    head = trained.base_model.model.lm_head.modules_to_save["default"].weight
    assert torch.equal(deltas.merged("lm_head.weight", stored["lm_head.weight"], torch.float32), head)


# ------------------------------------------------------------------------------------------------------- vocabularies

RESIZED = [
    {}, {"modules_to_save": ["embed_tokens", "lm_head"]}, {"modules_to_save": ["embed_tokens"]},
    {"trainable_token_indices": [5, 65]},
]  # fmt: skip


@pytest.mark.parametrize("options", RESIZED, ids=str)
@pytest.mark.parametrize("name", [pytest.param("Llama", marks=pytest.mark.slow), "Llama, tied"])
def test_a_larger_vocabulary_comes_with_the_adapter(name, options, bases, tmp_path):
    base, model = bases[name], transformers.AutoModelForCausalLM.from_pretrained(bases[name])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.resize_token_embeddings(70)
        config = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", **options)
        model = peft.get_peft_model(model, config).eval()
        torch.manual_seed(0)
        for parameter in filter(lambda one: one.requires_grad, model.parameters()):
            parameter.data = parameter.data + 0.1 * torch.randn_like(parameter)
        model.save_pretrained(tmp_path / "adapter")
    deltas, stored = deltas_of(base, tmp_path / "adapter")
    assert deltas.vocabulary == 70
    assert {info.shape for info in deltas.resized.values()} == {(70, 32)}
    found = logits(merged_model(base, deltas, stored, tmp_path / "merged"), IDS + 25)
    assert distance(found, logits(model, IDS + 25)) < 1e-5


def test_a_larger_vocabulary_of_which_half_is_missing_is_refused(bases, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(bases["Llama"])
        model.resize_token_embeddings(70)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, config)
        model.get_input_embeddings().lora_embedding_A["default"].data += 1
        model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ExportError, match=r"lm_head\.weight is for 64 tokens, and the adapter for 70"):
        deltas_of(bases["Llama"], tmp_path / "adapter")


# --------------------------------------------------------------------------------------------------- ties and names


def test_a_tie_is_kept_where_embeddings_and_head_are_trained_as_one(bases, tmp_path):
    folder, _ = saved(bases["Llama, tied"], tmp_path / "a", TIED, trainable_token_indices={"embed_tokens": [5]})
    deltas, _ = deltas_of(bases["Llama, tied"], folder)
    assert (deltas.tied, deltas.added, deltas.notes) == (True, {}, [])
    apart, _ = saved(bases["Llama, tied"], tmp_path / "b", TIED, modules_to_save=["lm_head"])
    deltas, _ = deltas_of(bases["Llama, tied"], apart)
    assert not deltas.tied
    assert deltas.added == {"lm_head.weight": TensorInfo(torch.float32, (64, 32))}
    assert deltas.source("lm_head.weight") == "model.embed_tokens.weight"
    assert "model.embed_tokens.weight" not in deltas.changed
    assert len(deltas.notes) == 1


def test_names_without_a_prefix_are_those_of_the_files(bases, tmp_path):
    plain = tmp_path / "base"
    shutil.copytree(bases["GPT-2"], plain)
    stored = {n.removeprefix("transformer."): t for n, t in load_file(plain / "model.safetensors").items()}
    save_file(stored, plain / "model.safetensors", metadata={"format": "pt"})
    facts = ARCHITECTURES["GPT-2"]
    folder, model = saved(plain, tmp_path / "adapter", facts, target_modules=["c_attn", "lm_head"])
    deltas, stored = deltas_of(plain, folder)
    assert deltas.changed == {"h.0.attn.c_attn.weight", "h.1.attn.c_attn.weight", "wte.weight"}  # kept beside
    assert list(deltas.added) == ["lm_head.weight"]
    assert distance(logits(merged_model(plain, deltas, stored, tmp_path / "merged")), logits(model)) < 1e-5


def test_a_loaded_model_gives_the_same_tensors(bases, tmp_path):
    for name, options in [("GPT-2", {"target_modules": ["c_attn", "wte"]}), ("Llama", {"use_dora": True})]:
        folder, _ = saved(bases[name], tmp_path / name, ARCHITECTURES[name], **options)
        deltas, stored = deltas_of(bases[name], folder)
        infos = {key: TensorInfo(tensor.dtype, tuple(tensor.shape)) for key, tensor in stored.items()}
        loaded = LoadedDeltas([(folder, 1.0)], locate_base(str(bases[name])), infos)
        assert (loaded.changed, loaded.added, loaded.tied) == (deltas.changed, deltas.added, deltas.tied)
        one, other = (merge(which, stored, torch.float32) for which in (deltas, loaded))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


# ---------------------------------------------------------------------------------------------------------- refusals


def spoil(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors, next(name for name in tensors if "lora_A" in name))
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda tensors, name: tensors.pop(name), r"lora_A\.weight is missing; wrong base model\?"),
        (lambda tensors, name: tensors.update({name + "x": torch.ones(1)}), "x is not part of this base model"),
        (
            lambda tensors, name: tensors.update({name: torch.ones(4, 7)}),
            r"is \[4, 7\], the base model needs \[4, 64\]",
        ),
    ],
)
def test_tensors_that_are_not_the_adapters_are_refused(change, says, bases, tmp_path):
    folder, _ = saved(bases["Llama"], tmp_path / "adapter", target_modules=["down_proj"])
    spoil(folder, change)
    with pytest.raises(AdapterError, match=says) as refused:
        deltas_of(bases["Llama"], folder)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=str)
def test_what_is_not_finite_is_refused(options, bases, tmp_path):
    folder, _ = saved(bases["Llama"], tmp_path / "adapter", **options)
    deltas, stored = deltas_of(bases["Llama"], folder)
    name = "model.layers.1.mlp.down_proj.weight"
    for value, dtype in ((float("inf"), torch.float32), (float("nan"), torch.bfloat16), (1e6, torch.float16)):
        tensor = stored[name].clone()
        tensor[-1, -1] = value
        if options and value == 1e6:
            continue
        with pytest.raises(ExportError, match=f"{name} (holds NaN or infinity|cannot be merged)"):
            deltas.merged(name, tensor, dtype)


def test_a_bias_without_a_place_is_refused(bases, tmp_path):
    folder, _ = saved(bases["Llama"], tmp_path / "adapter", lora_bias=True)
    with pytest.raises(AdapterError, match=r"trained a bias of model\.layers\.0\.\S+, and the model has no place"):
        deltas_of(bases["Llama"], folder)


# ------------------------------------------------------------------------------------------------------------ memory


def test_a_large_tensor_takes_its_result_and_little_more(bases, tmp_path):
    """A block in fp32 at a time: the rise of the peak is the bf16 result, 90 MB, and not 180 MB for each fp32 copy."""
    folder, _ = saved(bases["Llama"], tmp_path / "adapter", target_modules=["down_proj"])
    deltas, _ = deltas_of(bases["Llama"], folder)
    name, (rows, columns) = "model.layers.0.mlp.down_proj.weight", (4096, 11008)
    (entry,) = deltas._changes[name]
    change = entry.change
    wide = type(change)(torch.ones(rows, 4), torch.ones(4, columns), change.scale)
    deltas._changes[name] = [entry._replace(change=wide)]
    tensor = torch.zeros(rows, columns, dtype=torch.bfloat16)

    def work():
        result = deltas.merged(name, tensor, torch.bfloat16)
        assert torch.equal(result[::1000], torch.full((), 4 * change.scale).bfloat16().expand(5, columns))

    ended = forked(work, tmp_path / "said.txt")
    assert ended.code == 0, ended.said
    assert ended.megabytes < 130


def test_a_loaded_model_rounds_to_each_dtype_that_is_asked_for(tmp_path):
    base = tmp_path / "base"
    make_base(ARCHITECTURES["Mixtral"], base)
    options = {"target_modules": [], "target_parameters": ["experts.down_proj"]}
    folder, _ = saved(base, tmp_path / "adapter", ARCHITECTURES["Mixtral"], **options)
    stored = load_file(base / "model.safetensors")
    infos = {key: TensorInfo(tensor.dtype, tuple(tensor.shape)) for key, tensor in stored.items()}
    deltas = LoadedDeltas([(folder, 1.0)], locate_base(str(base)), infos)
    assert len(deltas.changed) == 8
    for name in sorted(deltas.changed):
        short, whole = (deltas.merged(name, stored[name], dtype) for dtype in (torch.bfloat16, torch.float32))
        assert (short.dtype, whole.dtype) == (torch.bfloat16, torch.float32)
        assert torch.equal(short, whole.bfloat16())
        assert not torch.equal(whole, stored[name])
