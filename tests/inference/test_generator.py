import pytest
import torch

from lora_alpaca import GenerateConfig, Generator
from lora_alpaca.errors import ConfigError


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
    assert generator._decode([*hello, stop, *hello]) == generator._decode(hello)
    assert generator.stop_ids == [stop]


@pytest.mark.parametrize("num_beams", [1, 3])
def test_closing_a_stream_stops_the_model(generator, monkeypatch, num_beams):
    calls = []
    forward = generator.model.forward
    monkeypatch.setattr(generator.model, "forward", lambda *a, **k: (calls.append(1), forward(*a, **k))[1])
    stream = generator.stream(*ASK, temperature=0, max_new_tokens=400, num_beams=num_beams)
    next(stream)
    stream.close()
    assert len(calls) < 50


def test_an_error_in_the_model_reaches_the_caller(generator, monkeypatch):
    """Upstream swallows it in the thread: the page just stays empty."""
    monkeypatch.setattr(generator.model, "forward", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generator.reply(*ASK)


def test_a_prompt_longer_than_the_model_is_refused(generator):
    with pytest.raises(ConfigError, match="this model takes at most 512"):
        generator.reply("word " * 600)


def test_the_answer_ends_where_the_model_does(generator, monkeypatch):
    long = "word " * 60
    length = len(generator.prompt_ids(long))
    assert length < 512
    outputs = []
    generate = generator._generate
    monkeypatch.setattr(generator, "_generate", lambda *args: outputs.append(generate(*args)) or outputs[-1])
    generator.reply(long, temperature=0, max_new_tokens=100_000)
    assert outputs[0].shape[1] <= 512


def test_what_training_saw_is_what_generation_feeds(generator, monkeypatch):
    from lora_alpaca.data.encoding import Encoder
    from lora_alpaca.prompts import Conversation

    fed = []
    monkeypatch.setattr(
        generator, "_generate", lambda ids, *rest: fed.append(ids[0].tolist()) or torch.tensor([[*ids[0].tolist(), 2]])
    )
    generator.reply("Say {input} and </s>.", "Ä 12")
    rows = [Conversation.of("Say {input} and </s>.", "Ä 12", "Yes.")]
    example = Encoder.for_prompts(generator.tokenizer, generator.template).encode(rows)[0]
    assert example.ids[: len(fed[0])].tolist() == fed[0]
    assert example.labels[len(fed[0]) - 1] == -100 != example.labels[len(fed[0])]


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
