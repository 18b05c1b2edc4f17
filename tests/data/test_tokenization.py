import json

import pytest

from lora_alpaca.data.tokenization import TextEncoder, hash_tokenizer
from lora_alpaca.errors import ModelError
from lora_alpaca.prompts import EOS, Fragment

TEXTS = [
    "Hello.",
    " leading",
    "trailing ",
    "\nnewline first",
    "שלום 🦙",
    "{input}",
    "a\n\nb",
    "12 + 3",
    "",
    "  ",
    "It hums.",
]
MODELS = ["Llama", "Gemma", "Qwen2", "GPT2", "OPT"]


@pytest.fixture(scope="module", params=MODELS)
def tokenizer(request, tiny_model):
    """SentencePiece with and without a dummy prefix, and byte-level BPE with and without a first token."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model(request.param))


@pytest.fixture
def llama(tiny_llama):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_llama)


def tokens_with(tokenizer, **sides):
    """Return the tokenizer with two more control tokens, which may swallow white space."""
    from transformers import AddedToken

    added = [AddedToken(f"<|{name}|>", special=True, normalized=False, **sides) for name in ("user", "end")]
    tokenizer.add_tokens(added, special_tokens=True)
    return tokenizer


# ---------------------------------------------------------------------------------------------------------- places


def test_a_first_text_has_the_ids_of_the_tokenizer(tokenizer):
    assert TextEncoder(tokenizer).encode(TEXTS, "first") == [
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS
    ]


def test_a_text_after_a_control_token_has_the_ids_of_the_tokenizer(tokenizer):
    encoder = TextEncoder(tokenizer)
    end = tokenizer.eos_token
    assert encoder.encode(TEXTS, "after_token") == [
        tokenizer(end + text, add_special_tokens=False)["input_ids"][1:] for text in TEXTS
    ]


def test_the_continuation_has_no_dummy_space(tokenizer):
    encoder = TextEncoder(tokenizer)
    joint, prompt = encoder.encode(["### Response:\nHello.", "### Response:\n"], "first")
    assert prompt + encoder.encode(["Hello."], "continuation")[0] == joint


@pytest.fixture
def older_llama(llama):
    """The LLaMA tokenizer as it once was: it turns `</s>a` into `</s>`, ` a`."""
    from tokenizers import Tokenizer, normalizers
    from transformers import PreTrainedTokenizerFast

    state = json.loads(llama.backend_tokenizer.to_str())
    state["pre_tokenizer"] = None
    backend = Tokenizer.from_str(json.dumps(state))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_a_tokenizer_that_begins_every_stretch_with_a_space_does_so_after_control_tokens(older_llama):
    encoder = TextEncoder(older_llama)
    for text in filter(None, TEXTS):
        after = older_llama("</s>" + text, add_special_tokens=False)["input_ids"][1:]
        assert encoder.encode([text], "after_token") == encoder.encode([text], "first") == [after]
    assert encoder.encode(["Hello."], "continuation") != encoder.encode(["Hello."], "first")
    assert encoder.encode([" Hello."], "continuation") == encoder.encode(["Hello."], "first")


def test_an_answer_behind_swallowed_white_space_stands_after_the_token(older_llama):
    encoder = TextEncoder(tokens_with(older_llama, rstrip=True))
    fragments = [Fragment("<|user|>", False, True), Fragment("\n", False), Fragment("It hums.", True, answer=True)]
    ids = older_llama("<|user|>\nIt hums.", add_special_tokens=False)["input_ids"]
    assert encoder.prompt(fragments, begins_itself=True) == ids


def test_runs_with_control_tokens_have_the_ids_of_the_whole_text(tokenizer):
    """Between control tokens there is no seam, so transformers' encoding of the whole is the measure."""
    end = tokenizer.eos_token
    fragments = [
        Fragment("Where does the owl live?", False),
        Fragment(EOS, False, True),
        Fragment("It hums.", False),
        Fragment(end, True, True),
    ]
    ids = TextEncoder(tokenizer).prompt(fragments)
    assert ids == tokenizer(f"Where does the owl live?{end}It hums.{end}")["input_ids"]


def test_a_row_begins_with_the_beginning_of_text_unless_its_template_writes_it(tokenizer):
    encoder, fragments = TextEncoder(tokenizer), [Fragment("Hello.", False)]
    assert encoder.prompt(fragments) == tokenizer("Hello.")["input_ids"]
    assert encoder.prompt(fragments, begins_itself=True) == tokenizer("Hello.", add_special_tokens=False)["input_ids"]
    assert encoder.prompt([]) == encoder.bos == tokenizer("")["input_ids"]
    assert encoder.fragments([[], fragments]) == [[], [encoder.prompt(fragments)]]


@pytest.mark.parametrize("use", [TextEncoder, hash_tokenizer])
def test_a_tokenizer_written_in_python_is_refused(use):
    from transformers import ByT5Tokenizer

    with pytest.raises(ModelError, match=r"ByT5Tokenizer is written in Python and has no tokenizer\.json; use another"):
        use(ByT5Tokenizer())


# -------------------------------------------------------------------------------------------------- control strings


