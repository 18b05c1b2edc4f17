"""The tokenizer's own chat template: its ids are transformers', and what is learned is what generation would meet."""

import datetime
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lora_alpaca.data.encoding import Choices, Encoder
from lora_alpaca.errors import TemplateError
from lora_alpaca.prompts import ChatTemplate, Conversation, Message, load_template, template_from_json

FOLDER = Path(__file__).parent / "chat_templates"


@dataclass(frozen=True)
class Family:
    """What the tests know of a chat template: a tiny tokenizer to add its tokens to, and how it writes an answer."""

    model: str
    end: str
    tokens: tuple[str, ...] = ()
    named: tuple[tuple[str, str], ...] = ()
    answer: str = "{}"
    system: bool = True
    learns_all: bool = True
    swallows: bool = False


HEADERS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
FAMILIES = {
    "qwen2_5": Family("Qwen2", "<|im_end|>", ("<|im_start|>",)),
    "qwen3": Family("Qwen2", "<|im_end|>", ("<|im_start|>",), answer="<think>\n\n</think>\n\n{}", learns_all=False),
    "llama_2": Family("Llama", "</s>", answer=" {} "),
    "llama_3_2": Family("GPT2", "<|eot_id|>", HEADERS, (("bos_token", HEADERS[0]), ("eos_token", HEADERS[3]))),
    "mistral": Family("Llama", "</s>", ("[INST]", "[/INST]"), answer=" {}", system=False),
    "gemma": Family("Gemma", "<end_of_turn>", ("<start_of_turn>", "<end_of_turn>"), system=False),
    "phi_3": Family("Llama", "<|end|>", ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), swallows=True),
}

USERS = ["Where does the owl live?", "  Name the opposite.\n\nWord: hot \n", "{input} und שלום 🦙 {{ bos_token }}"]
ANSWERS = ["It lives in the forest.", "cold", "Home: a hive\nFood: nectar\n\nIt buzzes {output}."]


def talk(turns: int, system: str = "", users: list[str] = USERS, answers: list[str] = ANSWERS) -> Conversation:
    messages = [Message("system", system)] if system else []
    for user, answer in zip(users[:turns], answers[:turns], strict=True):
        messages += [Message("user", user), Message("assistant", answer)]
    return Conversation(tuple(messages), "rows.json:7")


@pytest.fixture(scope="module")
def tokenizers(tiny_model) -> Any:
    """Return `tokenizers(family)`: a tiny tokenizer with the family's tokens and its chat template."""
    from transformers import AddedToken, AutoTokenizer

    def make(name: str) -> Any:
        family = FAMILIES[name]
        tokenizer = AutoTokenizer.from_pretrained(tiny_model(family.model))
        tokens = [AddedToken(token, special=True, rstrip=family.swallows, normalized=False) for token in family.tokens]
        tokenizer.add_tokens(tokens, special_tokens=True)
        for key, token in family.named:
            setattr(tokenizer, key, token)
        tokenizer.chat_template = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
        return tokenizer

    return make


