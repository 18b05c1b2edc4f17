import pytest

from lora_alpaca import GenerateConfig, Generator
from lora_alpaca.errors import ConfigError
from lora_alpaca.inference.codec import Codec, StopTexts, Stripping
from lora_alpaca.inference.sampling import BASE, Sampling, Token
from lora_alpaca.inference.token_generator import Channel, TokenStream
from lora_alpaca.prompts import Conversation


@pytest.fixture(scope="module")
def generator(tiny_llama):
    config = GenerateConfig(
        base_model=str(tiny_llama),
        lora_weights="none",
        prompt_template="alpaca",
        max_new_tokens=12,
        dtype="fp32",
        device="cpu",
    )
    return Generator.load(config)


ASK = ("Where does the owl live?", "")


class Scripted:
    """A token generator that answers with given lists of ids, and remembers what it was asked."""

    def __init__(self, *answer):
        self.answer, self.asked, self.channels = answer, [], []

    def generate(self, request):
        self.asked.append(request)
        channel = Channel()
        self.channels.append(channel)
        for ids in self.answer:
            channel.put([Token(number, -0.5, ((number, -0.5),)) for number in ids])
        channel.end()
        return TokenStream(channel)

    @property
    def open(self):
        return sum(not channel.left.is_set() for channel in self.channels)

    def close(self):
        pass


def scripted(generator, *answer):
    """Return a generator with the tokenizer and template of another one, and a scripted answer."""
    return Generator(generator.codecs, Scripted(*answer), max_length=512)


def codec(generator):
    return generator.codecs[generator.default]


def ids_of(generator, text):
    return codec(generator).tokenizer(text, add_special_tokens=False)["input_ids"]


def test_pieces_join_to_the_reply(generator):
    for changes in ({"temperature": 0}, {"temperature": 1.5, "seed": 3}, {"num_beams": 3, "temperature": 0}):
        pieces = list(generator.stream(*ASK, **changes))
        assert "".join(pieces) == generator.reply(*ASK, **changes)
    shown = [piece for piece in generator.stream(*ASK, temperature=0) if piece]
    assert len(shown) > 1
    assert len([piece for piece in generator.stream(*ASK, temperature=0, num_beams=3) if piece]) == 1


def test_whole_numbers_are_numbers(generator):
    """A browser sends 2.0 as 2, and transformers wants a float."""
    assert generator.reply(*ASK, temperature=2, top_p=1, seed=1) == generator.reply(
        *ASK, temperature=2.0, top_p=1.0, seed=1
    )


def test_every_sampling_control_has_an_effect(generator):
    """Upstream never sets do_sample: temperature, top p and top k do nothing (issue 232)."""

    def replies(**changes):
        return {
            generator.reply(*ASK, seed=seed, **{"temperature": 2.0, "top_p": 1.0, "top_k": 0} | changes)
            for seed in range(6)
        }

    greedy = generator.reply(*ASK, temperature=0)
    assert len(replies()) > 3
    assert replies(temperature=0) == {greedy}
    assert replies(top_k=1) == {greedy}
    assert replies(top_p=1e-6) == {greedy}
    assert greedy.startswith(generator.reply(*ASK, temperature=0, max_new_tokens=3))
    assert len(generator.reply(*ASK, temperature=0, max_new_tokens=3)) < len(greedy)
    assert generator.reply(*ASK, temperature=0, num_beams=4) != greedy


def test_a_seed_repeats_an_answer(generator):
    assert generator.reply(*ASK, temperature=2.0, seed=5) == generator.reply(*ASK, temperature=2.0, seed=5)


def test_a_batch_answers_as_one_by_one(generator):
    asked = [
        ("Hi.", ""),
        ("Where does the camel live, and what does it eat?", "Animal: camel"),
        ("Add the numbers.", "2 + 7"),
    ]
    assert list(generator.batch(asked, temperature=0)) == [generator.reply(*pair, temperature=0) for pair in asked]


def test_it_stops_at_the_end_token_and_does_not_show_it(generator):
    [stop] = codec(generator).stop_ids
    hello = ids_of(generator, "Hello")
    for answer in ([[*hello, stop, *hello]], [[token] for token in (*hello, stop)]):
        answering = scripted(generator, *answer)
        assert answering.reply(*ASK) == "Hello"
        assert list(answering.batch([ASK])) == ["Hello"]
    assert stop == codec(generator).tokenizer.eos_token_id


