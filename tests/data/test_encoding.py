import pytest

from lora_alpaca.config.shared import DataOptions
from lora_alpaca.data.encoding import Choices, Encoder
from lora_alpaca.data.examples import IGNORED, Example, label_positions
from lora_alpaca.engine.batches import pad
from lora_alpaca.errors import DataError, TemplateError
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


def encoded(tokenizer, conversation=ROW, template="alpaca", **choices) -> Example:
    (row,) = Encoder(tokenizer, load_template(template), Choices(**choices)).encode([conversation])
    return row


# ----------------------------------------------------------------------------------------------------- one boundary


@pytest.mark.parametrize("answer", TEXTS)
def test_what_generation_feeds_is_a_prefix_of_what_training_saw(tokenizer, answer):
    encoder, row = Encoder.for_prompts(tokenizer, load_template("alpaca")), Conversation.of("Say it.", "", answer)
    prompt, (whole,) = encoder.prompt(row), encoder.encode([row])
    assert encoder.prompt(Conversation.of("Say it.")) == prompt
    ids = whole.ids.tolist()
    assert ids[: len(prompt)] == prompt
    assert whole.labels == [IGNORED] * len(prompt) + ids[len(prompt) :]
    assert whole.ends == [len(whole.ids) - 1]


@pytest.mark.parametrize("answer", TEXTS)
def test_the_learned_tokens_are_the_answer_and_the_end(tokenizer, answer):
    """Upstream loses the end token at the cutoff, and its flag to add it changes only the mask."""
    example = encoded(tokenizer, Conversation.of("I", "", answer))
    learned = [label for label in example.labels if label != IGNORED]
    assert learned[-1] == tokenizer.eos_token_id
    prompt = example.ids[: -len(learned)].tolist()
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
    encoder = Encoder.for_prompts(tokenizer, template)
    ids, (row,) = encoder.prompt(talk), encoder.encode([talk])
    assert row.ids[: len(ids)].tolist() == ids
    assert row.spans[1][0] == len(ids)
    (last,) = Encoder(tokenizer, template, Choices(train_on="last")).encode([talk])
    assert last.ids.tolist() == row.ids.tolist()


def test_control_strings_stay_text(tokenizer):
    encoder = Encoder.for_prompts(tokenizer, load_template("alpaca"))
    (row,) = encoder.encode([Conversation.of("a </s> <s> <|endoftext|>", "<s></s>", "</s><|endoftext|>")])
    control = set(encoder.text.control_tokens.values())
    assert [token for token in row.ids if token in control] == [*encoder.text.bos, tokenizer.eos_token_id]


def test_an_answer_without_a_prompt_is_learned_but_not_the_token_before_it(tokenizer):
    encoder = Encoder.for_prompts(tokenizer, load_template("plain"))
    begin = encoder.text.bos
    for row in (Conversation.of("", "", "Once upon"), Conversation((Message("assistant", "Once upon"),))):
        (whole,) = encoder.encode([row])
        assert encoder.prompt(row) == begin
        assert whole.ids.tolist() == [*begin, *encoder.text.encode(["Once upon"], "first")[0], tokenizer.eos_token_id]
        assert whole.spans == [(len(begin), len(whole.ids))]
    (nothing,) = encoder.encode([Conversation.of("", "", "")])
    assert nothing == Example([*begin, tokenizer.eos_token_id], [(len(begin), len(begin) + 1)], [len(begin)])


