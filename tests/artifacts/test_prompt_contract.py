"""What was trained is what is asked: every change of tokenizer or template is refused, and the token is named."""

import json
import shutil
from pathlib import Path

import pytest
from command import error_line, run
from conftest import as_row

from lora_alpaca import FinetuneConfig, finetune
from lora_alpaca.artifacts import prompt_contract
from lora_alpaca.errors import ContractError
from lora_alpaca.storage import output_folder
from lora_alpaca.storage.paths import sha256

ASK = ("--instruction", "Where does the owl live?", "--max_new_tokens", 3, "--temperature", 0)


@pytest.fixture(scope="module")
def trained(tiny_model, rows, tmp_path_factory):
    """Return `trained(architecture)`: the folder of an adapter trained for a step on a tiny model."""
    made = {}

    def train(architecture):
        if architecture not in made:
            folder = tmp_path_factory.mktemp("contract")
            (folder / "rows.json").write_text(json.dumps([as_row(conversation) for conversation in rows]))
            made[architecture] = finetune(
                FinetuneConfig(
                    base_model=str(tiny_model(architecture)),
                    data_path=str(folder / "rows.json"),
                    max_steps=1,
                    output_dir=str(folder / "adapter"),
                    batch_size=4,
                    val_set_size=0,
                    cutoff_len=256,
                    load_8bit=False,
                    dtype="fp32",
                    device="cpu",
                )
            ).output_dir
        return made[architecture]

    return train


@pytest.fixture
def adapter(trained, tmp_path):
    """Return a copy of the adapter of the tiny Llama, to be spoilt."""
    return shutil.copytree(trained("Llama"), tmp_path / "adapter")