@pytest.fixture(params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture
def tokenizer(family, tokenizers) -> Any:
    return tokenizers(family)


def encoder_of(tokenizer: Any, **choices: Any) -> Encoder:
    return Encoder(tokenizer, load_template("chat").bound(tokenizer), Choices(**choices))


def ids_of_transformers(tokenizer: Any, messages: tuple[Message, ...], generates: bool) -> list[int]:
    asked = [{"role": message.role, "content": message.text} for message in messages]
    return tokenizer.apply_chat_template(asked, tokenize=True, add_generation_prompt=generates, return_dict=False)


def learned_texts(encoder: Encoder, conversation: Conversation) -> list[str]:
    """Return what is learned of a conversation, in all of its examples."""
    found = []
    for row in encoder.encode([conversation]):
        pieces = encoder.text.pieces(row.ids.tolist())
        found += ["".join(pieces[first:last]) for first, last in row.spans]
    return found


# ------------------------------------------------------------------------------------------------------ as they come


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_training_and_generation_have_the_ids_of_transformers(family, tokenizer, turns):
    encoder = encoder_of(tokenizer)
    for system in ("", "Answer like a zoologist.") if FAMILIES[family].system else ("",):
        conversation = talk(turns, system)
        *_, row = encoder.encode([conversation])
        assert row.ids.tolist() == ids_of_transformers(tokenizer, conversation.messages, False)
        assert encoder.prompt(conversation) == ids_of_transformers(tokenizer, conversation.messages[:-1], True)


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_every_answer_and_its_end_are_learned_also_where_the_template_rewrites_it_later(family, tokenizer, turns):
    what = FAMILIES[family]
    written = [what.answer.format(answer) + what.end for answer in ANSWERS[:turns]]
    encoder = encoder_of(tokenizer)
    assert encoder.template.stop == what.end
    assert learned_texts(encoder, talk(turns)) == written
    assert len(encoder.encode([talk(turns)])) == (1 if what.learns_all else turns)
    assert learned_texts(encoder_of(tokenizer, train_on="last"), talk(turns)) == written[-1:]


@pytest.mark.parametrize("answer", ["\nnewline first", "  two spaces ", "", "</think>", "🦙\n"])
@pytest.mark.parametrize("turns", [1, 2, 3])
def test_what_generation_is_fed_at_every_turn_is_a_prefix_of_what_training_saw(family, tokenizer, turns, answer):
    conversation = talk(turns, answers=[answer] * turns)
    for train_on in ("all", "last"):
        encoder = encoder_of(tokenizer, train_on=train_on)
        prompts = [encoder.prompt(Conversation(conversation.messages[:place])) for place in range(1, turns * 2, 2)]
        seen = [row.ids[:first].tolist() for row in encoder.encode([conversation]) for first, _ in row.spans]
        assert seen == (prompts if train_on == "all" else prompts[-1:])
        assert prompts[-1] == encoder.prompt(conversation)


def test_control_strings_of_a_user_stay_text_and_change_nothing_else(family, tokenizer):
    encoder = encoder_of(tokenizer)
    special = set(encoder.text.control_tokens.values())
    *_, before = encoder.encode([talk(2, users=["What is x called?"] * 2)])
    for token in encoder.text.control_tokens:
        conversation = talk(2, users=[f"What is {token} called?"] * 2)
        *_, row = encoder.encode([conversation])
        assert [i for i in row.ids.tolist() if i in special] == [i for i in before.ids.tolist() if i in special]
        learned = [row.ids[first:last].tolist() for first, last in row.spans]
        assert learned == [before.ids[first:last].tolist() for first, last in before.spans]
        text = "".join(encoder.text.pieces(row.ids.tolist()))
        assert text == "".join(encoder.text.pieces(before.ids.tolist())).replace("What is x", f"What is {token}")
        assert encoder.prompt(conversation) == row.ids[: row.spans[-1][0]].tolist()


def test_a_recorded_chat_template_needs_no_tokenizer_that_brings_one(family, tokenizer):
    template = load_template("chat").bound(tokenizer)
    stored = template_from_json(template.to_json(), "", "contract")
    assert isinstance(stored, ChatTemplate)
    assert stored.digest() == template.digest() != load_template("chat").digest()
    tokenizer.chat_template = None
    encoders = [Encoder.for_prompts(tokenizer, one) for one in (template, stored.bound(tokenizer))]
    rows, again = (encoder.encode([talk(2)]) for encoder in encoders)
    assert rows == again


def test_the_input_of_a_row_stands_below_its_instruction(family, tokenizer):
    encoder = encoder_of(tokenizer)
    one, other = Conversation.of("Name it.", "Word: hot", "cold"), Conversation.of("Name it.\n\nWord: hot", "", "cold")
    assert encoder.encode([one]) == encoder.encode([other])


# ----------------------------------------------------------------------------------------------------- one by one


def test_todays_date_is_tomorrows_too_once_it_is_recorded(tokenizers, monkeypatch):
    tokenizer = tokenizers("llama_3_2")

    class Day(datetime.date):
        now = datetime.date(2024, 2, 29)

        @classmethod
        def today(cls):
            return cls.now

    monkeypatch.setattr("lora_alpaca.prompts.rendering.datetime.date", Day)
    template = load_template("chat").bound(tokenizer)
    text = "".join(fragment.text for fragment in template.prompt(talk(1)))
    assert "Today Date: 29 Feb 2024\n" in text
    Day.now = datetime.date(2024, 3, 1)
    again = template_from_json(template.to_json(), "", "contract").bound(tokenizer)
    assert "".join(fragment.text for fragment in again.prompt(talk(1))) == text
    assert again.digest() == template.digest() != load_template("chat").bound(tokenizer).digest()


def test_a_refused_system_message_is_one_line_that_names_the_row(tokenizers):
    template = load_template("chat").bound(tokenizers("gemma"))
    for make in (template.examples, template.prompt):
        with pytest.raises(TemplateError) as error:
            make(talk(2, "Be brief."))
        assert str(error.value) == "rows.json:7: the chat template refuses: System role not supported"


def test_a_prompt_that_is_shown_otherwise_once_it_is_answered_is_learned_as_it_is_served(tokenizers):
    """This template shows a system message to who is to answer, and none to who reads on."""
    encoder = encoder_of(tokenizers("mistral"))
    conversation = talk(2, "Be brief.")
    rows = encoder.encode([conversation])
    assert learned_texts(encoder, conversation) == [f" {answer}</s>" for answer in ANSWERS[:2]]
    for row, place in zip(rows, (2, 4), strict=True):
        (first, last), prompt = row.spans[0], encoder.prompt(Conversation(conversation.messages[:place]))
        assert (row.ids[:first].tolist(), last) == (prompt, len(row.ids))
        assert "Be brief." in "".join(encoder.text.pieces(prompt))


def test_a_prompt_that_is_never_repeated_before_an_answer_is_refused(tokenizers):
    tokenizer = tokenizers("mistral")
    source = tokenizer.chat_template
    for other in ("[INST]", "_"):
        tokenizer.chat_template = source + f"{{% if add_generation_prompt %}}{{{{ '{other}' }}}}{{% endif %}}"
        with pytest.raises(TemplateError, match=r"^template chat: .* does not repeat its prompt before an answer"):
            load_template("chat").bound(tokenizer)


@pytest.mark.parametrize("instead", ["", "###"])
def test_an_answer_without_an_end_token_is_refused(tokenizers, instead):
    tokenizer = tokenizers("llama_2")
    tokenizer.chat_template = tokenizer.chat_template.replace("eos_token", repr(instead)).replace("bos_token", "''")
    with pytest.raises(TemplateError, match=r"^template chat: .* has no end token after an answer; use vicuna"):
        load_template("chat").bound(tokenizer)


def test_a_tokenizer_without_control_tokens_ends_nothing(tokenizers):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}|{% endfor %}"
    with pytest.raises(TemplateError, match="has no end token"):
        load_template("chat").bound(tokenizer)


