"""The served receipt holds what base + adapter, and the base alone, answer to our own probes, token by token."""

import copy
import json
from functools import partial

import pytest
import torch
from engines import make

from lora_alpaca.artifacts.chat_template import outgoing
from lora_alpaca.data.encoding import Encoder
from lora_alpaca.errors import ConfigError
from lora_alpaca.export.verify import greedy, served_receipt
from lora_alpaca.export.verify.probes import PROBES
from lora_alpaca.models.base import locate_base
from lora_alpaca.models.tokenizer import load_tokenizer
from lora_alpaca.prompts import load_template

PROMPTS = [[1, *range(30, 45)], [1, 7, 9], [1, *range(100, 107)]]


@pytest.mark.parametrize("family", ["Llama", "GPT2", "Bloom"])
def test_answers_are_those_of_the_model_read_without_padding_and_cache(family):
    model = make(family).eval()
    model.get_base_model().generation_config.update(repetition_penalty=1.5, eos_token_id=list(range(150)))
    settings = model.get_base_model().generation_config
    found = greedy.continuations(model, PROMPTS, 4)
    exact = copy.deepcopy(model).double()
    for prompt, answer in zip(PROMPTS, found, strict=True):
        row = list(prompt)
        for token, likeliest in zip(answer.ids, answer.likeliest, strict=True):
            with torch.inference_mode():
                logits = exact(input_ids=torch.tensor([row]), use_cache=False).logits[0, -1]
            values, ids = logits.double().log_softmax(-1).topk(5)
            assert [one for one, _ in likeliest] == ids.tolist()
            assert token == ids[0]
            assert torch.allclose(torch.tensor([value for _, value in likeliest]).double(), values, atol=1e-4)
            row.append(token)
    assert model.get_base_model().generation_config is settings


@pytest.fixture(scope="module")
def made(tiny_llama):
    """Return the content of a receipt of a model with an adapter, its tokenizer, and the model."""
    import transformers

    base = locate_base(str(tiny_llama))
    tokenizer, _ = load_tokenizer(base, None, trained=False)
    model = make("Llama", vocabulary=base.vocabulary, max_position_embeddings=512).eval()

    def plain(prompts, new_tokens):
        with model.disable_adapter():
            return greedy.continuations(model, prompts, new_tokens)

    tuned = partial(greedy.continuations, model)
    template = load_template("alpaca").bound(tokenizer)
    longest = len(Encoder.for_prompts(tokenizer, template).prompt(PROBES["a long input"]))
    content = served_receipt.build(tuned, plain, tokenizer, template, [2], new_tokens=8, max_length=longest + 7)
    return content, transformers.AutoTokenizer.from_pretrained(tiny_llama), model


def test_prompts_and_messages_are_what_a_server_turns_into_the_ids_of_training(made):
    content, tokenizer, _ = made
    chat_template, _ = outgoing(tokenizer, load_template("alpaca").bound(tokenizer))
    probes = {probe["name"]: probe for probe in content["probes"]}
    assert set(probes) < set(PROBES)
    assert not {"a system message", "several turns", "a long input"} & set(probes)  # not taken, and too long
    for probe in probes.values():
        assert tokenizer(probe["prompt"])["input_ids"] == probe["prompt_ids"]
        ids = tokenizer.apply_chat_template(
            probe["messages"], chat_template=chat_template, add_generation_prompt=True, return_dict=False
        )
        assert ids == probe["prompt_ids"]


def test_what_16_bits_change_is_measured():
    model = make("Llama").eval()
    found = greedy.continuations(model, PROMPTS, 6)
    measured = greedy.rounding(model, PROMPTS, found)
    halved = copy.deepcopy(model).bfloat16()
    differences = []
    for prompt, answer in zip(PROMPTS, found, strict=True):
        with torch.inference_mode():
            logits = halved(input_ids=torch.tensor([[*prompt, *answer.ids]])).logits[0].float().log_softmax(-1)
        for place, (token, likeliest) in enumerate(zip(answer.ids, answer.likeliest, strict=True), len(prompt) - 1):
            differences.append(abs(float(logits[place, token]) - likeliest[0][1]))
    assert 0.4 < measured / (sum(differences) / len(differences)) < 2.5
    assert not any(part._forward_hooks for part in model.modules())


def test_a_budget_leaves_out_the_last_probes(made):
    content, tokenizer, _ = made
    template = load_template("alpaca").bound(tokenizer)
    lengths = [len(probe["prompt_ids"]) for probe in content["probes"]]

    def nothing(prompts, new_tokens):
        return [served_receipt.Continuation([5] * new_tokens, [[(5, -1.0)]] * new_tokens) for _ in prompts]

    most = sum(lengths[:3]) + 3 * 4
    few = served_receipt.build(nothing, nothing, tokenizer, template, [2], new_tokens=4, most_tokens=most)
    names = [probe["name"] for probe in content["probes"]]
    assert [probe["name"] for probe in few["probes"]] == names[:3]


def test_a_receipt_is_read_as_it_was_written(made, tmp_path):
    content, tokenizer, model = made
    (tmp_path / served_receipt.FILE).write_text(json.dumps(content))
    found = served_receipt.read(tmp_path, "--receipt")
    assert found.new_tokens == 8
    assert [probe.name for probe in found.probes] == [probe["name"] for probe in content["probes"]]
    for probe, written in list(zip(found.probes, content["probes"], strict=True))[:3]:
        ids = [place[0].id for place in probe.tuned.places]
        with model.disable_adapter():
            alone = greedy.continuations(model, [probe.prompt_ids], 8)[0].ids
        assert [place[0].id for place in probe.plain.places] == alone != ids
        ends = ids.index(2) if 2 in ids else None
        assert probe.tuned.ends == ends
        text = tokenizer.decode(ids[:ends], skip_special_tokens=True)
        assert written["tuned"]["text"] == text
        if "\ufffd" not in text:  # bytes that are no character change those before them
            assert probe.tuned.text == text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda content: content | {"format": 2}, "format 2, which this version of lora_alpaca cannot read"),
        (lambda content: content | {"probes": [{"name": "a"}]}, "damaged, probes.0.prompt is missing"),
        (lambda content: [content], "holds no object"),
        (lambda content: content | {"new_tokens": -1}, "damaged, new_tokens is -1"),
    ],
)
def test_a_damaged_receipt_is_one_line(made, tmp_path, change, said):
    (tmp_path / served_receipt.FILE).write_text(json.dumps(change(made[0])))
    with pytest.raises(ConfigError, match=said):
        served_receipt.read(tmp_path, "--receipt")


def test_a_token_of_a_damaged_receipt_is_one_line(made, tmp_path):
    content = copy.deepcopy(made[0])
    content["probes"][0]["tuned"]["places"][0][0] = [3, "a"]
    (tmp_path / served_receipt.FILE).write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"damaged, probes\.0.tuned\.places\.0\.0"):
        served_receipt.read(tmp_path, "--receipt")


def test_no_receipt_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no served_receipt\.json; export the model again"):
        served_receipt.read(tmp_path, "--receipt")
