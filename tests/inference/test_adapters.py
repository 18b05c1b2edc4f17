"""Adapters on a base: added to its weights or beside them, one or several, against PEFT and against the export."""

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from lora_alpaca import ExportConfig, GenerateConfig, export_hf
from lora_alpaca.errors import AdapterError, ConfigError
from lora_alpaca.inference import attaching, loading
from lora_alpaca.inference.adapters import Adapters
from lora_alpaca.inference.layers import merged_weights
from lora_alpaca.inference.layers.low_rank import LowRank
from lora_alpaca.inference.sampling import BASE
from lora_alpaca.models.base import locate_base
from lora_alpaca.models.device import DTYPES

pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # by PEFT, of adapters below
IDS = torch.arange(3, 43)[None]
KINDS = {
    "plain": {"target_modules": ["q_proj", "v_proj"]},
    "every layer, ranks of their own": {
        "target_modules": "all-linear", "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 32},
        "use_rslora": True,
    },
    "DoRA": {"target_modules": ["q_proj", "v_proj"], "use_dora": True},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "embeddings": {"target_modules": ["embed_tokens", "v_proj"]},
    "trained tokens": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [5, 9, 30]}},
}  # fmt: skip


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """Return `make(base, name, **options)`: the folder of a random adapter on a base, as PEFT saves it."""

    def make(base, name="adapter", seed=1, scale=1.0, **options):
        folder = tmp_path_factory.mktemp("adapters") / name
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]} | options
        torch.manual_seed(seed)
        adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))
        for key, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                moved = parameter.data + 0.1 * torch.randn_like(parameter)
                parameter.data = moved * (scale if "lora_B" in key else 1)
        adapted.save_pretrained(folder, save_embedding_layers=False)
        return folder

    return make


def load(base, weights, **options):
    chosen = {"prompt_template": "alpaca", "dtype": "fp32", "device": "cpu"} | options
    return loading.load(GenerateConfig(base_model=str(base), lora_weights=str(weights), **chosen)).adapters