TEXTS = ["  Two words \n\n and a line.  \n", "🦙 Hello, 你好 ", "", " \n ", "One  two\n\n"]


@pytest.mark.parametrize("text", TEXTS)
def test_a_stream_is_stripped_as_the_template_strips_an_answer(generator, text):
    ids = ids_of(generator, text)
    answer = codec(generator).template.response(codec(generator).tokenizer.decode(ids))
    one_by_one = scripted(generator, *([token] for token in ids))
    pieces = list(one_by_one.stream(*ASK))
    assert "".join(pieces) == one_by_one.reply(*ASK) == scripted(generator, ids).reply(*ASK) == answer
    assert len(pieces) == len(ids) + 1
    assert list(scripted(generator, ids).batch([ASK])) == [answer]


def test_pieces_of_white_space_wait_for_a_text():
    stripping = Stripping()
    assert [stripping.add(piece) for piece in (" ", "\n a", " ", " b", "\n", "")] == ["", "a", "", "  b", "", ""]


def test_control_tokens_are_not_shown(generator):
    hello = ids_of(generator, "Hello")
    bos = codec(generator).tokenizer.bos_token_id
    assert scripted(generator, [bos], *([token] for token in hello), [bos]).reply(*ASK) == "Hello"


def test_a_stream_decodes_in_linear_time(generator):
    """Counted in decoded tokens: an answer that is decoded anew at every token has half the square of its length."""
    tokenizer = codec(generator).tokenizer
    words = tokenizer("Hello, 你好, 🦙! ", add_special_tokens=False)["input_ids"] * 500

    class Counting(Codec):
        def decode(self, ids):
            decoded.append(len(ids))
            return super().decode(ids)

    def cost(tokens):
        decoded.clear()
        counting = Counting(tokenizer, codec(generator).template, None, 10_000)
        answering = Generator({BASE: counting}, Scripted(*([token] for token in words[:tokens])), max_length=512)
        assert "".join(answering.stream(*ASK)) == tokenizer.decode(words[:tokens]).strip()
        return sum(decoded)

    decoded = []

    assert cost(2000) < 2.5 * cost(1000)
    assert cost(2000) < 20 * 2000


def test_a_reader_who_leaves_stops_the_answer(generator):
    answering = scripted(generator, [5], [6], [7])
    for leave in (lambda stream: stream.close(), lambda stream: None):
        stream = answering.stream(*ASK)
        next(stream)
        assert answering.token_generator.open == 1
        leave(stream)
        del stream
        assert answering.token_generator.open == 0


def test_two_streams_of_one_reader(generator):
    """A stream that is read half does not keep the next answer waiting."""
    alone = generator.reply(*ASK, temperature=0)
    half_read = generator.stream("Add the numbers.", "2 + 7", temperature=1.5, seed=1)
    first = next(half_read)
    assert generator.reply(*ASK, temperature=0) == alone
    assert first + "".join(half_read) == generator.reply("Add the numbers.", "2 + 7", temperature=1.5, seed=1)


def test_a_prompt_longer_than_the_model_is_refused(generator):
    with pytest.raises(ConfigError, match="this model takes at most 512"):
        generator.reply("word " * 600)


def test_an_answer_that_may_go_beyond_the_context_is_refused_by_how_much(generator):
    long = "word " * 60
    used = len(generator.prompt_ids(long))
    message = (
        f"{used} tokens and max_new_tokens is 500, together {used - 12} more than the 512 .*to {512 - used} or less"
    )
    with pytest.raises(ConfigError, match=message):
        generator.reply(long, max_new_tokens=500)
    answering = scripted(generator, [2])
    answering.reply(long, max_new_tokens=None)
    [request] = answering.token_generator.asked
    assert request.sampling.max_new_tokens == 512 - used > 0
    assert generator.reply(long, temperature=0, max_new_tokens=512 - used)


def test_what_training_saw_is_what_generation_feeds(generator):
    from lora_alpaca.data.encoding import Encoder

    answering = scripted(generator, [2])
    answering.reply("Say {input} and </s>.", "Ä 12")
    [request] = answering.token_generator.asked
    fed = request.prompt_ids
    rows = [Conversation.of("Say {input} and </s>.", "Ä 12", "Yes.")]
    example = Encoder.for_prompts(codec(generator).tokenizer, codec(generator).template).encode(rows)[0]
    assert example.ids[: len(fed)].tolist() == fed
    assert example.spans[0][0] == len(fed)


