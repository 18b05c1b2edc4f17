"""The files of a tokenizer as they go out: the base's bytes where nothing is changed, and read alike by everybody."""

import json
import shutil

import pytest
import transformers
from tokenizers import Tokenizer

from lora_alpaca.artifacts import chat_template, prompt_contract, tokenizer_files
from lora_alpaca.data.encoding import Encoder
from lora_alpaca.models.base import locate_base
from lora_alpaca.models.tokenizer import load_tokenizer
from lora_alpaca.prompts import Conversation, load_template
from lora_alpaca.prompts.jinja import chat_messages

CHAT = "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>{% endfor %}<s>"


def content(path):
    return json.loads(path.read_text())


def changed(path, **keys):
    """Change keys of a file of JSON; None takes a key away."""
    found = (content(path) if path.exists() else {}) | keys
    path.write_text(json.dumps({key: value for key, value in found.items() if value is not None}))


@pytest.fixture
def base(tiny_model, tmp_path):
    """Return `base(architecture)`: a copy of a tiny model, to be changed."""

    def copy(architecture):
        folder = tmp_path / "base"
        shutil.copytree(tiny_model(architecture), folder)
        return folder

    return copy


@pytest.fixture
def written(tmp_path):
    """Return `written(folder, own)`: where the files of the tokenizer of a base, or the adapter's own, went."""

    def write(folder, own=None, template="alpaca"):
        found = locate_base(str(folder))
        tokenizer, _ = load_tokenizer(found, own, trained=own is not None)
        out = tmp_path / "out"
        out.mkdir()
        assert tokenizer_files.write(out, found, tokenizer, load_template(template).bound(tokenizer), own) == []
        assert not [path for path in out.iterdir() if path.is_dir()]
        again, _ = load_tokenizer(found, out, trained=True)
        contracts = [prompt_contract.build(each, load_template("plain"), []) for each in (tokenizer, again)]
        one, other = (contract["tokenizer"] | {"class": ""} for contract in contracts)
        assert one == other
        return out, tokenizer

    return write