def reference(base, folder=None, dtype=torch.float32):
    """Return the logits of a base, with the adapter of a folder on it, as PEFT computes them."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=dtype).eval()
    if folder is not None:
        model = peft.PeftModel.from_pretrained(model, folder).eval()
    with torch.no_grad():
        return model(IDS).logits.float()


def logits(adapters, name):
    with torch.inference_mode(), adapters.using(name) as model:
        return model(IDS).logits.float()


def off(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("merge", ["true", "false"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_answers_as_peft_computes_it_and_the_base_as_without(kind, merge, tiny_llama, make):
    folder = make(tiny_llama, **KINDS[kind])
    adapters = load(tiny_llama, folder, merge_adapter=merge)
    expected, bare = reference(tiny_llama, folder), reference(tiny_llama)
    assert off(expected, bare) > 0.01
    for _ in range(2):
        assert off(logits(adapters, "adapter"), expected) < 1e-5
        assert torch.equal(logits(adapters, BASE), bare)


def test_of_tied_embeddings_one_alone_may_be_changed(tmp_path, tiny_llama, make):
    base = tmp_path / "tied"
    config = transformers.AutoConfig.from_pretrained(tiny_llama, tie_word_embeddings=True)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(base)
    transformers.AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(base)
    for kind in ("head", "embeddings", "trained tokens"):
        folder = make(base, **KINDS[kind])
        adapters = load(base, folder, merge_adapter="true")
        assert off(logits(adapters, "adapter"), reference(base, folder)) < 1e-5, kind
        assert torch.equal(logits(adapters, BASE), reference(base)), kind


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_merged_weights_are_those_of_the_export(dtype, tmp_path, tiny_llama, make):
    folder = make(tiny_llama, target_modules="all-linear")
    computes = DTYPES[dtype]
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    base.to(computes).float().save_pretrained(tmp_path / "base")  # values that both dtypes hold
    transformers.AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "base")
    where = {"base_model": str(tmp_path / "base"), "lora_weights": str(folder), "prompt_template": "alpaca"}
    export_hf(ExportConfig(**where, output_dir=str(tmp_path / "out"), dtype=dtype, receipt=False))
    exported = load_file(tmp_path / "out" / "model.safetensors")
    model, changes = base.to(computes), attaching.changes_of(locate_base(where["base_model"]), folder)
    merged_weights.MergedWeights(model, changes, "adapter", anyway=True)
    state = model.state_dict()
    assert len(changes) == 14
    assert {name for name in exported if not torch.equal(exported[name], state[name])} == set()


@pytest.mark.parametrize("kinds", [("plain", "every layer, ranks of their own"), ("plain", "DoRA")])
def test_several_adapters_answer_in_turns_on_one_base(kinds, tiny_llama, make):
    folders = [make(tiny_llama, f"number.{n}", seed=n, **KINDS[kind]) for n, kind in enumerate(kinds)]
    adapters = load(tiny_llama, ",".join(map(str, folders)))
    assert adapters.names == ("number.0", "number.1", BASE)
    assert has_thin_products(adapters.model) == ("DoRA" not in kinds)
    for name in ("number.0", "number.1", BASE, "number.1", "number.0"):
        folder = None if name == BASE else folders[int(name[-1])]
        assert off(logits(adapters, name), reference(tiny_llama, folder)) < 1e-5


def has_thin_products(model):
    return any(isinstance(part.forward, LowRank) for part in model.modules())


@pytest.mark.parametrize("bits", ["load_8bit", "load_4bit"])
def test_a_quantised_base_keeps_the_adapter_beside(bits, tiny_llama, make, capsys):
    folder = make(tiny_llama)
    adapters = load(tiny_llama, folder, **{bits: True})
    assert "the adapter is computed beside the weights: they are quantised" in capsys.readouterr().err
    assert has_thin_products(adapters.model)
    peft_model = load(tiny_llama, "none", **{bits: True}).model
    with torch.inference_mode():
        bare = peft_model(IDS).logits
        expected = peft.PeftModel.from_pretrained(peft_model, folder).eval()(IDS).logits
    assert off(logits(adapters, "adapter"), expected) < 0.02 < 0.1 < off(expected, bare)  # of int8: activations round
    assert off(logits(adapters, BASE), bare) < 0.02


def test_switching_to_the_one_at_work_does_nothing():
    switched = []
    adapters = Adapters("model", ["a", "b"], switched.append)
    for name in ("a", "a", "b", "b", "base", "base", "a"):
        with adapters.using(name) as model:
            assert model == "model"
    assert switched == ["b", "base", "a"]


def test_a_switch_that_fails_is_made_again():
    tried = []

    def put(name):
        tried.append(name)
        if len(tried) == 1:
            raise RuntimeError("half-way")

    adapters = Adapters("model", ["a", "b"], put)
    with pytest.raises(RuntimeError), adapters.using("b"):
        pass
    with adapters.using("a"):
        pass
    assert tried == ["b", "a"]


def test_a_change_that_rounding_would_lose_stays_beside(tiny_llama, make, monkeypatch, capsys):
    monkeypatch.setattr("lora_alpaca.models.device.has_bf16", lambda device: True)
    for scale, merges in ((1.0, True), (1e-3, False)):
        adapters = load(tiny_llama, make(tiny_llama, scale=scale), dtype="bf16")
        said = capsys.readouterr().err
        assert ("is added to the weights in memory" in said) == merges, said
        assert ("rounding to bfloat16 loses" in said) == (not merges), said
        assert has_thin_products(adapters.model) == (not merges)
    load(tiny_llama, make(tiny_llama, scale=1e-3), dtype="bf16", merge_adapter="true")
    assert "is added to the weights in memory, as asked: rounding to bfloat16 loses" in capsys.readouterr().err


def test_without_room_for_the_weights_twice_the_adapter_stays_beside(tiny_llama, make, monkeypatch, capsys):
    monkeypatch.setattr(merged_weights, "free_and_total", lambda device: (10_000, 20_000))
    folder = make(tiny_llama)
    assert has_thin_products(load(tiny_llama, folder).model)
    assert "they would take" in capsys.readouterr().err


def test_what_is_merged_takes_the_memory_of_what_it_changes(tiny_llama, make):
    adapters = load(tiny_llama, make(tiny_llama))
    places = adapters._put.__self__._places
    assert [key for _, key, *_ in places] == ["weight"] * 4
    with adapters.using(BASE) as model:
        parameters = {parameter.data_ptr() for parameter in model.parameters()}
    with adapters.using("adapter") as model:
        assert len({parameter.data_ptr() for parameter in model.parameters()} - parameters) == 4


@pytest.mark.parametrize("options", [{"load_8bit": True}, {"several": True}])
def test_what_cannot_be_merged_is_refused_where_that_was_asked_for(options, tiny_llama, make):
    names = [make(tiny_llama, f"a{n}") for n in range(2 if options.pop("several", False) else 1)]
    with pytest.raises(ConfigError, match=r"--merge_adapter true: the weights stay as they are: .*; leave the flag"):
        load(tiny_llama, ",".join(map(str, names)), merge_adapter="true", **options)


# ------------------------------------------------------------------------------------------------------------- names


def test_names_are_those_of_folders_and_tell_adapters_apart(tiny_llama, make, tmp_path):
    one, other, base = make(tiny_llama, "mine"), make(tiny_llama, "mine"), make(tiny_llama, "base")
    with pytest.raises(ConfigError, match=r"two adapters are named mine, .*; rename a folder"):
        load(tiny_llama, f"{one},{other}")
    with pytest.raises(ConfigError, match="`base` means the model without an adapter; rename the folder"):
        load(tiny_llama, base)
    with pytest.raises(ConfigError, match="none is no adapter; `base` can be asked for in any case"):
        load(tiny_llama, f"{one},none")
    with pytest.raises(AdapterError, match=r"--lora_weights .*nowhere: no adapter there"):
        load(tiny_llama, f"{one},{tmp_path / 'nowhere'}")


def test_a_folder_whose_name_has_a_comma_is_one_adapter(tiny_llama, make):
    assert load(tiny_llama, make(tiny_llama, "a,b")).names == ("a,b", BASE)


def test_adapters_of_several_bases_do_not_go_together(tiny_llama, tiny_model, make):
    one, other = make(tiny_llama, "one"), make(tiny_model("Mistral"), "other")
    config = GenerateConfig(lora_weights=f"{one},{other}", prompt_template="alpaca")
    with pytest.raises(AdapterError, match=r"adapters on different bases, .* and .*; name those of one"):
        loading.load(config)


def test_an_adapter_of_another_shape_is_refused_among_several(tiny_llama, make, tmp_path):
    base = tmp_path / "wider"
    config = transformers.AutoConfig.from_pretrained(tiny_llama, hidden_size=96)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(base)
    with pytest.raises(AdapterError, match="other"):
        load(tiny_llama, f"{make(tiny_llama, 'one')},{make(base, 'other')}")


def test_each_adapter_has_its_own_template(tiny_llama, make):
    folders = f"{make(tiny_llama, 'one')},{make(tiny_llama, 'two')}"
    config = GenerateConfig(base_model=str(tiny_llama), lora_weights=folders, prompt_template="alpaca", device="cpu")
    loaded = loading.load(config)
    assert list(loaded.codecs) == ["one", "two", BASE]
    assert loaded.codecs["one"] is not loaded.codecs["two"]
    assert loaded.codecs[BASE] is loaded.codecs["one"]