def test_history_and_system_message_are_encoded_as_training_has_them(tiny_llama):
    from lora_alpaca.data.encoding import Encoder
    from lora_alpaca.prompts import Message, load_template

    config = GenerateConfig(
        base_model=str(tiny_llama),
        lora_weights="none",
        prompt_template="vicuna",
        system="You are an owl.",
        device="cpu",
    )
    generator = Generator.load(config)
    messages = [
        ("system", "You are an owl."),
        ("user", "Hi."),
        ("assistant", "Hoo."),
        ("user", "And?"),
        ("assistant", "Hoo!"),
    ]
    row = Conversation(tuple(Message(*message) for message in messages))
    trained = Encoder.for_prompts(codec(generator).tokenizer, load_template("vicuna")).encode([row])[0].ids.tolist()
    fed = generator.prompt_ids("And?", history=[("Hi.", "Hoo.")])
    assert trained[: len(fed)] == fed
    assert len(fed) > len(generator.prompt_ids("And?"))


def test_what_a_template_does_not_take_is_refused(generator):
    from lora_alpaca.errors import TemplateError

    with pytest.raises(TemplateError, match="2 turns, and the template alpaca takes one; use vicuna, chatml or chat"):
        generator.reply("And the bee?", history=[("Where does the owl live?", "Here.")])


# ------------------------------------------------------------------------------------------------ how an answer ended


def test_an_answer_says_why_it_ended_and_what_it_cost(generator):
    hello, [stop] = ids_of(generator, "Hello"), codec(generator).stop_ids
    ended = scripted(generator, *([token] for token in (*hello, stop))).stream(*ASK)
    assert (ended.finish_reason, ended.text) == (None, "")
    assert ended.read() == ended.text == "Hello"
    assert (ended.finish_reason, ended.ended_by, ended.stop) == ("stop", stop, None)
    assert ended.completion_tokens == len(hello) + 1
    assert ended.prompt_tokens == len(generator.prompt_ids(*ASK))
    cut = scripted(generator, *([token] for token in hello)).stream(*ASK)
    assert (cut.read(), cut.finish_reason, cut.ended_by) == ("Hello", "length", None)


@pytest.mark.parametrize(
    ("stop", "answer", "found"),
    [
        (("live",), "owls", "live"),
        (("owls live", "live in"), "", "owls live"),
        (("trees", "in tr"), "owls live", "in tr"),
        (("treesx",), "owls live in trees", None),
        (("s live in t", "live"), "owls", "live"),
    ],
)
def test_a_stop_text_ends_an_answer_and_nothing_of_it_is_shown(generator, stop, answer, found):
    """The first that is complete counts, however the text falls into tokens; what may become a stop text waits."""
    ids = ids_of(generator, "owls live in trees")
    pieces = ["o", "wls", " li", "ve i", "n tr", "ees"]
    texts = StopTexts(stop)
    shown = [texts.add(piece) for piece in pieces]
    whole = "".join(shown) + (texts.flush() if texts.found is None else "")
    assert (whole.strip(), texts.found) == (answer, found)
    answering = scripted(generator, *([token] for token in ids)).stream(*ASK, stop=stop)
    told = ""
    for piece in answering:
        told += piece
        assert "owls live in trees".startswith(told)
        assert answer.startswith(told)
    assert (told, answering.stop, answering.finish_reason) == (answer, found, "stop" if found else "length")


def test_a_stop_text_stops_the_model(generator):
    answering = scripted(generator, *([token] for token in ids_of(generator, "owls live in trees")))
    stream = answering.stream(*ASK, stop=("owls",))
    assert stream.read() == ""
    assert answering.token_generator.open == 0


def test_log_probabilities_are_told_for_what_is_shown(generator):
    hello, [stop] = ids_of(generator, "Hello owl"), codec(generator).stop_ids
    answer = scripted(generator, *([token] for token in (*hello, stop))).stream(*ASK, logprobs=1)
    assert answer.tokens == []
    answer.read()
    assert [token.id for token in answer.tokens] == hello
    assert [token.logprob for token in answer.tokens] == [-0.5] * len(hello)
    assert scripted(generator, hello).stream(*ASK).read() and not scripted(generator, hello).stream(*ASK).tokens


def test_no_token_of_a_stop_text_is_told(generator):
    """Neither while it may become one, nor after, however many tokens arrive at once."""
    ids = ids_of(generator, "owls live in trees")
    one_by_one, at_once = [[token] for token in ids], [ids]
    for answer in (one_by_one, at_once):
        asked = scripted(generator, *answer).stream(*ASK, stop=("live in",), logprobs=0)
        for _ in asked:
            told = "".join(token.text for token in asked.tokens).strip()
            assert "owls".startswith(told)
        assert (asked.text, told) == ("owls", "owls")