@pytest.mark.parametrize(
    ("chat_template", "said"), [(None, "no chat template"), ({"rag": "x", "tool_use": "y"}, "several chat templates")]
)
def test_a_tokenizer_without_one_chat_template_is_refused(tokenizers, chat_template, said):
    tokenizer = tokenizers("llama_2")
    tokenizer.chat_template = chat_template
    with pytest.raises(TemplateError, match=f"the tokenizer brings {said}"):
        load_template("chat").bound(tokenizer)


def test_a_template_that_cannot_be_read_says_so_in_one_line(tokenizers):
    tokenizer = tokenizers("llama_2")
    tokenizer.chat_template = "{% for %}"
    with pytest.raises(TemplateError, match=r"^the chat template refuses: [^\n]+$"):
        load_template("chat").bound(tokenizer)


def test_a_template_that_never_ends_is_refused_in_one_line_and_what_follows_goes_on(tokenizers, monkeypatch):
    monkeypatch.setattr("lora_alpaca.prompts.rendering.SECONDS", 0.3)
    tokenizer = tokenizers("qwen2_5")
    source = tokenizer.chat_template
    tokenizer.chat_template = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}" + source
    begun = time.monotonic()
    with pytest.raises(TemplateError, match=r"^the chat template takes more than 0\.3 s for one conversation"):
        load_template("chat").bound(tokenizer)
    assert time.monotonic() - begun < 5
    tokenizer.chat_template = source
    assert learned_texts(encoder_of(tokenizer), talk(1)) == [ANSWERS[0] + "<|im_end|>"]


def test_a_recorded_template_that_is_no_text_is_refused():
    with pytest.raises(TemplateError, match="contract: the key chat_template is not a text"):
        template_from_json({"chat_template": 3}, "", "contract")


def test_a_document_is_no_conversation(tokenizers):
    template = load_template("chat").bound(tokenizers("llama_2"))
    with pytest.raises(TemplateError, match=r"rows\.json:7: a text without a prompt"):
        template.check(Conversation((Message("assistant", "Once"),), "rows.json:7"))
    template.check(talk(1))


