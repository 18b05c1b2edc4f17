"""Damaged and foreign adapters: every command that loads one refuses it in one line, and writes nothing."""

import json
import shutil
import struct

import pytest
import short_run
import torch
import transformers
from command import error_line, run
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from lora_alpaca import FinetuneConfig
from lora_alpaca.artifacts import adapter_folder
from lora_alpaca.config import ConvertConfig
from lora_alpaca.errors import AdapterError
from lora_alpaca.export.imports.convert_adapter import convert_adapter
from lora_alpaca.models import lora
from lora_alpaca.models.base import load_base, locate_base
from lora_alpaca.models.device import DeviceSpec
from lora_alpaca.models.meta import meta_model
from lora_alpaca.storage import atomic, output_folder
from lora_alpaca.storage.paths import sha256

WEIGHTS, SETTINGS = lora.WEIGHTS, lora.CONFIG
COMMANDS = ("finetune", "generate", "export")


@pytest.fixture(scope="module")
def adapter(tiny_llama, rows, tmp_path_factory):
    """Return the folder of a finished adapter with a checkpoint in it."""
    return short_run.adapter(tmp_path_factory.mktemp("adapter"), tiny_llama, rows, max_steps=4, save_steps=2)


@pytest.fixture
def there(adapter, tmp_path):
    """Return a copy of the adapter, to be damaged."""
    return shutil.copytree(adapter, tmp_path / "adapter")


def words(command, adapter, tmp_path, data_path, base=None):
    """Return the words of a command that loads an adapter."""
    named = ["--base_model", base] if base else []
    out = ["--output_dir", tmp_path / "new"]
    if command == "finetune":
        data = ["--data_path", data_path, "--max_steps", 1, "--cutoff_len", 96, "--load_8bit", "False"]
        return [*named, "--init_adapter", adapter, *data, *out]
    if command == "generate":
        return [*named, "--lora_weights", adapter, "--instruction", "Hi.", "--max_new_tokens", 2]
    return [*named, "--lora_weights", adapter, *out]


def refusal(command, *given, code=1):
    """Return the one line of error of a command that must be refused before the base is loaded."""
    return error_line(run(command, *given), code)


# ------------------------------------------------------------------------------------ fifteen and more that are refused


def changed(change):
    """Return a kind of damage: the tensors changed, in a file that is sound and recorded as it is."""

    def damage(folder, base):
        save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)
        _recorded(folder)

    return damage


def written(name, change):
    """Return a kind of damage: the bytes of a file changed, and nothing else."""

    def damage(folder, base):
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return damage


def rebased(change):
    """Return a kind of foreignness: the adapter as it is, and a base changed after it was trained."""

    def damage(folder, base):
        config = transformers.AutoConfig.from_pretrained(base)
        change(config)
        model = transformers.AutoModelForCausalLM.from_config(config)
        model.save_pretrained(base)

    return damage


def _recorded(folder):
    record = output_folder.read_record(folder)
    atomic.replace(folder / output_folder.RECORD, atomic.as_json(record | {"adapter_sha256": sha256(folder / WEIGHTS)}))


def _pickled(folder, base):
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def _unfinished(folder, base):
    atomic.replace(
        folder / output_folder.RECORD, atomic.as_json(output_folder.read_record(folder) | {"status": "running"})
    )


def _base_as_adapter(folder, base):
    shutil.rmtree(folder)
    shutil.copytree(base, folder)


def _damaged_checkpoint(folder, base):
    kept = folder / "checkpoint-2"
    for path in folder.iterdir():
        if path.is_file():
            path.unlink()
    for path in list(kept.iterdir()):
        shutil.copy(path, folder / path.name)
    shutil.rmtree(kept)
    written("optimizer.safetensors", lambda data: data[:-1])(folder, base)


def _flip(data):
    """Return a file with the lowest bit of its last tensor turned."""
    return data[:-4] + bytes([data[-4] ^ 1]) + data[-3:]


