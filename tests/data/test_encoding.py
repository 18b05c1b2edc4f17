import json

import pytest

from lora_alpaca.data.encoding import Encoded, Encoder
from lora_alpaca.data.examples import IGNORED, Example
from lora_alpaca.engine.batches import pad
from lora_alpaca.errors import DataError
from lora_alpaca.prompts import Conversation, Message, load_template, template_from_json

TEXTS = ["Hello.", " leading", "trailing ", "\nnewline first", "</s> and <s>", "שלום 🦙", "{input}", "a\n\nb", "12 + 3"]
ROW = Conversation.of("I", "", "A")
TALK = Conversation(
    (Message("user", "Hi"), Message("assistant", "Hello."), Message("user", "And?"), Message("assistant", "Bye."))
)


@pytest.fixture(scope="module", params=["Llama", "GPT2"])
def tokenizer(request, tiny_model):
    """A SentencePiece tokenizer with a dummy prefix, and a byte-level BPE."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model(request.param))


def encoded(tokenizer, conversation=ROW, template="alpaca", **choices) -> Encoded:
    (row,) = Encoder(tokenizer, load_template(template), **choices).encode([conversation])
    return row


# ----------------------------------------------------------------------------------------------------- one boundary


@pytest.mark.parametrize("answer", TEXTS)
def test_what_generation_feeds_is_a_prefix_of_what_training_saw(tokenizer, answer):
    encoder, row = Encoder(tokenizer, load_template("alpaca")), Conversation.of("Say it.", "", answer)
    prompt, (whole,) = encoder.prompt(row), encoder.encode([row])
    assert encoder.prompt(Conversation.of("Say it.")) == prompt
    example = whole.example()
    assert example.input_ids[: len(prompt)] == prompt
    assert example.labels == [IGNORED] * len(prompt) + example.input_ids[len(prompt) :]
    assert whole.ends == [len(whole.ids) - 1]


@pytest.mark.parametrize("answer", TEXTS)
def test_the_learned_tokens_are_the_answer_and_the_end(tokenizer, answer):
    """Upstream loses the end token at the cutoff, and its flag to add it changes only the mask."""
    example = encoded(tokenizer, Conversation.of("I", "", answer)).example()
    learned = [label for label in example.labels if label != IGNORED]
    assert learned[-1] == tokenizer.eos_token_id
    prompt = example.input_ids[: -len(learned)]
    whole = tokenizer.decode(prompt + learned[:-1], clean_up_tokenization_spaces=False)
    assert whole == tokenizer.decode(prompt, clean_up_tokenization_spaces=False) + answer


@pytest.mark.parametrize("answer", TEXTS)
def test_an_earlier_answer_has_the_same_ids_in_a_prompt_as_where_it_was_learned(tokenizer, answer):
    """Encoded with the text before it, an answer behind a space would become other tokens."""
    fields = {
        "prompt_input": "{instruction} {input} R: ",
        "prompt_no_input": "{instruction} R: ",
        "response_split": "R:",
    }
    template = template_from_json({**fields, "turn": "{instruction} R: "}, "", "")
    talk = Conversation((*TALK.messages[:1], Message("assistant", answer), *TALK.messages[2:]))
    encoder = Encoder(tokenizer, template)
    ids, (row,) = encoder.prompt(talk), encoder.encode([talk])
    assert row.ids[: len(ids)] == ids
    assert row.spans[1][0] == len(ids)
    assert Encoder(tokenizer, template, train_on="last").encode([talk])[0].ids == row.ids


def test_control_strings_stay_text(tokenizer):
    encoder = Encoder(tokenizer, load_template("alpaca"))
    (row,) = encoder.encode([Conversation.of("a </s> <s> <|endoftext|>", "<s></s>", "</s><|endoftext|>")])
    control = set(encoder.text.control_tokens.values())
    assert [token for token in row.ids if token in control] == [*encoder.text.bos, tokenizer.eos_token_id]


def test_an_answer_without_a_prompt_is_learned_but_not_the_token_before_it(tokenizer):
    encoder = Encoder(tokenizer, load_template("plain"))
    begin = encoder.text.bos
    for row in (Conversation.of("", "", "Once upon"), Conversation((Message("assistant", "Once upon"),))):
        (whole,) = encoder.encode([row])
        assert encoder.prompt(row) == begin
        assert whole.ids == [*begin, *encoder.text.encode(["Once upon"], "first")[0], tokenizer.eos_token_id]
        assert whole.spans == [(len(begin), len(whole.ids))]
    (nothing,) = encoder.encode([Conversation.of("", "", "")])
    assert nothing == Encoded([*begin, tokenizer.eos_token_id], [(len(begin), len(begin) + 1)], [len(begin)])


def test_end_token_survives_a_pad_token_that_is_the_same(tokenizer):
    """With pad = EOS, masking by the pad id would hide every end token from the loss."""
    examples = [encoded(tokenizer, row).example() for row in (ROW, Conversation.of("I", "", "A" * 50))]
    batch = pad(examples, pad_id=tokenizer.eos_token_id)
    for row, example in enumerate(examples):
        last = len(example.input_ids) - 1
        assert batch["labels"][row, last] == tokenizer.eos_token_id
        assert batch["attention_mask"][row].sum() == last + 1
        assert (batch["labels"][row, last + 1 :] == IGNORED).all()


# ---------------------------------------------------------------------------------------------------------- choices


def test_train_on_inputs_learns_the_prompt_too(tokenizer):
    masked = encoded(tokenizer)
    whole = encoded(tokenizer, train_on_inputs=True)
    example = whole.example()
    assert example.input_ids == masked.ids == example.labels
    assert whole.scored() == len(whole.ids) - 1 > masked.scored()
    assert whole.ends == masked.ends


def test_without_the_end_token(tokenizer):
    with_end, without = encoded(tokenizer), encoded(tokenizer, add_eos_token=False)
    assert with_end.ids == [*without.ids, tokenizer.eos_token_id]
    assert without.spans == [(with_end.spans[0][0], len(without.ids))]
    assert without.ends == []


def test_without_the_end_token_the_ends_of_earlier_turns_are_seen_and_not_learned(tokenizer):
    with_end = encoded(tokenizer, TALK, "vicuna")
    without = encoded(tokenizer, TALK, "vicuna", add_eos_token=False)
    assert with_end.ids == [*without.ids, tokenizer.eos_token_id]
    assert without.spans == [(first, last - 1) for first, last in with_end.spans]
    assert without.ends == []


def test_a_tokenizer_without_an_end_token_is_refused_unless_none_is_learned(tokenizer, tiny_model):
    from transformers import AutoTokenizer

    other = AutoTokenizer.from_pretrained(tiny_model("Qwen2"))
    other.eos_token = None
    with pytest.raises(DataError, match="no end token to learn; pass --add_eos_token False"):
        Encoder(other, load_template("alpaca"))
    assert encoded(other, add_eos_token=False).ends == []


def test_every_answer_is_learned_or_the_last_one_alone(tokenizer):
    every, last = encoded(tokenizer, TALK, "vicuna"), encoded(tokenizer, TALK, "vicuna", train_on="last")
    assert len(every.spans) == 2
    assert (last.ids, last.spans, last.ends) == (every.ids, every.spans[1:], every.ends[1:])


# ------------------------------------------------------------------------------------------------------ encoded rows


def test_a_row_is_cut_in_an_answer_or_behind_one():
    row = Encoded(list(range(20)), [(4, 8), (12, 18)], [7, 17])
    assert row.cut(15) == Encoded(list(range(15)), [(4, 8), (12, 15)], [7])
    assert row.cut(18) == Encoded(list(range(18)), [(4, 8), (12, 18)], [7, 17])
    for length in range(8, 13):  # in the second prompt, which nothing would follow
        assert row.cut(length) == Encoded(list(range(8)), [(4, 8)], [7])
    assert row.cut(3).spans == []
    assert row.cut(3).scored() == 0


def test_mask_and_labels_are_of_the_spans():
    row = Encoded([5, 6, 7, 8, 9], [(1, 2), (3, 5)], [4])
    assert row.mask() == [False, True, False, True, True]
    assert row.example() == Example([5, 6, 7, 8, 9], [IGNORED, 6, IGNORED, 8, 9])
    assert row.scored() == row.example().scored() == 3


def test_scored_ignores_the_first_label():
    assert Example([1, 2, 3], [1, 2, IGNORED]).scored() == 1
    assert Encoded([1, 2, 3], [(0, 2)], []).scored() == 1


# ---------------------------------------------------------------------------------------------- ids of alpaca-lora

CRAFTED = ["", " ", "\n", "\nYes.", "\n\n\nYes.", "  two", " one", "\t", "a", "#", "\r\n", ":", "é", "🦙", "\u2581"]
CRAFTED += [" " * 60 + "far", "\n" * 60, "a" * 60, "\u00a0b", "### Response:", "\n### Response:\n\n"]


@pytest.fixture(scope="module", params=["Llama", "Qwen2", "GPT2", "OPT", "lines"])
def any_tokenizer(request, tiny_model, tmp_path_factory):
    """The tiny tokenizers, and one that has learned a colon with a newline as one token."""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if request.param != "lines":
        return AutoTokenizer.from_pretrained(tiny_model(request.param))
    state = json.loads(AutoTokenizer.from_pretrained(tiny_model("Llama")).backend_tokenizer.to_str())
    for left, right in ((":", "\n"), ("\n", "\n"), (":", "\u2581"), (":\n", "Y")):
        state["model"]["vocab"] |= {piece: len(state["model"]["vocab"]) for piece in (left + right,)}
        state["model"]["merges"].append([left, right])
    state["model"]["vocab"] |= {"\n": len(state["model"]["vocab"])}
    backend = Tokenizer.from_str(json.dumps(state))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("name", ["alpaca", "alpaca_legacy", "alpaca_short", "vigogne", "ends apart"])
def test_rows_with_other_ids_than_alpaca_lora_are_found_exactly(any_tokenizer, rows, name):
    apart = {"prompt_input": "{instruction}{input} R:\n", "prompt_no_input": "{instruction} R:", "response_split": "R:"}
    template = template_from_json(apart, "", "") if name == "ends apart" else load_template(name)
    crafted = [Conversation.of("I", given, answer) for answer in CRAFTED for given in ("", "It.")]
    encoder, conversations = Encoder(any_tokenizer, template), [*rows, *crafted]
    expected = []
    for conversation, row in zip(conversations, encoder.encode(conversations), strict=True):
        prompt = "".join(fragment.text for fragment in template.prompt(conversation))
        joint = any_tokenizer(prompt + conversation.answers[0])["input_ids"]
        expected.append(row.ids != [*joint, any_tokenizer.eos_token_id])
    assert encoder.other_ids(conversations) == expected
    assert encoder.other_ids(conversations) == expected  # what is remembered is the same


def test_some_rows_have_other_ids_and_some_have_not(any_tokenizer):
    """Or the test above would show nothing."""
    encoder = Encoder(any_tokenizer, load_template("alpaca_legacy"))
    found = encoder.other_ids([Conversation.of("I", "", answer) for answer in CRAFTED])
    assert not all(found)
    if any_tokenizer.get_vocab().get(":\n"):
        assert found[CRAFTED.index("\nYes.")]


def test_templates_that_alpaca_lora_does_not_have_differ_from_nothing(tokenizer):
    rows = [Conversation.of("I", "", answer) for answer in CRAFTED]
    for name in ("plain", "vicuna"):
        assert Encoder(tokenizer, load_template(name)).other_ids(rows) == [False] * len(rows)