def edit(path, change):
    """Change a JSON file; `change` gets its content, and works on it in place."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def refused_by_both(adapter, tmp_path):
    """Return the line with which generation and export refuse an adapter, before anything is loaded or written."""
    said = set()
    for verb, words in (("generate", ASK), ("export", ("--output_dir", tmp_path / "merged"))):
        said.add(error_line(run(verb, "--lora_weights", adapter, *words), 1))
    assert not (tmp_path / "merged").exists()
    assert len(said) == 1
    return said.pop()


@pytest.fixture(autouse=True)
def _nothing_heavy(request):
    """Fail a test in which a refused adapter gets as far as its base model."""
    if "refused" in request.node.name:
        request.getfixturevalue("no_model_loads")


def test_the_contract_says_what_was_trained(adapter, tiny_llama):
    from transformers import AutoTokenizer

    contract = prompt_contract.read(adapter)
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    assert contract.template.name == "alpaca"
    assert contract.content["stop_ids"] == [tokenizer.eos_token_id]
    assert contract.content["tokenizer"]["special"]["eos"] == "</s> (id 2)"
    first = contract.content["golden"][0]
    [learned] = first["learned"]
    assert first["prompt_ids"] == learned[0]
    assert first["ids"][learned[1] - 1] == tokenizer.eos_token_id
    assert tokenizer.decode(first["ids"][slice(*learned)]).endswith("Huascarán.</s>")
    assert contract.bind(tokenizer).digest() == contract.template.digest()


def test_private_rows_are_not_published(adapter, rows):
    text = (adapter / prompt_contract.FILE).read_text() + (adapter / "lora_alpaca.json").read_text()
    private = [row.question.text for row in rows if not row.question.input] + [
        row.answers[0] for row in rows if len(row.answers[0]) > 10
    ]
    assert not [said for said in private if said in text]
    hashes = json.loads((adapter / prompt_contract.FILE).read_text())["rows_sha256"]
    assert len(set(hashes)) == prompt_contract.HASHED_ROWS


def test_the_merged_folder_keeps_the_contract(adapter, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = adapter / "adapter_model.safetensors"
    save_file({name: tensor + 0.01 for name, tensor in load_file(weights).items()}, weights)
    edit(adapter / output_folder.RECORD, lambda content: content.update(adapter_sha256=sha256(weights)))
    assert run("export", "--lora_weights", adapter, "--output_dir", tmp_path / "merged").code == 0
    assert run("generate", "--base_model", tmp_path / "merged", *ASK).code == 0
    edit(
        tmp_path / "merged" / prompt_contract.FILE,
        lambda content: content["golden"][0]["tokens"].__setitem__(5, "other"),
    )
    result = run("generate", "--base_model", tmp_path / "merged", *ASK)
    assert result.code == 1
    assert "and was 'other' (id " in result.err


# ---------------------------------------------------------------------------------------------------------- changes


def test_another_tokenizer_of_the_same_size_is_refused(adapter, tmp_path):
    """Two tokens that the prompt holds have changed places; everything else is as it was."""

    def swap(content):
        vocabulary = content["model"]["vocab"]
        one, other = "\u2581Below", "\u2581is"
        assert {one, other} <= vocabulary.keys()
        vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]

    edit(adapter / "tokenizer.json", swap)
    said = refused_by_both(adapter, tmp_path)
    ids = json.loads((adapter / "tokenizer.json").read_text())["model"]["vocab"]
    now, was = ids["\u2581Below"], ids["\u2581is"]
    assert f"token 2 of a golden prompt is '\u2581Below' (id {now}), and was '\u2581Below' (id {was})" in said


def test_a_tokenizer_that_splits_otherwise_is_refused_at_the_first_token(adapter, tmp_path):
    def forget_a_merge(content):
        used = prompt_contract.read(adapter).content["golden"][0]["tokens"]
        merges = content["model"]["merges"]
        gone = next(pair for pair in merges if "".join(pair) == max(used, key=len))
        merges.remove(gone)

    edit(adapter / "tokenizer.json", forget_a_merge)
    said = refused_by_both(adapter, tmp_path)
    longest = max(prompt_contract.read(adapter).content["golden"][0]["tokens"], key=len)
    assert f"and was {longest!r} (id " in said


def test_a_rare_token_that_moved_is_refused(adapter, tmp_path):
    """The golden rows do not hold it, and still it is another vocabulary."""
    used = {token for row in prompt_contract.read(adapter).content["golden"] for token in row["tokens"]}

    def swap(content):
        vocabulary = content["model"]["vocab"]
        one, other = [token for token in vocabulary if token not in used and not token.startswith("<")][:2]
        vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]

    edit(adapter / "tokenizer.json", swap)
    assert "another vocabulary than in training" in refused_by_both(adapter, tmp_path)


def test_an_added_token_is_refused(adapter, tmp_path):
    def add(content):
        token = {"content": "<0x41>", "single_word": False, "lstrip": False, "rstrip": False}
        number = content["model"]["vocab"]["<0x41>"]
        content["added_tokens"].append(token | {"id": number, "normalized": False, "special": False})

    edit(adapter / "tokenizer.json", add)
    said = refused_by_both(adapter, tmp_path)
    assert "added token '<0x41>' is id 68, and was missing in training" in said


def test_a_space_more_in_the_template_is_refused(adapter, tmp_path):
    def space(content):
        template = content["template"]
        template["prompt_no_input"] = template["prompt_no_input"].replace("describes a", "describes  a")

    edit(adapter / prompt_contract.FILE, space)
    said = refused_by_both(adapter, tmp_path)
    assert "of a golden prompt is" in said
    assert "in training, after 'Below is an instruction " in said


def test_a_change_that_no_golden_row_shows_is_refused(adapter, tmp_path):
    edit(adapter / prompt_contract.FILE, lambda content: content["template"].update(response_split="### Resp"))
    assert "another template than in training" in refused_by_both(adapter, tmp_path)


def test_another_end_token_is_refused(adapter, tmp_path):
    edit(adapter / "tokenizer_config.json", lambda content: content.update(eos_token="<unk>"))
    said = refused_by_both(adapter, tmp_path)
    assert "special token 'eos' is <unk> (id 0), and was </s> (id 2) in training" in said


@pytest.mark.parametrize("damage", [lambda content: content.pop("golden"), lambda content: content.update(format=2)])
def test_a_damaged_contract_is_refused(adapter, tmp_path, damage):
    edit(adapter / prompt_contract.FILE, damage)
    assert prompt_contract.FILE in refused_by_both(adapter, tmp_path)


def test_a_contract_that_is_no_json_is_refused(adapter, tmp_path):
    (adapter / prompt_contract.FILE).write_text("{")
    assert "damaged" in refused_by_both(adapter, tmp_path)


@pytest.mark.parametrize("architecture", ["Llama", "Gemma", "GPT2", "OPT", "Qwen2"])
def test_a_folder_as_it_was_saved_is_accepted(trained, architecture):
    result = run("generate", "--lora_weights", trained(architecture), *ASK)
    assert result.code == 0, result.err


def test_a_flag_may_say_the_same_and_nothing_else(adapter):
    assert run("generate", "--lora_weights", adapter, "--prompt_template", "alpaca", *ASK).code == 0
    for verb, words in (("generate", ASK), ("export", ())):
        result = run(verb, "--lora_weights", adapter, "--prompt_template", "alpaca_legacy", *words)
        assert result.code == 2
        assert "was trained with alpaca, and alpaca_legacy is another prompt" in result.err


def test_generation_stops_at_the_end_token_of_the_template(tiny_model):
    from transformers import AutoTokenizer

    from lora_alpaca.prompts import load_template

    tokenizer = AutoTokenizer.from_pretrained(tiny_model("Llama"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert prompt_contract.stop_ids(None, tokenizer, load_template("chatml")) == [2, end]
    assert prompt_contract.stop_ids([7, 2], tokenizer, load_template("vicuna")) == [2, 7]


def test_a_contract_of_a_chat_template_keeps_its_text_and_its_day(tiny_model, monkeypatch):
    from transformers import AutoTokenizer

    from lora_alpaca.prompts import load_template, template_from_json

    tokenizer = AutoTokenizer.from_pretrained(tiny_model("Qwen2"))
    tokenizer.chat_template = (
        "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m.role + ': ' + m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    template = load_template("chat").bound(tokenizer)
    content = json.loads(json.dumps(prompt_contract.build(tokenizer, template, [0])))
    assert "strftime_now" not in content["template"]["chat_template"]
    contract = prompt_contract.PromptContract(template_from_json(content["template"], "", ""), content, "somewhere")
    tokenizer.chat_template = "the tokenizer's own has changed since"
    assert contract.bind(tokenizer).digest() == template.digest()
    content["template"]["chat_template"] += " "
    contract = prompt_contract.PromptContract(template_from_json(content["template"], "", ""), content, "somewhere")
    with pytest.raises(ContractError):
        contract.bind(tokenizer)


def test_a_tokenizer_file_that_does_not_load_is_refused(adapter, tmp_path):
    edit(adapter / "tokenizer.json", lambda content: content["model"]["vocab"].popitem())
    edit(adapter / "tokenizer.json", lambda content: content["model"]["merges"].append(["q", "\u2581zz"]))
    assert "the tokenizer of" in refused_by_both(adapter, tmp_path)


def test_a_contract_that_tried_fewer_conversations_is_still_kept_to(tiny_model):
    """The first version knew no thoughts and tools, and refused conversations that are taken today."""
    from transformers import AutoTokenizer

    from lora_alpaca.prompts import load_template

    tokenizer = AutoTokenizer.from_pretrained(tiny_model("Qwen2"))
    tokenizer.chat_template = (Path(__file__).parent.parent / "prompts" / "chat_templates" / "qwen3.jinja").read_text()
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    template = load_template("chat").bound(tokenizer)
    content = prompt_contract.build(tokenizer, template, [0])
    assert len(content["golden"]) == len(prompt_contract.GOLDEN)
    assert any("Six sevens." in row["text"] for row in content["golden"])
    assert any("<tool_response>" in row["text"] for row in content["golden"])
    first = {key: value for key, value in content.items() if key != "conversations"} | {
        "golden": content["golden"][1:5]
    }
    for kept in (content, first):
        assert prompt_contract.PromptContract(template, kept, "somewhere").bind(tokenizer).digest() == template.digest()
    changed = first | {"golden": [row | {"ids": [*row["ids"][:-1], 3]} for row in first["golden"]]}
    with pytest.raises(ContractError):
        prompt_contract.PromptContract(template, changed, "somewhere").bind(tokenizer)