def _first(state, value):
    name = sorted(state)[0]
    tensor = state[name].clone()
    tensor.view(-1)[3] = value
    return state | {name: tensor}


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
KINDS = {
    "fewer layers": (rebased(lambda config: config.update({"num_hidden_layers": 1})), "wrong base model?"),
    "more layers": (rebased(lambda config: config.update({"num_hidden_layers": 3})), "is missing; wrong base model?"),
    "another width": (rebased(lambda config: config.update({"hidden_size": 32})), "the base model needs [8, 32]"),
    "other weights": (rebased(lambda config: None), "and the weights of {base} are others"),
    "another vocabulary": (rebased(lambda config: config.update({"vocab_size": 700})), "the weights of {base} are oth"),
    "another architecture": ("OPT", "wrong base model?"),
    "no tensors": (changed(lambda state: {}), "holds no tensors; it is an empty adapter"),
    "other names": (changed(lambda state: {f"x.{name}": t for name, t in state.items()}), "wrong base model?"),
    "half of it": (changed(lambda state: dict(sorted(state.items())[:4])), "is missing; wrong base model?"),
    "NaN": (changed(lambda state: _first(state, float("nan"))), "holds NaN or infinity"),
    "infinity": (changed(lambda state: _first(state, float("-inf"))), "holds NaN or infinity"),
    "B zero": (
        changed(lambda state: {name: t * ("lora_B" not in name) for name, t in state.items()}),
        "the adapter changes nothing (every B is zero)",
    ),
    "cut short": (written(WEIGHTS, lambda data: data[:-100]), "cannot be read ("),
    "zero bytes": (written(WEIGHTS, lambda data: b""), "is empty (0 bytes)"),
    "an LFS pointer": (written(WEIGHTS, lambda data: POINTER), "is a git-LFS pointer"),
    "a header of nonsense": (written(WEIGHTS, lambda data: struct.pack("<Q", 2**40) + data[8:]), "cannot be read ("),
    "a bit turned": (written(WEIGHTS, _flip), "not as it was saved (its sha256 is another)"),
    "only a pickle": (_pickled, "adapter_model.bin is a pickle, which is not loaded: lora-alpaca convert_adapter"),
    "settings cut short": (written(SETTINGS, lambda data: data[:40]), "adapter_config.json: cannot be read"),
    "settings of another kind": (
        written(SETTINGS, lambda data: data.replace(b'"LORA"', b'"SOLA"')),
        "describes no LoRA adapter (peft_type is SOLA)",
    ),
    "settings without a rank": (written(SETTINGS, lambda data: data.replace(b'"r": 8', b'"r": 0')), "r is 0; the file"),
    "a record cut short": (written(output_folder.RECORD, lambda data: data[:40]), "lora_alpaca.json: damaged"),
    "no settings": (lambda folder, base: (folder / SETTINGS).unlink(), "no adapter there (adapter_config.json is mis"),
    "no folder": (lambda folder, base: shutil.rmtree(folder), "no adapter there"),
    "a base model": (_base_as_adapter, "it is a model; name it with --base_model"),
    "an unfinished run": (_unfinished, "this run was never finished; go on with it"),
    "a damaged checkpoint": (_damaged_checkpoint, "optimizer.safetensors is missing or damaged"),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_refused(kind, command, there, tmp_path, data_path, tiny_llama, tiny_model, no_model_loads):
    damage, said = KINDS[kind]
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    if isinstance(damage, str):
        base = tiny_model(damage)
    else:
        damage(there, base)
    line = refusal(command, *words(command, there, tmp_path, data_path, base))
    assert said.format(base=base) in line
    assert not (tmp_path / "new").exists()
    assert not list(tmp_path.glob(".*"))


# ------------------------------------------------------------------------------------------------- which base it was


def test_both_bases_are_named(there, tmp_path, data_path, tiny_llama):
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    rebased(lambda config: None)(there, base)
    line = refusal("export", *words("export", there, tmp_path, data_path, base))
    assert f"{there} was trained on {tiny_llama}, and the weights of {base} are others" in line


@pytest.mark.parametrize("command", COMMANDS)
def test_a_base_that_was_moved_is_the_same(command, there, tmp_path, data_path, tiny_llama):
    base = shutil.copytree(tiny_llama, tmp_path / "elsewhere")
    result = run(command, *words(command, there, tmp_path, data_path, base))
    assert result.code == 0, result.err
    assert adapter_folder.UNKNOWN_BASE not in result.out + result.err


def test_weights_changed_in_place_are_noticed(there, tmp_path, data_path, tiny_llama):
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    record = output_folder.read_record(there)
    atomic.replace(there / output_folder.RECORD, atomic.as_json(record | {"base_model": str(base)}))
    given = words("export", there, tmp_path, data_path)
    assert run("export", *given).code == 0
    written("model.safetensors", _flip)(base, base)
    assert f"was trained on {base}, and the weights of {base} are others" in refusal("export", *given)


@pytest.mark.parametrize("command", COMMANDS)
def test_of_a_foreign_adapter_names_and_shapes_are_checked_and_that_is_said(
    command, there, tmp_path, data_path, tiny_llama, tiny_model
):
    for name in (output_folder.RECORD, "prompt_contract.json"):
        (there / name).unlink()
    template = [] if command == "finetune" else ["--prompt_template", "alpaca"]
    result = run(command, *words(command, there, tmp_path, data_path, tiny_llama), *template)
    assert result.code == 0, result.err
    assert adapter_folder.UNKNOWN_BASE in result.out + result.err
    line = run(command, *words(command, there, tmp_path, data_path, tiny_model("GPT2")), *template).err
    assert "the adapter does not fit this base model" in line


# ------------------------------------------------------------------------------------------------- checkpoints of ours


@pytest.mark.parametrize("command", COMMANDS[:2])
def test_a_checkpoint_that_is_whole_is_an_adapter_even_if_it_changes_nothing(
    command, there, tmp_path, data_path, tiny_llama
):
    folder = there / "checkpoint-2"
    state = {name: tensor * ("lora_B" not in name) for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(state, folder / WEIGHTS)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][WEIGHTS]["sha256"] = sha256(folder / WEIGHTS)
    manifest["files"][WEIGHTS]["bytes"] = (folder / WEIGHTS).stat().st_size
    atomic.replace(folder / "manifest.json", atomic.as_json(manifest))
    template = [] if command == "finetune" else ["--prompt_template", "alpaca"]
    result = run(command, *words(command, folder, tmp_path, data_path, tiny_llama), *template)
    assert result.code == 0, result.err


def test_a_checkpoint_knows_its_base(there, tmp_path, data_path, tiny_llama):
    base = shutil.copytree(tiny_llama, tmp_path / "base")
    rebased(lambda config: None)(there, base)
    line = refusal("finetune", *words("finetune", there / "checkpoint-2", tmp_path, data_path, base))
    assert "are others" in line


def test_an_adapter_that_learns_only_magnitudes_is_none_that_changes_nothing():
    adapter_folder.require_sound(
        {"x.lora_B.weight": torch.zeros(2, 2), "x.lora_magnitude_vector": torch.ones(2)}, "here"
    )


# --------------------------------------------------------------------------------------------------------- converting


@pytest.fixture
def old(there):
    """Return a folder as alpaca-lora left it: a pickle, and the settings of an early PEFT."""
    _pickled(there, None)
    for path in list(there.iterdir()):
        if path.is_file() and path.name not in ("adapter_model.bin", SETTINGS):
            path.unlink()
    settings = {
        "base_model_name_or_path": "decapoda-research/llama-7b-hf", "bias": "none", "enable_lora": None,
        "fan_in_fan_out": False, "inference_mode": True, "lora_alpha": 16, "lora_dropout": 0.05,
        "merge_weights": False, "modules_to_save": None, "peft_type": "LORA", "r": 8,
        "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM",
    }  # fmt: skip
    (there / SETTINGS).write_text(json.dumps(settings))
    return there


def test_an_old_adapter_becomes_one_that_peft_reads(old, adapter, tmp_path, tiny_llama):
    from peft import PeftModel

    result = run("convert_adapter", old, tmp_path / "new")
    assert result.code == 0, result.err
    assert {path.name for path in (tmp_path / "new").iterdir()} == {WEIGHTS, SETTINGS}
    one, other = load_file(tmp_path / "new" / WEIGHTS), load_file(adapter / WEIGHTS)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama)
    PeftModel.from_pretrained(base, tmp_path / "new")
    loaded = adapter_folder.load(transformers.AutoModelForCausalLM.from_pretrained(tiny_llama), tmp_path / "new")
    assert all(torch.equal(tensor, other[name]) for name, tensor in lora.state(loaded).items())
    assert not list(tmp_path.glob(".*"))


