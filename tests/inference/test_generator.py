import pytest

from lora_alpaca import GenerateConfig, Generator
from lora_alpaca.errors import ConfigError
from lora_alpaca.inference.generator import stripped


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
        self.answer, self.asked, self.open = answer, [], 0

    def generate(self, prompt_ids, sampling):
        self.asked.append((list(prompt_ids), sampling))
        self.open += 1
        try:
            yield from self.answer
        finally:
            self.open -= 1

    def generate_batch(self, prompts, sampling):
        self.asked += [(list(prompt), sampling) for prompt in prompts]
        return [[token for ids in self.answer for token in ids] for _ in prompts]

    def close(self):
        pass


def scripted(generator, *answer):
    """Return a generator with the tokenizer and template of another one, and a scripted answer."""
    tokens = Scripted(*answer)
    return Generator(generator.model, generator.tokenizer, generator.template, max_length=512, token_generator=tokens)


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
    assert generator.reply_batch(asked, temperature=0) == [generator.reply(*pair, temperature=0) for pair in asked]


def test_it_stops_at_the_end_token_and_does_not_show_it(generator):
    stop = generator.tokenizer.eos_token_id
    hello = generator.tokenizer("Hello", add_special_tokens=False)["input_ids"]
    for answer in ([[*hello, stop, *hello]], [[token] for token in (*hello, stop)]):
        answering = scripted(generator, *answer)
        assert answering.reply(*ASK) == "Hello"
        assert answering.reply_batch([ASK]) == ["Hello"]
    assert generator.stop_ids == [stop]


TEXTS = ["  Two words \n\n and a line.  \n", "🦙 Hello, 你好 ", "", " \n ", "One  two\n\n"]


@pytest.mark.parametrize("text", TEXTS)
def test_a_stream_is_stripped_as_the_template_strips_an_answer(generator, text):
    ids = generator.tokenizer(text, add_special_tokens=False)["input_ids"]
    answer = generator.template.response(generator.tokenizer.decode(ids))
    one_by_one = scripted(generator, *([token] for token in ids))
    pieces = list(one_by_one.stream(*ASK))
    assert "".join(pieces) == one_by_one.reply(*ASK) == scripted(generator, ids).reply(*ASK) == answer
    assert len(pieces) == len(ids) + 1
    assert scripted(generator, ids).reply_batch([ASK]) == [answer]


def test_pieces_of_white_space_wait_for_a_text():
    assert list(stripped([" ", "\n a", " ", " b", "\n", ""])) == ["", "a", "", "  b", "", ""]


def test_control_tokens_are_not_shown(generator):
    hello = generator.tokenizer("Hello", add_special_tokens=False)["input_ids"]
    bos = generator.tokenizer.bos_token_id
    assert scripted(generator, [bos], *([token] for token in hello), [bos]).reply(*ASK) == "Hello"


def test_a_stream_decodes_in_linear_time(generator):
    """Counted in decoded tokens: an answer that is decoded anew at every token has half the square of its length."""
    tokenizer = generator.tokenizer
    words = tokenizer("Hello, 你好, 🦙! ", add_special_tokens=False)["input_ids"] * 500

    def cost(tokens):
        decoded = []
        answering = scripted(generator, *([token] for token in words[:tokens]))
        decode = tokenizer.decode
        answering._decode = lambda ids: (decoded.append(len(ids)), decode(ids, skip_special_tokens=True))[1]
        assert "".join(answering.stream(*ASK)) == decode(words[:tokens]).strip()
        return sum(decoded)

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


def test_the_answer_ends_where_the_model_does(generator):
    long = "word " * 60
    answering = scripted(generator, [2])
    answering.reply(long, max_new_tokens=100_000)
    [(prompt, sampling)] = answering.token_generator.asked
    assert sampling.max_new_tokens == 512 - len(prompt) > 0
    assert generator.reply(long, temperature=0, max_new_tokens=100_000)


def test_what_training_saw_is_what_generation_feeds(generator):
    from lora_alpaca.data.encoding import Encoder
    from lora_alpaca.prompts import Conversation

    answering = scripted(generator, [2])
    answering.reply("Say {input} and </s>.", "Ä 12")
    [(fed, _)] = answering.token_generator.asked
    rows = [Conversation.of("Say {input} and </s>.", "Ä 12", "Yes.")]
    example = Encoder.for_prompts(generator.tokenizer, generator.template).encode(rows)[0]
    assert example.ids[: len(fed)].tolist() == fed
    assert example.spans[0][0] == len(fed)


def test_chat_in_the_terminal(tiny_llama, tmp_path, monkeypatch):
    import io

    from command import run

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("Where does the owl live?\nAnd the bee?\n\nnever read\n"))
    words = ["--base_model", tiny_llama, "--prompt_template", "alpaca", "--max_new_tokens", 5, "--temperature", 0]
    result = run("generate", "--chat", *words)
    assert result.code == 0
    one = run("generate", "--instruction", "Where does the owl live?", *words).out
    two = run("generate", "--instruction", "And the bee?", *words).out
    assert result.out == one + two


def test_chat_remembers_where_the_template_takes_turns(tiny_llama, tmp_path, monkeypatch):
    import io

    from command import run

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("Where does the owl live?\nAnd the bee?\n"))
    asked = []
    stream = Generator.stream
    monkeypatch.setattr(
        Generator,
        "stream",
        lambda self, *words, history: asked.append(list(history)) or stream(self, *words, history=history),
    )
    words = ["--base_model", tiny_llama, "--prompt_template", "vicuna", "--max_new_tokens", 5, "--temperature", 0]
    first, *_ = run("generate", "--chat", *words).out.splitlines()
    assert asked[0] == []
    assert [turn[0] for turn in asked[1]] == ["Where does the owl live?"]
    assert asked[1][0][1].startswith(first)


def test_history_and_system_message_are_encoded_as_training_has_them(tiny_llama):
    from lora_alpaca.data.encoding import Encoder
    from lora_alpaca.prompts import Conversation, Message, load_template

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
    trained = Encoder.for_prompts(generator.tokenizer, load_template("vicuna")).encode([row])[0].ids.tolist()
    fed = generator.prompt_ids("And?", history=[("Hi.", "Hoo.")])
    assert trained[: len(fed)] == fed
    assert len(fed) > len(generator.prompt_ids("And?"))


def test_what_a_template_does_not_take_is_refused(generator):
    from lora_alpaca.errors import TemplateError

    with pytest.raises(TemplateError, match="2 turns, and the template alpaca takes one; use vicuna, chatml or chat"):
        generator.reply("And the bee?", history=[("Where does the owl live?", "Here.")])