def test_control_strings_stay_text(tokenizer):
    encoder = TextEncoder(tokenizer)
    control = set(encoder.control_tokens.values())
    for token in encoder.control_tokens:
        for text in (token, f"a {token}", f"{token}{token} b"):
            for place in ("first", "after_token", "continuation"):
                (ids,) = encoder.encode([text], place)
                assert ids
                assert not control & set(ids)
            assert encoder.control_pattern.search(text)[0] == token
        assert encoder.token_id(token) == encoder.control_tokens[token]
    assert encoder.token_id(EOS) == tokenizer.eos_token_id
    assert not encoder.control_pattern.search("a <b> | [c]")


def test_control_strings_stay_text_where_they_are_pieces_of_a_unigram_model():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("\u2581", -2.0), *((letter, -3.0) for letter in "ab</>su")]
    backend = Tokenizer(models.Unigram(pieces, 0, False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    assert tokenizer("a</s>b", split_special_tokens=True)["input_ids"][2] == 2  # the tokenizer's own trap
    encoder = TextEncoder(tokenizer)
    assert encoder.encode(["a</s>b"], "continuation") == [
        [tokenizer.convert_tokens_to_ids(letter) for letter in "a</s>b"]
    ]
    assert encoder.encode(["ab sub", "<s>"], "first")[0] == tokenizer("ab sub")["input_ids"]
    assert 1 not in encoder.encode(["<s>"], "first")[0]


# ------------------------------------------------------------------------------------------------- swallowed spaces


@pytest.mark.parametrize("model", ["Llama", "GPT2"])
@pytest.mark.parametrize("sides", [{"lstrip": True}, {"rstrip": True}, {"lstrip": True, "rstrip": True}])
def test_white_space_around_a_token_that_swallows_it_is_swallowed(tiny_model, model, sides):
    from transformers import AutoTokenizer

    tokenizer = tokens_with(AutoTokenizer.from_pretrained(tiny_model(model)), **sides)
    parts = ["<|user|>", " \n It hums. \n", "<|end|>", " \n ", "<|user|>"]
    fragments = [Fragment(part, False, part.startswith("<|")) for part in parts]
    ids = TextEncoder(tokenizer).prompt(fragments, begins_itself=True)
    assert ids == tokenizer("".join(parts), add_special_tokens=False)["input_ids"]


def test_an_answer_keeps_its_white_space_beside_a_token_that_swallows_it(llama):
    encoder = TextEncoder(tokens_with(llama, lstrip=True, rstrip=True))
    answer = Fragment(" \nIt hums. \n", True, answer=True)
    ((_, ids, _),) = encoder.fragments([[Fragment("<|user|>", False, True), answer, Fragment("<|end|>", True, True)]])
    assert "".join(encoder.pieces([*encoder.encode(["x"], "first")[0], *ids])) == "x \nIt hums. \n"


def test_a_token_typed_by_a_user_swallows_nothing(llama):
    encoder = TextEncoder(tokens_with(llama, lstrip=True, rstrip=True))
    ((prompt, answer),) = encoder.fragments([[Fragment("It hums. ", False), Fragment("<|end|>", True, answer=True)]])
    assert prompt == encoder.bos + encoder.encode(["It hums. "], "first")[0]
    assert answer == encoder.encode(["<|end|>"], "continuation")[0]


# ----------------------------------------------------------------------------------------------------------- pieces


@pytest.mark.parametrize("text", ["It hums.", "שלום 🦙 日本\n", "  two  spaces ", "👩\u200d👩\u200d👧", "</s> as text"])
def test_the_pieces_of_a_row_joined_are_the_row(tokenizer, text):
    encoder = TextEncoder(tokenizer)
    ids = encoder.prompt([Fragment(text, False), Fragment(EOS, True, True)])
    pieces = encoder.pieces(ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert pieces[-1] == tokenizer.eos_token


def test_half_a_character_at_the_end_is_shown_as_such(tokenizer):
    encoder = TextEncoder(tokenizer)
    ids = encoder.encode(["It hums 🦙"], "first")[0][:-1]
    pieces = encoder.pieces(ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces).startswith("It hums ")
    assert pieces[-1].endswith("\ufffd")
    assert encoder.pieces([]) == []


# ------------------------------------------------------------------------------------------------------ fingerprint


def test_the_fingerprint_is_of_what_makes_ids(tiny_model, tmp_path):
    from transformers import AutoTokenizer

    one, other = (AutoTokenizer.from_pretrained(tiny_model("Qwen2")) for _ in range(2))
    other("padded", padding="max_length", truncation=True, max_length=7)
    other.chat_template = "{{ messages }}"
    assert hash_tokenizer(one) == hash_tokenizer(other)
    other.save_pretrained(tmp_path)
    assert hash_tokenizer(AutoTokenizer.from_pretrained(tmp_path)) == hash_tokenizer(one)
    other.add_tokens(["<new>"])
    assert hash_tokenizer(other) != hash_tokenizer(one)
    assert hash_tokenizer(AutoTokenizer.from_pretrained(tiny_model("GPT2"))) != hash_tokenizer(one)


def test_a_change_of_the_end_token_changes_the_fingerprint(tiny_model):
    from transformers import AutoTokenizer

    one, other = (AutoTokenizer.from_pretrained(tiny_model("Qwen2")) for _ in range(2))
    other.eos_token = "<|endoftext|>"
    assert hash_tokenizer(other) != hash_tokenizer(one)