def test_old_and_new_may_be_named(old, tmp_path):
    assert run("convert_adapter", "--new", tmp_path / "new", "--old", old / "adapter_model.bin").code == 0
    assert (tmp_path / "new" / WEIGHTS).is_file()


def test_an_old_adapter_on_the_hub_is_fetched_with_its_pickle(old, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(adapter_folder, "download", lambda *words: asked.append(words) or old)
    assert run("convert_adapter", "tloen/alpaca-lora-7b", tmp_path / "new").code == 0
    assert asked == [("tloen/alpaca-lora-7b", "OLD", "adapter_model.bin")]


class _Attack:
    def __reduce__(self):
        import os

        return os.system, ("touch attacked",)


def _stored(change):
    def spoil(folder):
        state = torch.load(folder / "adapter_model.bin", weights_only=True)
        torch.save(change(state), folder / "adapter_model.bin")

    return spoil


def _merged_weights(folder):
    settings = json.loads((folder / SETTINGS).read_text())
    (folder / SETTINGS).write_text(json.dumps(settings | {"enable_lora": [True, False, True]}))


NOT_CONVERTED = {
    "code": (_stored(lambda state: state | {"x": _Attack()}), "holds no plain tensors, or is damaged; not loaded"),
    "40 TB": (_stored(lambda state: state | {"x": torch.zeros(1).expand(10**13)}), "x is larger than what the file"),
    "no tensors": (_stored(lambda state: {}), "holds no tensors; it is an empty adapter"),
    "a list": (_stored(lambda state: list(state.values())), "something else than tensors by their names"),
    "a number": (_stored(lambda state: state | {"epoch": 3}), "something else than tensors by their names"),
    "other names": (_stored(lambda state: {f"x.{name}": t for name, t in state.items()}), "not the name of a LoRA ten"),
    "half of it": (_stored(lambda state: dict(sorted(state.items())[1:])), "is missing; the adapter is not whole"),
    "another rank": (_stored(lambda state: {n: t[:4, :4] for n, t in state.items()}), "is [4, 4], and r is 8"),
    "other modules": (
        _stored(lambda state: {n.replace("v_proj", "k_proj"): t for n, t in state.items()}),
        "tensors of k_proj, q_proj, and adapter_config.json names q_proj, v_proj",
    ),
    "many names": (_stored(lambda state: {f"{n}{i}": t for n, t in state.items() for i in range(9)}), "many names"),
    "zeros left out": (_stored(lambda state: {n: t.to_sparse() for n, t in state.items()}), "is not a plain tensor"),
    "NaN": (_stored(lambda state: {n: t * float("nan") for n, t in state.items()}), "holds NaN or infinity"),
    "B zero": (_stored(lambda state: {n: t * ("lora_A" in n) for n, t in state.items()}), "the adapter changes noth"),
    "cut short": (lambda folder: written("adapter_model.bin", lambda data: data[:500])(folder, None), "is damaged"),
    "no pickle": (lambda folder: (folder / "adapter_model.bin").unlink(), "there is nothing to convert"),
    "safetensors": (lambda folder: (folder / WEIGHTS).write_bytes(b"x"), "there is nothing to convert"),
    "no settings": (lambda folder: (folder / SETTINGS).unlink(), "OLD {old}: no adapter there"),
    "settings of long ago": (_merged_weights, "enable_lora is [True, False, True], which PEFT does not know"),
}


@pytest.mark.parametrize("kind", NOT_CONVERTED)
def test_it_is_not_converted(kind, old, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spoil, said = NOT_CONVERTED[kind]
    spoil(old)
    assert said.format(old=old) in refusal("convert_adapter", old, tmp_path / "new")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}  # no new folder, and no code was run


def test_nothing_is_written_over(old, tmp_path):
    (tmp_path / "new").mkdir()
    for new in (tmp_path / "new", old):
        assert "is there already, and is not written over" in refusal("convert_adapter", old, new, code=2)
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "OLD NEW are needed, and --old is missing"),
        (["a"], "OLD NEW are needed, and --new is missing"),
        (["a", "b", "c"], "stray word 'c'"),
        (["a", "--old", "b"], "--old is given twice"),
        (["a", "b", "--force"], "unknown flag --force"),
    ],
)
def test_it_is_said_wrongly(given, said):
    assert said in refusal("convert_adapter", *given, code=2)