def test_end_token_survives_a_pad_token_that_is_the_same(tokenizer):
    """With pad = EOS, masking by the pad id would hide every end token from the loss."""
    examples = [encoded(tokenizer, row) for row in (ROW, Conversation.of("I", "", "A" * 50))]
    batch = pad(examples, pad_id=tokenizer.eos_token_id)
    for row, example in enumerate(examples):
        last = len(example.ids) - 1
        labels = batch.labels[batch.indices // batch.input_ids.shape[1] == row]
        assert labels.tolist() == [label for label in example.labels if label != IGNORED]
        assert labels[-1] == tokenizer.eos_token_id
        assert batch.attention_mask[row].sum() == last + 1


def test_a_conversation_that_the_template_cannot_hold_is_refused(tokenizer):
    """By the encoder itself, so that no caller can forget to ask."""
    encoder = Encoder.for_prompts(tokenizer, load_template("alpaca"))
    for encode in (encoder.prompt, lambda talk: encoder.encode([ROW, talk])):
        with pytest.raises(TemplateError, match="2 turns, and the template alpaca takes one"):
            encode(TALK)


# ---------------------------------------------------------------------------------------------------------- choices


def test_the_choices_are_the_data_options_of_the_same_names(tokenizer):
    assert Encoder.from_options(tokenizer, load_template("alpaca"), DataOptions()).choices == Choices()
    changed = {"cutoff_len": 9, "overlong": "drop", "train_on_inputs": True, "train_on": "last", "add_eos_token": False}
    options = DataOptions(**changed)
    assert Encoder.from_options(tokenizer, load_template("alpaca"), options).choices == Choices(**changed)


def test_train_on_inputs_learns_the_prompt_too(tokenizer):
    masked = encoded(tokenizer)
    whole = encoded(tokenizer, train_on_inputs=True)
    assert whole.ids.tolist() == masked.ids.tolist() == whole.labels
    assert whole.num_labels() == len(whole.ids) - 1 > masked.num_labels()
    assert whole.ends == masked.ends


def test_without_the_end_token(tokenizer):
    with_end, without = encoded(tokenizer), encoded(tokenizer, add_eos_token=False)
    assert with_end.ids.tolist() == [*without.ids, tokenizer.eos_token_id]
    assert without.spans == [(with_end.spans[0][0], len(without.ids))]
    assert without.ends == []


def test_without_the_end_token_the_ends_of_earlier_turns_are_seen_and_not_learned(tokenizer):
    with_end = encoded(tokenizer, TALK, "vicuna")
    without = encoded(tokenizer, TALK, "vicuna", add_eos_token=False)
    assert with_end.ids.tolist() == [*without.ids, tokenizer.eos_token_id]
    assert without.spans == [(first, last - 1) for first, last in with_end.spans]
    assert without.ends == []


def test_a_tokenizer_without_an_end_token_is_refused_unless_none_is_learned(tokenizer, tiny_model):
    from transformers import AutoTokenizer

    other = AutoTokenizer.from_pretrained(tiny_model("Qwen2"))
    other.eos_token = None
    with pytest.raises(DataError, match="no end token to learn; pass --add_eos_token False"):
        Encoder.from_options(other, load_template("alpaca"), DataOptions())
    assert Encoder.for_prompts(other, load_template("alpaca")).prompt(ROW)
    assert encoded(other, add_eos_token=False).ends == []
    with pytest.raises(TemplateError, match="the end token behind every answer, and the tokenizer has none"):
        Encoder.for_prompts(other, load_template("vicuna")).prompt(TALK.prompt)


def test_every_answer_is_learned_or_the_last_one_alone(tokenizer):
    every, last = encoded(tokenizer, TALK, "vicuna"), encoded(tokenizer, TALK, "vicuna", train_on="last")
    assert len(every.spans) == 2
    assert last == Example(every.ids, every.spans[1:], every.ends[1:])


# ---------------------------------------------------------------------------------------------------------- examples


def test_a_row_is_cut_in_an_answer_or_behind_one():
    row = Example(list(range(20)), [(4, 8), (12, 18)], [7, 17])
    assert row.cut(15) == Example(list(range(15)), [(4, 8), (12, 15)], [7])
    assert row.cut(18) == Example(list(range(18)), [(4, 8), (12, 18)], [7, 17])
    for length in range(8, 13):  # in the second prompt, which nothing would follow
        assert row.cut(length) == Example(list(range(8)), [(4, 8)], [7])
    assert row.cut(3).spans == []
    assert row.cut(3).num_labels() == 0


def test_mask_and_labels_are_of_the_spans():
    row = Example([5, 6, 7, 8, 9], [(1, 2), (3, 5)], [4])
    assert row.mask().tolist() == [False, True, False, True, True]
    assert row.labels == [IGNORED, 6, IGNORED, 8, 9]
    assert row.num_labels() == 3


def test_a_label_on_the_first_token_is_not_predicted():
    assert Example([1, 2, 3], [(0, 2)]).num_labels() == 1
    assert Example([1], [(0, 1)]).num_labels() == 0


def test_the_positions_of_labels_are_those_of_the_spans():
    examples = [
        Example([5, 6, 7, 8, 9], [(0, 2), (3, 5)]),
        Example([1], [(0, 1)]),
        Example([1], []),
        Example([1, 2], [(1, 2)]),
    ]
    row, position = label_positions(examples)
    assert list(zip(row.tolist(), position.tolist(), strict=True)) == [(0, 1), (0, 3), (0, 4), (3, 1)]
    assert [len(positions) for positions in label_positions([])] == [0, 0]


def test_rows_are_equal_where_ids_spans_and_ends_are():
    row = Example([5, 6, 7], [(1, 3)], [2])
    assert row == Example([5, 6, 7], [(1, 3)], [2])
    others = (
        Example([5, 6, 8], [(1, 3)], [2]),
        Example([5, 6, 7], [(2, 3)], [2]),
        Example([5, 6, 7], [(1, 3)]),
        [5, 6, 7],
    )
    assert all(row != other for other in others)