# ------------------------------------------------------------------------------------------------ thoughts dropped

THOUGHT = "<think>\nIt has wings.\n</think>\n\nAn owl."


def test_a_template_that_drops_earlier_thoughts_is_learned_turn_by_turn_as_it_will_be_served(tokenizers):
    encoder = encoder_of(tokenizers("qwen3"))
    conversation = talk(2, answers=[THOUGHT, THOUGHT])
    rows = encoder.encode([conversation])
    assert learned_texts(encoder, conversation) == [THOUGHT + "<|im_end|>"] * 2
    for row, place in zip(rows, (1, 3), strict=True):
        assert row.ids[: row.spans[0][0]].tolist() == encoder.prompt(Conversation(conversation.messages[:place]))
        assert "".join(encoder.text.pieces(row.ids.tolist())).count("It has wings.") == 1


def test_the_turns_before_a_rewritten_answer_are_learned_without_it(tokenizers):
    tokenizer = tokenizers("qwen2_5")
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message.content", "('...' if loop.index == 4 and not loop.last else message.content)"
    )
    encoder = encoder_of(tokenizer)
    for turns, examples in ((2, 1), (3, 2)):
        written = sorted(answer + "<|im_end|>" for answer in ANSWERS[:turns])
        assert sorted(learned_texts(encoder, talk(turns))) == written  # the last example has the answers around it
        assert len(encoder.encode([talk(turns)])) == examples


def test_control_strings_in_a_rewritten_row_stay_text(tokenizers):
    tokenizer = tokenizers("qwen3")
    encoder = encoder_of(tokenizer)
    special = set(encoder.text.control_tokens.values())
    plain, typed = (
        encoder.encode([talk(2, users=[f"What is {word}?", "And?"], answers=[THOUGHT, "An owl."])])
        for word in ("x", "<|im_end|>")
    )
    for one, other in zip(plain, typed, strict=True):
        assert [i for i in one.ids.tolist() if i in special] == [i for i in other.ids.tolist() if i in special]
        text = "".join(encoder.text.pieces(one.ids.tolist()))
        assert "".join(encoder.text.pieces(other.ids.tolist())) == text.replace("What is x", "What is <|im_end|>")


def test_control_strings_that_a_template_looks_into_are_refused_since_they_could_be_its_own(tokenizers):
    tokenizer = tokenizers("qwen2_5")
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message.content", "(message.content | replace('im_end', 'IM_END'))"
    )
    template = load_template("chat").bound(tokenizer)
    for make in (template.examples, template.prompt):
        with pytest.raises(TemplateError, match=r"^rows\.json:7: .* its texts hold control tokens"):
            make(talk(1, users=["What is <|im_end|>?"]))


def test_a_row_whose_last_prompt_is_rewritten_is_learned_behind_what_is_served(tokenizers):
    tokenizer = tokenizers("qwen2_5")
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message.content", "(message.content.split('!')[0] if not add_generation_prompt else message.content)"
    )
    encoder, conversation = encoder_of(tokenizer), talk(1, users=["Hi! You!"])
    (row,) = encoder.encode([conversation])
    assert row.ids[: row.spans[0][0]].tolist() == encoder.prompt(conversation)
    assert "Hi! You!" in "".join(encoder.text.pieces(row.ids.tolist()))
    bot = "{{ '<|im_start|>bot' if messages | length > 2 and add_generation_prompt }}"  # which no answer follows
    tokenizer.chat_template += bot
    with pytest.raises(TemplateError, match=r"^rows\.json:7: .* its last prompt is another one; use vicuna or chatml"):
        load_template("chat").bound(tokenizer).examples(talk(2, users=["Hi! You!", "And!"]))


# ------------------------------------------------------------------------------------------------- swallowed spaces


def test_white_space_that_a_token_swallows_is_swallowed_from_prompts_and_kept_in_answers(tokenizers):
    tokenizer = tokenizers("phi_3")
    encoder = encoder_of(tokenizer)
    conversation = talk(1, users=["  Who?"], answers=["\n  An owl. "])
    (row,) = encoder.encode([conversation])
    assert encoder.prompt(conversation) == ids_of_transformers(tokenizer, conversation.messages[:-1], True)
    assert learned_texts(encoder, conversation) == ["\n  An owl. <|end|>"]
    assert row.ids[: row.spans[0][0]].tolist() == encoder.prompt(conversation)
