"""Special tokens that are empty, missing, unknown or contradicted: taken from where it is plain, said, or refused."""

import json
import shutil
from pathlib import Path

import pytest
from command import error_line, run

from lora_alpaca.errors import ModelError
from lora_alpaca.models.base import locate_base
from lora_alpaca.models.tokenizer import load_tokenizer

SETTINGS, MAP = "tokenizer_config.json", "special_tokens_map.json"


def changed(path: Path, **changes):
    """Write keys into a JSON file; `...` removes one."""
    content = json.loads(path.read_text()) if path.is_file() else {}
    kept = {key: value for key, value in (content | changes).items() if value is not ...}
    path.write_text(json.dumps(kept))


@pytest.fixture
def base(tiny_model, tmp_path):
    """Return `base(architecture, settings, mapped, config, without)`: a tiny base whose files say something else."""

    def make(architecture, settings=None, mapped=None, config=None, without=()):
        folder = tmp_path / "base"
        shutil.copytree(tiny_model(architecture), folder)
        (folder / MAP).unlink(missing_ok=True)
        changed(folder / SETTINGS, added_tokens_decoder=..., **(settings or {}))
        if mapped is not None:
            (folder / MAP).write_text(json.dumps(mapped))
        for name in ("config.json", "generation_config.json"):
            changed(folder / name, **(config or {}))
        for name in without:
            (folder / name).unlink()
        return locate_base(str(folder))

    return make


LLAMA = {"tokenizer_class": "LLaMATokenizer"}
JSON, PIECES = ["tokenizer.json"], ["tokenizer.model"]
NOTHING = {"bos_token_id": ..., "eos_token_id": ..., "pad_token_id": ...}
DECAPODA = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": -1}  # as the first conversion of LLaMA said
EMPTY = {"bos_token": "", "eos_token": "", "unk_token": ""}
END = "</s>"

