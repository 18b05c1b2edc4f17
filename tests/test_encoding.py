import pytest

from lora_alpaca.batching import pad
from lora_alpaca.encoding import IGNORED, Encoder, Example, TextEncoder
from lora_alpaca.errors import DataError
from lora_alpaca.prompts import Conversation, load_template, template_names

TEXTS = ["Hello.", " leading", "trailing ", "\nnewline first", "</s> and <s>", "שלום 🦙", "{input}", "a\n\nb", "12 + 3"]


@pytest.fixture(scope="module", params=["Llama", "GPT2"])
def tokenizer(request, tiny_model):
    """A SentencePiece tokenizer with a dummy prefix, and a byte-level BPE."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model(request.param))


@pytest.mark.parametrize("name", template_names())
@pytest.mark.parametrize("answer", TEXTS)
def test_what_generation_feeds_is_a_prefix_of_what_training_saw(tokenizer, name, answer):
    template, instruction = load_template(name), "Say it."
    examples, _ = Encoder(tokenizer, template, 10_000).encode([Conversation(instruction, "", answer)])
    prompt = TextEncoder(tokenizer).beginning([template.prompt(instruction)])[0]
    ids, labels = examples[0].input_ids, examples[0].labels
    assert ids[: len(prompt)] == prompt
    assert labels == [IGNORED] * len(prompt) + ids[len(prompt) :]


@pytest.mark.parametrize("answer", TEXTS)
def test_the_learned_tokens_are_the_answer_and_the_end(tokenizer, answer):
    """Upstream loses the end token at the cutoff, and its flag to add it changes only the mask."""
    examples, _ = Encoder(tokenizer, load_template("alpaca"), 10_000).encode([Conversation("I", "", answer)])
    learned = [label for label in examples[0].labels if label != IGNORED]
    assert learned[-1] == tokenizer.eos_token_id
    prompt = [i for i, label in zip(examples[0].input_ids, examples[0].labels, strict=True) if label == IGNORED]
    whole = tokenizer.decode(prompt + learned[:-1], clean_up_tokenization_spaces=False)
    assert whole.endswith(answer)


def test_the_continuation_has_no_dummy_space(tokenizer):
    encoder = TextEncoder(tokenizer)
    text = "### Response:\nHello."
    joint, prompt = encoder.beginning([text, "### Response:\n"])
    assert prompt + encoder.continuation(["Hello."])[0] == joint


def test_control_strings_stay_text(tokenizer):
    for text in ("</s>", "<s>", "<|endoftext|>"):
        for ids in (
            TextEncoder(tokenizer).beginning([f"a {text}"])[0][1:],
            TextEncoder(tokenizer).continuation([text])[0],
        ):
            assert not {tokenizer.eos_token_id, tokenizer.bos_token_id} & set(ids)


def test_end_token_survives_a_pad_token_that_is_the_same(tokenizer):
    """With pad = EOS, masking by the pad id would hide every end token from the loss."""
    examples, _ = Encoder(tokenizer, load_template("alpaca"), 10_000).encode(
        [Conversation("I", "", "A"), Conversation("I", "", "A" * 50)]
    )
    batch = pad(examples, pad_id=tokenizer.eos_token_id)
    for row, example in enumerate(examples):
        last = len(example.input_ids) - 1
        assert batch["labels"][row, last] == tokenizer.eos_token_id
        assert batch["attention_mask"][row].sum() == last + 1
        assert (batch["labels"][row, last + 1 :] == IGNORED).all()


def test_train_on_inputs_learns_the_prompt_too(tokenizer):
    rows = [Conversation("I", "", "A")]
    masked = Encoder(tokenizer, load_template("alpaca"), 1000).encode(rows)[0][0]
    whole = Encoder(tokenizer, load_template("alpaca"), 1000, train_on_inputs=True).encode(rows)[0][0]
    assert whole.input_ids == masked.input_ids == whole.labels
    assert whole.scored() > masked.scored()


def test_without_the_end_token(tokenizer):
    rows = [Conversation("I", "", "A")]
    with_end = Encoder(tokenizer, load_template("alpaca"), 1000).encode(rows)[0][0]
    without = Encoder(tokenizer, load_template("alpaca"), 1000, add_eos_token=False).encode(rows)[0][0]
    assert with_end.input_ids == [*without.input_ids, tokenizer.eos_token_id]


def test_what_is_cut_is_counted(tokenizer):
    rows = [Conversation("I", "", "word " * 200, "f.json:1"), Conversation("I", "", "A", "f.json:2")]
    length = len(Encoder(tokenizer, load_template("alpaca_short"), 10_000).encode(rows)[0][1].input_ids)
    examples, ledger = Encoder(tokenizer, load_template("alpaca_short"), length).encode(rows)
    assert len(examples[0].input_ids) == length
    assert examples[0].labels[-1] not in (IGNORED, tokenizer.eos_token_id)
    assert examples[1].labels[-1] == tokenizer.eos_token_id
    assert ledger.truncated == ["f.json:1"]
    assert "f.json:1" in ledger.lines(length)[1]


def test_rows_without_a_label_are_dropped_and_named(tokenizer):
    rows = [Conversation("word " * 300, "", "A", "f.json:1"), Conversation("I", "", "A", "f.json:2")]
    examples, ledger = Encoder(tokenizer, load_template("alpaca_short"), 100).encode(rows)
    assert len(examples) == 1
    assert ledger.without_label == ["f.json:1"]
    with pytest.raises(DataError, match="no row has anything to learn at --cutoff_len 100"):
        Encoder(tokenizer, load_template("alpaca_short"), 100).encode(rows[:1])


def test_scored_ignores_the_first_label():
    assert Example([1, 2, 3], [1, 2, IGNORED]).scored() == 1