def as_transformers_4_wrote_it(folder, tokenizer_class="PreTrainedTokenizerFast", **more):
    """Let a base have the tokenizer_config.json of transformers 4, which is read by its own names alone."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    decoder = {str(n): token.__getstate__() for n, token in tokenizer.added_tokens_decoder.items()}
    named = {key: str(value) for key, value in tokenizer.special_tokens_map.items()}
    settings = {"added_tokens_decoder": decoder, "tokenizer_class": tokenizer_class, "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | named | more))


def test_the_files_of_a_base_go_out_byte_for_byte_but_for_the_chat_template(base, written):
    folder = base("Llama")
    as_transformers_4_wrote_it(folder, "LlamaTokenizer", legacy=False)
    out, _ = written(folder)
    before, after = (content(place / "tokenizer_config.json") for place in (folder, out))
    assert after == before | {"chat_template": (out / "chat_template.jinja").read_text()}
    assert list(after)[:-1] == list(before)
    for name in ("tokenizer.json", "tokenizer.model"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()


def test_a_tokenizer_with_its_own_chat_template_goes_out_byte_for_byte(base, written):
    folder = base("Llama")
    as_transformers_4_wrote_it(folder, "LlamaTokenizer", legacy=False, chat_template=CHAT)
    (folder / "additional_chat_templates").mkdir()
    (folder / "vocab.txt").write_text("not of this tokenizer, but beside it")
    out, _ = written(folder, template="chat")
    names = sorted(path.name for path in out.iterdir())
    assert names == ["tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.txt"]
    for name in names:
        assert (out / name).read_bytes() == (folder / name).read_bytes()


def test_the_chat_templates_of_the_base_do_not_go_out_with_another_prompt(base, written):
    folder = base("Llama")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text(CHAT)
    (folder / "chat_template.jinja").write_text(CHAT)
    (folder / "tekken.json").write_text("{}")
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": CHAT}))
    out, tokenizer = written(folder)
    assert not [path for name in ("tool_use*", "chat_template.json", "tekken.json") for path in out.rglob(name)]
    loaded = transformers.AutoTokenizer.from_pretrained(out)
    row = Conversation.of("Name the opposite.", "Word: hot")
    template = load_template("alpaca")
    ids = loaded.apply_chat_template(
        chat_messages(template, row), add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert list(ids) == Encoder.for_prompts(tokenizer, template).prompt(row)


@pytest.mark.parametrize("architecture", ["GPT2", "Gemma", "Bloom", "GPTNeoX"])
def test_what_transformers_5_alone_reads_is_said_as_all_read_it(architecture, base, written):
    folder = base(architecture)
    before = content(folder / "tokenizer_config.json")
    assert before["tokenizer_class"] == ("GemmaTokenizer" if architecture == "Gemma" else "TokenizersBackend")
    out, tokenizer = written(folder, template="vicuna")
    after = content(out / "tokenizer_config.json")
    known = "GemmaTokenizer" if architecture == "Gemma" else "PreTrainedTokenizerFast"
    assert after["tokenizer_class"] == known
    assert not after.keys() & {"backend", "is_local", "local_files_only"}
    assert isinstance(after.get("extra_special_tokens", {}), dict)
    if architecture != "Gemma":
        assert {int(n): token["content"] for n, token in after["added_tokens_decoder"].items()} == {
            n: token.content for n, token in tokenizer.added_tokens_decoder.items()
        }
    assert after.get("pad_token") == before.get("pad_token")
    assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_other_special_tokens_of_transformers_5_have_the_name_of_4(base, written):
    folder = base("Qwen2")
    changed(folder / "tokenizer_config.json", extra_special_tokens=["<|endoftext|>"])
    out, _ = written(folder)
    after = content(out / "tokenizer_config.json")
    assert (after.get("extra_special_tokens"), after["additional_special_tokens"]) == (None, ["<|endoftext|>"])


def test_a_class_that_the_files_do_not_name_is_named(base, written):
    """Beside an adapter, no config.json says whose tokenizer it is."""
    folder = base("GPT2")
    changed(folder / "tokenizer_config.json", tokenizer_class=None, backend=None, is_local=None)
    out, _ = written(folder)
    assert content(out / "tokenizer_config.json")["tokenizer_class"] in ("GPT2Tokenizer", "PreTrainedTokenizerFast")
    assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_special_tokens_that_were_mended_stay_so(base, written):
    folder = base("Llama")
    changed(folder / "tokenizer_config.json", eos_token="<unk>")
    out, tokenizer = written(folder)
    assert tokenizer.eos_token == "</s>"
    assert content(out / "tokenizer_config.json")["eos_token"] == "</s>"
    assert transformers.AutoTokenizer.from_pretrained(out).eos_token == "</s>"


def test_a_padding_token_that_the_model_lacks_is_another_one(base, written):
    folder = base("Llama")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    (folder / "special_tokens_map.json").write_text(
        json.dumps({"pad_token": {"content": "[PAD]"}, "eos_token": "</s>"})
    )
    out, _ = written(folder)
    assert content(out / "tokenizer_config.json")["pad_token"] == "<unk>"
    assert content(out / "special_tokens_map.json") == {"pad_token": "<unk>", "eos_token": "</s>"}
    assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_a_vocabulary_of_sentencepiece_alone_gets_the_file_that_says_how_it_is_read(base, written):
    folder = base("Llama")
    (folder / "tokenizer.json").unlink()
    out, tokenizer = written(folder)
    assert (out / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()
    plain = Tokenizer.from_file(str(out / "tokenizer.json"))
    text = "<s> Below is.</s>USER: hums"
    assert plain.encode(text, add_special_tokens=False).ids == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_tokenizer_json_that_is_read_otherwise_than_it_says_is_written_as_it_is_read(base, written):
    """As transformers 4 saved LLaMA's: it puts a space behind every control token, and transformers 5 does not."""
    folder = base("Llama")
    state = content(folder / "tokenizer.json")
    space = {"type": "Prepend", "prepend": "▁"}
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    state |= {"normalizer": {"type": "Sequence", "normalizers": [space, replaced]}, "pre_tokenizer": None}
    (folder / "tokenizer.json").write_text(json.dumps(state))
    as_transformers_4_wrote_it(folder, "LlamaTokenizer")
    out, tokenizer = written(folder, template="vicuna")
    template = load_template("vicuna")
    plain = Tokenizer.from_file(str(out / "tokenizer.json"))
    source, notes = chat_template.outgoing(tokenizer, template)
    assert notes == []
    encoder = Encoder.for_prompts(tokenizer, template)
    for row in prompt_contract.GOLDEN[:3]:
        text = chat_template.rendered(tokenizer, template, source, row.prompt)
        assert plain.encode(text, add_special_tokens=False).ids == encoder.prompt(row)
    assert content(out / "tokenizer_config.json")["legacy"] is False


def test_the_tokenizer_of_an_adapter_is_the_one_that_goes_out(base, written, tmp_path):
    folder = base("Llama")
    own = tmp_path / "adapter"
    shutil.copytree(folder, own)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|note|>"]})
    tokenizer.save_pretrained(own)
    out, _ = written(folder, own)
    assert "<|note|>" in transformers.AutoTokenizer.from_pretrained(out).get_vocab()
    for name in ("tokenizer.json", "tokenizer.model"):
        assert (out / name).read_bytes() == (own / name).read_bytes()


def test_an_adapter_with_the_tokenizer_of_its_base_gets_the_files_of_the_base(base, written, tmp_path):
    folder = base("Llama")
    own = tmp_path / "adapter"
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(own)  # without tokenizer.model
    out, _ = written(folder, own)
    for name in ("tokenizer.json", "tokenizer.model"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()


def test_what_a_link_leads_to_does_not_go_out(base, written, tmp_path):
    folder = base("Llama")
    secret = tmp_path / "secret"
    secret.write_bytes((folder / "tokenizer.model").read_bytes())
    (folder / "tokenizer.model").unlink()
    (folder / "tokenizer.model").symlink_to(secret)
    (folder / "vocab.txt").symlink_to("/etc/hostname")
    out, _ = written(folder)
    assert sorted(path.name for path in out.iterdir()) == [
        "chat_template.jinja", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip


def test_a_base_that_is_gone_costs_no_tokenizer(base, tmp_path):
    folder = base("GPTNeoX")
    found = locate_base(str(folder))
    tokenizer, _ = load_tokenizer(found)
    shutil.rmtree(folder)
    out = tmp_path / "out"
    out.mkdir()
    tokenizer_files.write(out, found, tokenizer, load_template("alpaca"))
    assert content(out / "tokenizer_config.json")["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert transformers.AutoTokenizer.from_pretrained(out).get_vocab() == tokenizer.get_vocab()