def test_names_of_a_later_peft_are_those_of_today(old, tmp_path, adapter):
    _stored(lambda state: {name.replace(".weight", ".default.weight"): t for name, t in state.items()})(old)
    convert_adapter(ConvertConfig(old=str(old), new=str(tmp_path / "new")))
    assert load_file(tmp_path / "new" / WEIGHTS).keys() == load_file(adapter / WEIGHTS).keys()


# ------------------------------------------------------------------------------------------------------- the skeleton


@pytest.mark.parametrize("architecture", ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "OPT", "GPT2"])
def test_a_skeleton_has_the_names_and_shapes_of_the_model(architecture, tiny_model):
    base = locate_base(str(tiny_model(architecture)))
    spec = DeviceSpec(torch.device("cpu"), torch.float32, 16)
    whole = lora.state(lora.attach(load_base(base, spec)[0], FinetuneConfig(), base))
    skeleton = meta_model(base)
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    with torch.device("meta"):
        bare = get_peft_model_state_dict(lora.attach(skeleton, FinetuneConfig(), base), save_embedding_layers=False)
    assert {name: t.shape for name, t in whole.items()} == {name: t.shape for name, t in bare.items()}


def test_a_state_that_does_not_fit_is_not_put_in(adapter, tiny_llama):
    model = adapter_folder.load(transformers.AutoModelForCausalLM.from_pretrained(tiny_llama), adapter)
    before = lora.state(model)
    with pytest.raises(AdapterError, match="is missing"):
        lora.set_state(model, dict(sorted(before.items())[1:]), "here")
    assert all(torch.equal(tensor, before[name]) for name, tensor in lora.state(model).items())
