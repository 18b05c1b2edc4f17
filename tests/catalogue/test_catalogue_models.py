"""The catalogue of bad inputs, folders of models, adapters, runs and exports (D and F).

The whole command line runs, in this process; every folder is a copy of a good one that was damaged.
"""

import json
import os
import shutil
import socket

import pytest
import torch
import transformers
from command import run
from conftest import as_row
from entries import ASK, SHORT, cases, entry, line_of
from safetensors.torch import load_file, save_file

from lora_alpaca.artifacts import checkpoint
from lora_alpaca.storage.output_folder import OutputFolder

pytestmark = pytest.mark.usefixtures("here")  # an empty folder, where nothing may be written and no model loaded


def without(*patterns):
    """Return a kind of damage: files missing from a model's folder."""

    def change(folder):
        for pattern in patterns:
            for path in folder.glob(pattern):
                path.unlink()

    return change


def bytes_of(name, change):
    """Return a kind of damage: the bytes of a file changed."""
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def described(**changes):
    """Return a kind of damage: a config.json that says something else."""

    def change(folder):
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(content | changes))

    return change


def in_shards(folder):
    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")


def a_broken_index(folder):
    in_shards(folder)
    (folder / "model.safetensors.index.json").write_text("{")


def a_shard_missing(folder):
    in_shards(folder)
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def as_a_pickle(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def of_class(name, **sizes):
    def change(folder):
        (folder / "config.json").write_text(getattr(transformers, name)(**sizes).to_json_string())

    return change


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
NO_WRITER = "does not write on from a text; name a causal language model, such as a Llama, Mistral, Qwen or GPT"
BAD_BASES = [
    (
        "F107",
        without("tokenizer*"),
        "the tokenizer of {base}: tokenizer.json is missing, and so are tokenizer.model",
    ),
    (
        "F107",
        without("tokenizer.json", "tokenizer.model"),
        "the tokenizer of {base}: tokenizer.json is missing, and so",
    ),
    ("F108", without("model.safetensors"), "{base} holds no weights (model.safetensors is missing)"),
    (
        "F108",
        lambda folder: (folder / "model.safetensors").rename(folder / "consolidated.00.pth"),
        "{base} holds consolidated.00.pth, which is not read, and no model.safetensors; name the same model in safet",
    ),
    ("F108", bytes_of("model.safetensors", lambda data: b""), "{base}/model.safetensors is empty (0 bytes)"),
    ("F108", bytes_of("model.safetensors", lambda data: POINTER), "{base}/model.safetensors is a git-LFS pointer, not"),
    ("F108", bytes_of("model.safetensors", lambda data: data[:-9]), "{base}/model.safetensors cannot be read ("),
    ("F108", bytes_of("model.safetensors", lambda data: b"\xff" * 99), "{base}/model.safetensors cannot be read ("),
    ("F108", a_shard_missing, "model-00002-of-"),
    (
        "F108",
        lambda folder: (in_shards(folder), (folder / "model.safetensors.index.json").write_text("{")),
        "index.json",
    ),
    ("F110", of_class("BertConfig"), f"a bert model {NO_WRITER}"),
    ("F110", of_class("T5Config"), f"a t5 model {NO_WRITER}"),
    ("F110", of_class("ViTConfig"), f"a vit model {NO_WRITER}"),
    ("F110", described(model_type="zork"), "model type `zork` but Transformers does not recognize this architecture"),
    ("F110", described(num_hidden_layers="two"), "Field 'num_hidden_layers' expected int, got str (value: 'two')"),
    ("F110", bytes_of("config.json", lambda data: data[:20]), "{base}/config.json: cannot be read (Expecting"),
    (
        "F114",
        as_a_pickle,
        "{base} holds pytorch_model.bin, a pickle, which is not loaded, and no model.safetensors",
    ),
]


@cases(BAD_BASES, "change, said")
def test_a_bad_base_is_refused(change, said, here, tiny_llama, data_path):
    base = shutil.copytree(tiny_llama, here / "base")
    change(base)
    training = ("--base_model", base, "--data_path", data_path, *SHORT)
    for verb, words in {
        "finetune": training,
        "generate": ("--base_model", base, "--prompt_template", "alpaca", *ASK),
    }.items():
        assert said.format(base=base) in line_of(verb, *words, code=1)


HALF_LOADED = [
    ("F108", lambda state: dict(sorted(state.items())[:-2]), "is missing or of another shape (2 in all)"),
    ("F110", lambda state: state | {"model.norm.weight": torch.ones(7)}, "is missing or of another shape (1 in all)"),
]


@cases(HALF_LOADED, "change, said")
def test_a_base_whose_files_do_not_hold_all_of_it(change, said, here, tiny_llama, data_path, model_loads):
    base = shutil.copytree(tiny_llama, here / "base")
    save_file(change(load_file(base / "model.safetensors")), base / "model.safetensors", metadata={"format": "pt"})
    line = line_of("finetune", "--base_model", base, "--data_path", data_path, *SHORT, code=1)
    assert said in line


@entry("F108")
def test_weights_without_a_place_in_the_model_are_told(number, here, tiny_llama, model_loads):
    base = shutil.copytree(tiny_llama, here / "base")
    state = load_file(base / "model.safetensors") | {"model.layers.9.mlp.gate_proj.weight": torch.ones(7)}
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    result = run("generate", "--base_model", base, "--prompt_template", "alpaca", *ASK)
    assert result.code == 0, result.err
    line = "1 weights of its files have no place in the model, such as model.layers.9.mlp.gate_proj.weight"
    assert f"warning: --base_model {base}: {line}" in result.err.splitlines()
    assert "LOAD REPORT" not in result.err


@pytest.fixture(scope="module")
def trained(tiny_llama, rows, tmp_path_factory):
    """Return the folder of an adapter that was trained for three steps, with two checkpoints in it."""
    folder = tmp_path_factory.mktemp("trained")
    path = folder / "rows.json"
    path.write_text(json.dumps([as_row(conversation) for conversation in rows]))
    result = run("finetune", *training(tiny_llama, path), "--output_dir", folder / "out")
    assert result.code == 0, result.err
    return folder / "out"


def training(base, rows):
    """Return the words of a short run with two checkpoints."""
    return ("--base_model", base, "--data_path", rows, *SHORT[2:], "--max_steps", 3, "--save_steps", 1)


@pytest.fixture
def adapter(trained, here):
    """Return a copy of the adapter, to be damaged."""
    return shutil.copytree(trained, here / "adapter")


@pytest.fixture
def begun(trained, adapter, tiny_llama):
    """Return a run that was killed after its second checkpoint, and the words that it was begun with."""
    record = json.loads((adapter / "lora_alpaca.json").read_text())
    (adapter / "lora_alpaca.json").write_text(json.dumps(record | {"status": "running"}))
    return adapter, (*training(tiny_llama, trained.parent / "rows.json"), "--output_dir", adapter)


@entry("C78")
def test_going_on_with_other_options(number, begun):
    _, words = begun
    line = line_of("finetune", *words, "--resume", "--learning_rate", "1e-5", "--lora_dropout", "0.2", code=1)
    assert "learning_rate was 0.0003 and is 1e-05; lora_dropout was 0.05 and is 0.2" in line
    assert "allow the change with --allow_change learning_rate,lora_dropout" in line


@entry("D86")
def test_a_disk_that_is_too_small_for_the_run(number, tiny_llama, data_path, model_loads, monkeypatch):
    class Full:
        free = 10_000

    monkeypatch.setattr("shutil.disk_usage", lambda path: Full)
    words = ("--base_model", tiny_llama, "--data_path", data_path, *SHORT, "--output_dir", "out")
    line = line_of("finetune", *words)
    assert "--output_dir out: the run writes about 0 MB and the disk has 0 MB left; free some, lower --save_to" in line


@entry("D88")
@pytest.mark.parametrize("verb", ["finetune", "export"])
def test_a_folder_that_must_not_be_written_to(number, verb, adapter, tiny_llama, data_path, monkeypatch, here):
    monkeypatch.setattr("os.access", lambda path, mode: False)  # for a superuser there is none
    training = ("--base_model", tiny_llama, "--data_path", data_path, *SHORT)
    words = training if verb == "finetune" else ("--lora_weights", adapter)
    line = line_of(verb, *words, "--output_dir", "new/out")
    assert line == f"error: --output_dir new/out: {here} is not writable; name another folder"


@entry("D90")
def test_a_folder_with_the_checkpoints_of_another_run(number, begun, here, tiny_llama, data_path):
    folder, words = begun
    line = line_of("finetune", *words)
    assert f"--output_dir {folder} holds an unfinished run; go on with --resume, or start anew with --overwrite" in line
    (here / "theirs" / "checkpoint-1000").mkdir(parents=True)
    (here / "theirs" / "checkpoint-1000" / "trainer_state.json").write_text("{}")
    for way in ((), ("--overwrite",), ("--resume",)):
        words = ("--base_model", tiny_llama, "--data_path", data_path, *SHORT, "--output_dir", "theirs", *way)
        line = line_of("finetune", *words)
        assert "is not empty and was not made by lora_alpaca; name another folder" in line


@entry("D91")
@pytest.mark.parametrize("way", ["--resume", "--overwrite"])
def test_a_folder_that_another_run_is_at_work_in(number, way, begun, model_loads):
    folder, words = begun
    with OutputFolder(folder).locked():
        line = line_of("finetune", *words, way)
    assert f"--output_dir {folder}: " in line
    assert f"process {os.getpid()} on {socket.gethostname()}" in line


@entry("D95")
def test_checkpoints_are_ordered_by_their_steps_not_by_the_clock(number, begun):
    folder, _ = begun
    os.utime(folder / "checkpoint-2", (0, 0))
    assert checkpoint.newest(folder)[0] == folder / "checkpoint-2"
    checkpoint.rotate(folder, json.loads((folder / "lora_alpaca.json").read_text())["run"], keep=1)
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"]


def loads(adapter, data_path):
    """Return the words of each command that loads an adapter."""
    return {
        "finetune": ("--init_adapter", adapter, "--data_path", data_path, "--load_8bit", "False"),
        "generate": ("--lora_weights", adapter, *ASK),
        "export": ("--lora_weights", adapter),
    }


@entry("F109")
def test_a_bit_turned_in_an_adapter_or_in_its_base(number, adapter, data_path, here, tiny_llama):
    turn = bytes_of("adapter_model.safetensors", lambda data: data[:-4] + bytes([data[-4] ^ 1]) + data[-3:])
    base = shutil.copytree(tiny_llama, here / "base")
    bytes_of("model.safetensors", lambda data: data[:-4] + bytes([data[-4] ^ 1]) + data[-3:])(base)
    for verb, words in loads(adapter, data_path).items():
        line = line_of(verb, *words, "--base_model", base, code=1)
        assert f"was trained on {tiny_llama}, and the weights of {base} are others" in line
    turn(adapter)
    for verb, words in loads(adapter, data_path).items():
        line = line_of(verb, *words, "--base_model", tiny_llama, code=1)
        assert "adapter_model.safetensors: not as it was saved (its sha256 is another); copy it again" in line


@entry("F109")
def test_a_bit_turned_in_a_merged_model(number, adapter, data_path, here, model_loads):
    assert run("export", "--lora_weights", adapter, "--output_dir", "merged").code == 0
    commands = {"generate": ASK, "finetune": ("--data_path", data_path, *SHORT)}
    assert run("generate", "--base_model", "./merged", *ASK).code == 0
    bytes_of("model.safetensors", lambda data: data[:-4] + bytes([data[-4] ^ 1]) + data[-3:])(here / "merged")
    for verb, words in commands.items():
        line = line_of(verb, "--base_model", "./merged", *words, code=1)
        assert "model.safetensors is not as it was exported (its sha256 is another); export it again" in line


@entry("F111")
def test_an_adapter_given_as_a_base_and_a_base_as_an_adapter(number, adapter, data_path, tiny_llama):
    for folder in (adapter, next(adapter.glob("checkpoint-*"))):
        line = line_of("finetune", "--base_model", folder, "--data_path", data_path, code=1)
        assert line.startswith(f"error: --base_model {folder}: an adapter, not a base model")
        line = line_of("generate", "--base_model", folder, "--lora_weights", "none", *ASK, code=1)
        assert line.startswith(f"error: --base_model {folder}: an adapter, not a base model")
    for verb, words in loads(tiny_llama, data_path).items():
        line = line_of(verb, *words, "--base_model", tiny_llama, code=1)
        assert f"{tiny_llama}: no adapter there (it is a model; name it with --base_model)" in line


@entry("F111")
def test_a_checkpoint_given_as_an_adapter_is_one_if_it_is_whole(number, adapter, data_path, tiny_llama, model_loads):
    checkpoint = next(adapter.glob("checkpoint-*"))
    words = ("--lora_weights", checkpoint, "--prompt_template", "alpaca", *ASK)
    assert run("generate", *words).code == 0
    bytes_of("optimizer.safetensors", lambda data: data[:-1])(checkpoint)
    assert "optimizer.safetensors is " in line_of("generate", *words, code=1)


OTHER_BASES = [
    ("F112", "layers", {"num_hidden_layers": 1}, "wrong base model?"),
    ("F112", "width", {"hidden_size": 32}, "the base model needs [8, 32]"),
    ("F112", "vocabulary", {"vocab_size": 999}, "are others; name that base"),
    ("F112", "weights", {}, "are others; name that base"),
]


@cases(OTHER_BASES, "kind, changes, said")
def test_an_adapter_for_another_base(kind, changes, said, adapter, data_path, here, tiny_llama):
    other = shutil.copytree(tiny_llama, here / "other")
    settings = transformers.AutoConfig.from_pretrained(other)
    settings.update(changes)
    transformers.AutoModelForCausalLM.from_config(settings).save_pretrained(other)
    for verb, words in loads(adapter, data_path).items():
        line = line_of(verb, *words, "--base_model", other, code=1)
        assert said in line
        assert str(tiny_llama) in line
        assert str(other) in line


def adapter_state(change):
    """Return a kind of damage: an adapter without a record whose tensors are changed."""

    def damage(folder):
        path = folder / "adapter_model.safetensors"
        save_file(change(load_file(path)), path)
        (folder / "lora_alpaca.json").unlink()

    return damage


def adapter_pickle(folder):
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


BAD_ADAPTERS = [
    ("F113", adapter_state(lambda state: {n: t * float("nan") for n, t in state.items()}), "holds NaN or infinity"),
    ("F113", adapter_state(lambda state: {n: t / 0 for n, t in state.items()}), "holds NaN or infinity"),
    ("F113", adapter_state(lambda state: {}), "holds no tensors; it is an empty adapter"),
    ("F113", adapter_state(lambda state: {n: t * ("lora_A" in n) for n, t in state.items()}), "changes nothing (every"),
    ("F114", adapter_pickle, "a pickle, which is not loaded: lora-alpaca convert_adapter {adapter} NEW"),
]


@cases(BAD_ADAPTERS, "damage, said")
def test_a_bad_adapter_is_refused(damage, said, adapter, data_path, tiny_llama):
    damage(adapter)
    for verb, words in loads(adapter, data_path).items():
        assert said.format(adapter=adapter) in line_of(verb, *words, "--base_model", tiny_llama, code=1)


@entry("F115")
def test_an_export_onto_something_else_or_onto_what_it_is_made_from(number, adapter, here, tiny_llama, monkeypatch):
    (here / "out").mkdir()
    (here / "out" / "thesis.tex").write_text("mine")
    words = ("--lora_weights", adapter)
    line = line_of("export", *words, "--output_dir", "out", "--overwrite")
    assert "is not empty and was not made by lora_alpaca; name another folder" in line
    line = line_of("export", *words, "--output_dir", adapter, "--overwrite")
    assert line == f"error: --output_dir {adapter} is the folder of --lora_weights; name another folder"
    base = shutil.copytree(tiny_llama, here / "base")
    (base / "lora_alpaca.json").write_text('{"status": "finished", "files": []}')  # an earlier export, as a base
    line = line_of("export", *words, "--output_dir", base, "--base_model", base)
    assert line == f"error: --output_dir {base} is the folder of --base_model; name another folder"


@entry("F115")
def test_an_export_onto_a_disk_that_is_too_small(number, adapter, monkeypatch):
    class Full:
        free = 10_000

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Full)
    line = line_of("export", "--lora_weights", adapter, "--output_dir", "out")
    assert line.startswith("error: --output_dir out: the merged model, as hf, takes 0.001 GB, and 0.000 GB are free")


@entry("F116")
def test_a_quantised_base_is_not_merged_into(number, adapter, here, tiny_llama):
    base = shutil.copytree(tiny_llama, here / "base")
    described(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})(base)
    line = line_of("export", "--lora_weights", adapter, "--base_model", base, code=1)
    assert "is stored quantised (4-bit (FP4)), and merging needs full precision: name the model that it was" in line