REFUSED = {
    "temperature": [-1, float("nan"), float("inf"), 1e9, "0.7", True, None],
    "top_p": [0, 1.5, float("nan")],
    "top_k": [-1, 2.5],
    "min_p": [-0.1, 1.1],
    "repetition_penalty": [0, -1, float("inf")],
    "num_beams": [0, 1000, 1.5],
    "max_new_tokens": [0, -5, 2.5, True],
    "seed": [-1, 1.5],
    "logprobs": [-1, 21],
    "stop": [("",), ("x",) * 17, (1,)],
    "presence_penalty": [3],
    "frequency_penalty": [-3],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in REFUSED.items() for value in values])
def test_a_value_out_of_range_is_refused_by_name(generator, name, value):
    """transformers takes a temperature of infinity, a top p of 1.5 and a thousand beams."""
    with pytest.raises(ConfigError, match=f"^{name} "):
        generator.reply(*ASK, **{name: value})
    with pytest.raises(ConfigError, match=f"^{name} "):
        Sampling(**{name: value})


# -------------------------------------------------------------------------------------------------------- many at once


def test_a_batch_takes_prompts_as_they_are_needed_and_yields_in_order(generator):
    taken = []

    def prompts():
        for number in range(1000):
            taken.append(number)
            yield f"Question {number}."

    answering = scripted(generator, ids_of(generator, "Hello"))
    answers = answering.batch(prompts())
    assert [next(answers) for _ in range(3)] == ["Hello"] * 3
    assert len(taken) < 100
    asked = [codec(generator).tokenizer.decode(request.prompt_ids) for request in answering.token_generator.asked]
    assert all(f"Question {number}." in text for number, text in enumerate(asked))
    answers.close()
    assert answering.token_generator.open == 0


def test_a_prompt_that_cannot_be_asked_raises_in_its_place(generator):
    prompts = ["Hi.", "word " * 600, "Hi."]
    answering = scripted(generator, ids_of(generator, "Hello"))
    first, second, third = answering.answers(prompts)
    assert first.read() == third.read() == "Hello"
    with pytest.raises(ConfigError, match="this model takes at most 512"):
        second.read()
    batch = answering.batch(prompts)
    assert next(batch) == "Hello"
    with pytest.raises(ConfigError, match="this model takes at most 512"):
        next(batch)


def test_chat_takes_messages_and_a_bare_text_is_continued(generator):
    assert generator.chat([{"role": "user", "content": ASK[0]}], temperature=0).read() == generator.reply(
        *ASK, temperature=0
    )
    continued = generator.complete("Where does the owl", temperature=0, max_new_tokens=4)
    tokenizer = codec(generator).tokenizer
    assert continued.prompt_tokens == len(tokenizer("Where does the owl")["input_ids"])
    by_ids = generator.complete(tokenizer("Where does the owl")["input_ids"], temperature=0, max_new_tokens=4)
    assert by_ids.read() == continued.read() != ""


def test_a_folder_is_enough_to_load(tiny_llama, tmp_path):
    from short_run import adapter

    rows = [Conversation.of("Where does the owl live?", "", f"In trees {number}.") for number in range(12)]
    folder = adapter(tmp_path, tiny_llama, rows, max_steps=1, val_set_size=0)
    config = GenerateConfig(lora_weights=str(folder), temperature=0, dtype="fp32")
    assert Generator.load(folder, temperature=0, dtype="fp32").reply(*ASK) == Generator.load(config).reply(*ASK)
    model = Generator.load(tiny_llama, prompt_template="alpaca", temperature=0, max_new_tokens=3)
    assert model.names == [BASE] and model.reply(*ASK)


def test_an_adapter_that_is_not_there_is_an_error(generator):
    with pytest.raises(ConfigError, match="adapter 'mine': there are base"):
        generator.answer(generator.conversation(*ASK), adapter="mine")


@pytest.mark.parametrize("ids", [[], [-1], [10_000_000], [1.0], [True], ["1"], [1, None]])
def test_ids_that_the_model_does_not_have_are_refused(generator, ids):
    """The embedding would raise an IndexError; on CUDA, it ends the process."""
    with pytest.raises(ConfigError, match=r"the prompt (is empty|has the id)"):
        generator.complete(ids)
