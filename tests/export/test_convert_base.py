"""A base that exists as pickles only becomes one of safetensors: the same bits, tied tensors once, no code run."""

import json
import shutil

import pytest
import torch
import transformers
from command import error_line, run
from safetensors.torch import load_file

PICKLE, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


def weights(folder):
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def shard(folder, state, files=3):
    """Save a state in several pickles with an index, as transformers did."""
    names = sorted(state)
    placed = {name: f"pytorch_model-{number % files + 1:05}-of-{files:05}.bin" for number, name in enumerate(names)}
    for file in set(placed.values()):
        torch.save({name: state[name] for name in names if placed[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": placed}))


@pytest.fixture
def old(tiny_model, tmp_path):
    """Return `old(architecture, save, **config)`: a base whose weights are pickles, and the state that they hold."""

    def make(architecture="Llama", save=None, **config):
        folder = shutil.copytree(tiny_model(architecture), tmp_path / "old")
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, **config)
        if config:
            model.config.save_pretrained(folder)
        state = model.state_dict()
        for path in folder.glob("*.safetensors"):
            path.unlink()
        save(folder, state) if save else torch.save(state, folder / PICKLE)
        (folder / "modeling_llama.py").write_text("raise SystemExit('run')\n")
        (folder / "training_args.bin").write_bytes(b"a pickle")
        return folder, state

    return make


def same_bits(one, other):
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.contiguous().view(torch.uint8))


SAVED = {
    "one file": None,
    "three files": shard,
    "one file with an index": lambda folder, state: shard(folder, state, files=1),
    "a format of old": lambda folder, state: torch.save(state, folder / PICKLE, _use_new_zipfile_serialization=False),
    "parameters": lambda folder, state: torch.save(
        {name: torch.nn.Parameter(tensor) for name, tensor in state.items()}, folder / PICKLE
    ),
    "views of one memory": lambda folder, state: torch.save(
        {name: torch.stack([tensor, tensor])[1] for name, tensor in state.items()}, folder / PICKLE
    ),
    "transposed": lambda folder, state: torch.save(
        {name: tensor.t().contiguous().t() if tensor.ndim == 2 else tensor for name, tensor in state.items()},
        folder / PICKLE,
    ),
}


@pytest.mark.parametrize("kind", SAVED)
def test_the_bits_are_the_same(kind, old, tmp_path):
    folder, state = old("Llama", SAVED[kind])
    result = run("convert_base", folder, tmp_path / "new")
    assert result.code == 0, result.err
    found = weights(tmp_path / "new")
    assert found.keys() == state.keys()
    assert all(same_bits(found[name], state[name]) for name in state)
    assert "not copied: training_args.bin" in result.out
    copied = {path.name for path in (tmp_path / "new").iterdir()} - {"model.safetensors.index.json"}
    kept = {path.name for path in folder.iterdir() if path.suffix != ".bin"} - {INDEX}
    assert {name for name in copied if not name.endswith(".safetensors")} == kept
    assert (len(list((tmp_path / "new").glob("*.safetensors"))) == 3) == (kind == "three files")
    assert not list(tmp_path.glob(".*"))


def test_bf16_and_what_is_not_a_number_are_kept(old, tmp_path):
    def spoil(folder, state):
        state["lm_head.weight"][0, 0] = float("nan")
        torch.save(state, folder / PICKLE)

    folder, state = old("Llama", spoil, dtype=torch.bfloat16)
    assert run("convert_base", folder, tmp_path / "new").code == 0
    found = weights(tmp_path / "new")
    assert all(same_bits(found[name], state[name]) for name in state)


@pytest.mark.parametrize("save", [None, shard], ids=["one file", "three files"])
@pytest.mark.parametrize("architecture", ["OPT", "GPT2", "Gemma"])
def test_what_the_model_ties_is_written_once(architecture, save, old, tmp_path):
    folder, state = old(architecture, save)
    result = run("convert_base", folder, tmp_path / "new")
    assert result.code == 0, result.err
    model, found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new", output_loading_info=True)
    assert (found["missing_keys"], found["unexpected_keys"]) == (set(), set())
    assert all(same_bits(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    if save is None:
        assert state.keys() - weights(tmp_path / "new").keys() == {"lm_head.weight"}
        assert "1 tied to another are left to it" in result.out


def test_what_the_model_does_not_tie_is_written_twice(old, tmp_path):
    def share(folder, state):
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
        torch.save(state, folder / PICKLE)

    folder, state = old("Llama", share)
    assert run("convert_base", folder, tmp_path / "new").code == 0
    assert weights(tmp_path / "new").keys() == state.keys()


def test_the_refusal_names_the_command_and_the_new_base_trains(old, tmp_path, data_path):
    folder, _ = old("Llama", shard)
    asked = ["--data_path", data_path, "--max_steps", 1, "--load_8bit", "False", "--output_dir", tmp_path / "out"]
    line = error_line(run("finetune", "--base_model", folder, *asked), 1)
    assert f"convert it, tensors only: lora-alpaca convert_base {folder} NEW" in line
    assert run("convert_base", "--new", tmp_path / "new", "--old", folder).code == 0
    result = run("finetune", "--base_model", tmp_path / "new", *asked)
    assert result.code == 0, result.err


class _Attack:
    def __reduce__(self):
        import os

        return os.system, ("touch attacked",)


def saved(change):
    return lambda folder, state: torch.save(change(state), folder / PICKLE)


def indexed(**changes):
    def save(folder, state):
        shard(folder, state)
        index = json.loads((folder / INDEX).read_text())
        (folder / INDEX).write_text(json.dumps(index | {"weight_map": index["weight_map"] | changes}))

    return save


def without(name):
    def save(folder, state):
        shard(folder, state)
        (folder / name).unlink()

    return save


NOT_CONVERTED = {
    "code": (saved(lambda state: state | {"x": _Attack()}), "holds no plain tensors, or is damaged; not loaded"),
    "a list": (saved(lambda state: list(state.values())), "something else than tensors by their names"),
    "a number": (saved(lambda state: state | {"epoch": 3}), "something else than tensors by their names"),
    "a module": (saved(lambda state: torch.nn.Linear(2, 2)), "holds no plain tensors, or is damaged"),
    "40 TB": (saved(lambda state: state | {"x": torch.zeros(1).expand(10**13)}), "x is larger than what the file"),
    "sparse": (saved(lambda state: state | {"x": torch.eye(3).to_sparse()}), "x is not a plain tensor"),
    "cut short": (lambda folder, state: (folder / PICKLE).write_bytes(b"PK\3\4 half of it"), "or is damaged"),
    "safetensors": (lambda folder, state: (folder / "model.safetensors").write_bytes(b"x"), "nothing to convert"),
    "nothing": (lambda folder, state: None, "pytorch_model.bin is missing; there is nothing to convert"),
    "a file is missing": (without("pytorch_model-00002-of-00003.bin"), "00002-of-00003.bin is missing"),
    "a tensor is missing": (indexed(x="pytorch_model-00001-of-00003.bin"), "no file has x, which pytorch_model.bin"),
    "a file elsewhere": (indexed(x="../../other.bin"), "names '../../other.bin', which is no file of weights"),
    "an index of nothing": (lambda folder, state: (folder / INDEX).write_text("[]"), "does not say which file has"),
}


@pytest.mark.parametrize("kind", NOT_CONVERTED)
def test_it_is_not_converted(kind, old, tmp_path, monkeypatch):
    save, said = NOT_CONVERTED[kind]
    folder, _ = old("Llama", save)
    monkeypatch.chdir(tmp_path)
    line = error_line(run("convert_base", folder, tmp_path / "new"), 1)
    assert said in line
    assert {path.name for path in tmp_path.iterdir()} == {"old"}  # no new folder, and no code was run


def test_a_folder_that_is_no_base(tmp_path):
    (tmp_path / "old").mkdir()
    assert "OLD " in error_line(run("convert_base", tmp_path / "old", tmp_path / "new"), 1)
    assert "no such folder" in error_line(run("convert_base", tmp_path / "none", tmp_path / "new"), 1)


def test_nothing_is_written_over(old, tmp_path):
    folder, _ = old()
    (tmp_path / "new").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for new in (tmp_path / "new", folder, tmp_path / "link"):
        assert "is there already, and is not written over" in error_line(run("convert_base", folder, new), 2)


def test_a_full_disk_is_told_before_anything_is_written(old, tmp_path, monkeypatch):
    folder, _ = old()
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10, 5, 5))
    assert "are free on that disk" in error_line(run("convert_base", folder, tmp_path / "new"), 2)


@pytest.mark.parametrize("given", [["a"], [], ["a", "b", "c"], ["a", "b", "--overwrite"]])
def test_it_is_said_wrongly(given):
    assert error_line(run("convert_base", *given), 2)