# what is wrong: architecture, tokenizer_config.json, special_tokens_map.json, config.json, files that are not there,
# the end token that is taken, and words of the note
MENDED = {
    "llama: the end is empty": ("Llama", LLAMA | {"eos_token": ""}, None, {}, JSON, END, "end token '' is empty"),
    "llama: all are empty": ("Llama", LLAMA | EMPTY, {}, DECAPODA, JSON, END, f"{END} of tokenizer.model is taken"),
    "llama: all are empty in the map": ("Llama", LLAMA, EMPTY, DECAPODA, JSON, END, "begin token '' is empty, <s>"),
    "llama: the end is unknown text": ("Llama", LLAMA | {"eos_token": "<unk>"}, None, {}, JSON, END, "is the unknown"),
    "llama: the end is the begin": ("Llama", {"eos_token": "<s>"}, None, {}, JSON, END, "is the begin token"),
    "llama: there is no end": ("Llama", {"eos_token": None}, None, {}, JSON, END, "the end token is missing"),
    "llama: a token of another model": ("Llama", {"eos_token": "<|end|>"}, None, {}, JSON, END, "not in the model's"),
    "llama: fast, the end is empty": ("Llama", {"eos_token": ""}, None, {}, PIECES, END, f"{END} of config.json"),
    "llama: two files, two ends": ("Llama", {}, {"eos_token": "<s>"}, {}, JSON, END, "another one in tokenizer_co"),
    "llama: the begin is unknown text": ("Llama", {"bos_token": "<unk>"}, None, {}, JSON, END, "begin token '<unk>'"),
    "gemma: the end is the padding": ("Gemma", {"eos_token": "<pad>"}, None, {}, JSON, "<eos>", "is the padding token"),
    "opt: the end is the padding": ("OPT", {"eos_token": "<pad>"}, None, {}, [], END, f"{END} of config.json"),
    "opt: all are empty": ("OPT", EMPTY | {"pad_token": ""}, None, {}, [], END, f"{END} of config.json"),
    "bloom: the end is empty": ("OPT", {"eos_token": "", "bos_token": None}, {"eos_token": ""}, {}, [], END, "empty"),
    "neox: LLaMA's names on it": (
        "GPT2", {"eos_token": END, "bos_token": "<s>", "unk_token": "<unk>"}, None, {}, [], "<|endoftext|>",
        "end token '</s>' is not in the model's",
    ),
    "neox: there is no end": ("GPT2", {"eos_token": None}, None, {}, [], "<|endoftext|>", "is missing"),
    "qwen: padding by config.json": (
        "Qwen2", {"eos_token": "<|endoftext|>"}, None, {}, [], "<|im_end|>", "is the padding token"
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", MENDED)
def test_what_is_plain_is_taken_and_said(kind, base):
    architecture, settings, mapped, config, without, end, note = MENDED[kind]
    tokenizer, notes = load_tokenizer(base(architecture, settings, mapped, config, without))
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == (end, tokenizer.get_vocab()[end])
    assert any(note in line for line in notes), notes
    assert all(line.count("\n") == 0 and str(Path.cwd().anchor) + "tmp" not in line for line in notes)
    assert "" not in tokenizer.get_vocab()


@pytest.mark.parametrize("kind", [kind for kind in MENDED if kind.startswith("llama")])
def test_a_llama_encodes_as_it_should(kind, base, tiny_llama):
    """The ids are those of the sound tokenizer, its begin token included."""
    architecture, settings, mapped, config, without, *_ = MENDED[kind]
    tokenizer, _ = load_tokenizer(base(architecture, settings, mapped, config, without))
    sound, notes = load_tokenizer(locate_base(str(tiny_llama)))
    assert notes == []
    for text in ("", "Where does the alpaca live?", " a\n b", "No </s> here"):
        assert tokenizer(text)["input_ids"] == sound(text)["input_ids"]
    assert len(tokenizer) == len(sound)


def test_a_llama_that_does_not_say_so_begins_its_texts(base, tiny_llama):
    made = base("Llama", LLAMA | {"add_bos_token": ...}, None, {}, JSON)
    tokenizer, notes = load_tokenizer(made)
    sound, _ = load_tokenizer(locate_base(str(tiny_llama)))
    assert tokenizer("Hi")["input_ids"] == sound("Hi")["input_ids"]
    assert "begins with the begin token" in notes[0]


@pytest.mark.parametrize("kind", ["YiTokenizer", "PreTrainedTokenizerFast", "GPT2Tokenizer", "GemmaTokenizer"])
def test_text_is_read_as_the_sentencepiece_model_reads_it(kind, base, tiny_model):
    """Whatever class a file names: transformers makes one of its own of it, which forgets the space before a text."""
    made = base("Mistral", {"tokenizer_class": kind, "add_bos_token": True}, None, {}, JSON)
    tokenizer, notes = load_tokenizer(made)
    sound, _ = load_tokenizer(locate_base(str(tiny_model("Mistral"))))
    for text in ("Where does the owl live?", "hot\n a b"):
        assert tokenizer(text)["input_ids"] == sound(text)["input_ids"]
    assert "tokenizer: it is read as LLaMA's, whose way with text is that of its tokenizer.model" in notes


def test_a_mistral_without_a_class_is_read_as_llamas(base, tiny_model):
    tokenizer, notes = load_tokenizer(base("Mistral", {"tokenizer_class": ..., "add_bos_token": True}, None, {}, JSON))
    sound, _ = load_tokenizer(locate_base(str(tiny_model("Mistral"))))
    assert (tokenizer("hot")["input_ids"], notes) == (sound("hot")["input_ids"], [])


def test_a_tokenizer_that_no_class_reads_right_is_warned_of(base, monkeypatch):
    monkeypatch.setattr("lora_alpaca.models.special_tokens.reads_as", lambda *_: False)
    _, notes = load_tokenizer(base("Mistral", {"tokenizer_class": "YiTokenizer"}, None, {}, JSON))
    assert "warning: the tokenizer reads text otherwise than its tokenizer.model" in notes[0]


SOUND = {
    "gpt2: one token for all": ("GPT2", {"pad_token": "<|endoftext|>"}, None, {}, "<|endoftext|>"),
    "gpt2: its model does not say": ("GPT2", {"pad_token": "<|endoftext|>"}, None, NOTHING, "<|endoftext|>"),
    "opt: the unknown token is the end": ("OPT", {}, None, {}, END),
    "llama: the padding is the end": ("Llama", {"pad_token": END}, None, {"pad_token_id": 2}, END),
    "llama: alpaca's own": ("Llama", {"bos_token": END, "unk_token": END}, None, {}, END),
    "qwen: the model's end is another": ("Qwen2", {}, None, {"eos_token_id": [0, 1]}, "<|im_end|>"),
}


@pytest.mark.parametrize("kind", SOUND)
def test_what_is_meant_so_is_left(kind, base):
    *made, end = SOUND[kind]
    tokenizer, notes = load_tokenizer(base(*made))
    assert (tokenizer.eos_token, notes) == (end, [])


REFUSED = {
    "nothing says": ("Llama", {"eos_token": "<unk>"}, None, NOTHING, PIECES, "end token '<unk>' is the unknown token"),
    "empty": ("Llama", {"eos_token": ""}, None, NOTHING, PIECES, "end token '' is empty"),
    "the first conversion": ("Llama", {"eos_token": ""}, None, DECAPODA, PIECES, "end token '' is empty"),
    "padding": ("OPT", {"eos_token": "<pad>"}, None, NOTHING, [], "end token '<pad>' is the padding token"),
    "padding, said twice": ("OPT", {"eos_token": "<pad>"}, None, {"eos_token_id": 1}, [], "is the padding token"),
    "of another model": ("GPT2", {"eos_token": "<|im_end|>"}, None, NOTHING, [], "not in the model's vocabulary"),
    "two of them": ("Llama", {}, {"eos_token": "<s>"}, NOTHING, PIECES, "another one in tokenizer_config.json and in"),
    "one of several": ("GPT2", {"eos_token": ""}, None, {"eos_token_id": [0, 5]}, [], "end token '' is empty"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_plain_is_refused(kind, base):
    *made, line = REFUSED[kind]
    made = base(*made)
    with pytest.raises(ModelError) as raised:
        load_tokenizer(made)
    assert line in str(raised.value)
    assert "name it as eos_token in tokenizer_config.json" in str(raised.value)


# ----------------------------------------------------------------------------------------------------- whole commands


def row(tmp_path, **changes):
    path = tmp_path / "rows.json"
    content = {"instruction": "Greet the owl.", "input": "", "output": "Good evening!"} | changes
    path.write_text(json.dumps([content] * 4))
    return path


def words(base, data, tmp_path, *more):
    options = {
        "base_model": base.path, "data_path": data, "output_dir": tmp_path / "out", "max_steps": 1, "batch_size": 2,
        "val_set_size": 0, "load_8bit": False, "dtype": "fp32",
    }  # fmt: skip
    return [word for name, value in options.items() for word in (f"--{name}", value)] + list(more)


def test_a_run_says_and_records_what_is_taken(base, tmp_path):
    made = base("Llama", LLAMA | EMPTY, {}, DECAPODA, JSON)
    result = run("finetune", *words(made, row(tmp_path), tmp_path))
    assert result.code == 0, result.err
    lines = [line for line in result.out.splitlines() if line.startswith("tokenizer: ")]
    record = json.loads((tmp_path / "out" / "lora_alpaca.json").read_text())
    assert record["tokenizer_notes"] == lines
    assert "the end token '' is empty, </s> of tokenizer.model is taken" in lines[-1]
    assert json.loads((tmp_path / "out" / SETTINGS).read_text())["eos_token"] == END
    shown = run("generate", "--lora_weights", tmp_path / "out", "--instruction", "Hi.", "--max_new_tokens", 2)
    assert (shown.code, "tokenizer:" in shown.err) == (0, False)


def test_a_run_without_an_end_token_is_refused(base, tmp_path):
    made = base("OPT", {"eos_token": "<pad>"}, None, NOTHING)
    line = error_line(run("finetune", *words(made, row(tmp_path), tmp_path)), 1)
    assert "end token '<pad>'" in line
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------------- tokens that the model lacks


@pytest.fixture
def surplus(tiny_llama, tmp_path):
    """Return a base whose tokenizer has a padding token and a word more than its model."""
    import transformers

    folder = tmp_path / "base"
    shutil.copytree(tiny_llama, folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.add_tokens(["alpaquita"])
    tokenizer.save_pretrained(folder)
    return locate_base(str(folder))


def test_surplus_tokens_that_no_row_uses_are_no_error(surplus, tmp_path):
    tokenizer, (note,) = load_tokenizer(surplus)
    first = surplus.vocabulary
    assert note.startswith("tokenizer: it has 2 tokens that the model lacks ('[PAD]', id ")
    assert tokenizer.get_vocab()["[PAD]"] == first and tokenizer.pad_token_id < first
    result = run("finetune", *words(surplus, row(tmp_path, output="This is [PAD], as text."), tmp_path))
    assert result.code == 0, result.err
    assert result.out.count(note) == 1
    said = ["--lora_weights", tmp_path / "out", "--max_new_tokens", 2]
    assert run("generate", *said, "--instruction", "Hi [PAD].").code == 0
    line = error_line(run("generate", *said, "--instruction", "Hi alpaquita."), 2)
    assert "the prompt: 'alpaquita'" in line


def test_a_row_that_uses_a_surplus_token_is_an_error(surplus, tmp_path):
    data = row(tmp_path, output="An alpaquita!")
    line = error_line(run("finetune", *words(surplus, data, tmp_path)), 2)
    assert f"rows.json:1: 'alpaquita' (id {surplus.vocabulary + 1}) is a token of the tokenizer" in line
    assert "'alpaquita'" in error_line(run("show", "--base_model", surplus.path, "--data_path", data), 2)


def test_a_template_that_uses_a_surplus_token_is_an_error(surplus, tmp_path):
    changed(Path(surplus.path) / SETTINGS, chat_template="{% for m in messages %}[PAD]{{ m.content }}</s>{% endfor %}")
    line = error_line(run("finetune", *words(surplus, row(tmp_path), tmp_path, "--prompt_template_name", "chat")), 2)
    assert "'[PAD]' (id " in line
