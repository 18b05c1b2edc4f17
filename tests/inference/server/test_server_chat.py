"""`/v1/chat/completions`, asked by OpenAI's own client."""

import json

import openai
import pytest

pytest_plugins = ["server_fixtures"]

QUESTION = "Where does the owl live?"
GREEDY = {"temperature": 0, "max_new_tokens": 12}


@pytest.fixture(scope="module")
def expected(generator):
    return generator.reply(QUESTION, **GREEDY)


def test_an_answer_is_that_of_the_generator(server, generator, expected):
    found = server.ask()
    answer = generator.stream(QUESTION, **GREEDY)
    answer.read()
    [choice] = found.choices
    assert choice.message.content == expected
    assert choice.message.role == "assistant"
    assert choice.finish_reason == answer.finish_reason
    assert found.object == "chat.completion"
    assert found.usage.prompt_tokens == len(generator.prompt_ids(QUESTION))
    assert found.usage.completion_tokens == answer.completion_tokens
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens


def test_a_stream_is_the_same_answer_in_pieces(server, expected):
    chunks = list(server.ask(stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert "".join(pieces) == expected
    assert len(pieces) > 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason in ("stop", "length")
    assert chunks[-1].choices == [] and chunks[-1].usage == server.ask().usage
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_a_stream_has_no_counts_unless_asked(server):
    assert all(chunk.choices and chunk.usage is None for chunk in server.ask(stream=True))


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities(server, generator, stream):
    answer = generator.stream(QUESTION, logprobs=3, **GREEDY)
    answer.read()
    found = server.ask(logprobs=True, top_logprobs=3, stream=stream)
    choices = [chunk.choices[0] for chunk in found] if stream else found.choices
    content = [token for choice in choices if choice.logprobs for token in choice.logprobs.content]
    assert [token.logprob for token in content] == [token.logprob for token in answer.tokens]
    assert [[top.logprob for top in token.top_logprobs] for token in content] == [
        [value for _, value in token.top] for token in answer.tokens
    ]
    shown = b"".join(bytes(token.bytes) for token in content).decode(errors="replace")
    assert shown.strip() == answer.text
    assert "".join(token.token for token in content if "\ufffd" not in token.token).strip() in shown


def test_several_choices(server):
    found = server.ask(n=3, temperature=1.5, seed=5, top_p=1)
    assert [choice.index for choice in found.choices] == [0, 1, 2]
    texts = [choice.message.content for choice in found.choices]
    assert len(set(texts)) > 1
    assert texts == [choice.message.content for choice in server.ask(n=3, temperature=1.5, seed=5, top_p=1).choices]
    assert texts[0] == server.ask(temperature=1.5, seed=5, top_p=1).choices[0].message.content
    streamed = ["", "", ""]
    for chunk in server.ask(n=3, temperature=1.5, seed=5, top_p=1, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts
    assert found.usage.prompt_tokens == server.ask().usage.prompt_tokens


def test_a_seed_is_the_generators(server, generator):
    for seed in (0, 7, -1):
        text = server.ask(temperature=1.2, seed=seed).choices[0].message.content
        assert text == generator.reply(QUESTION, temperature=1.2, seed=seed % 2**63, max_new_tokens=12)


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_text_ends_an_answer(server, expected, stream):
    stop = expected[3:5]
    found = server.ask(stop=stop, stream=stream, logprobs=True)
    choices = [chunk.choices[0] for chunk in found] if stream else found.choices
    text = "".join((choice.delta if stream else choice.message).content or "" for choice in choices)
    assert text == expected[: expected.index(stop)].rstrip()
    assert choices[-1].finish_reason == "stop"
    tokens = [token.token for choice in choices if choice.logprobs for token in choice.logprobs.content]
    assert len("".join(tokens[:-1]).lstrip()) <= len(text)  # of the stop text no token is told
    assert server.ask(stop=["no such text", stop]).choices[0].message.content == text


def test_a_bias_decides(server, generator):
    token = server.ask(logprobs=True).choices[0].logprobs.content[0].token
    [answer] = [generator.stream(QUESTION, logprobs=0, **GREEDY)]
    answer.read()
    first = answer.tokens[0].id
    other = server.ask(logprobs=True, logit_bias={str(first): -100}).choices[0].logprobs.content[0].token
    assert other != token


def test_the_whole_context_is_used_where_no_length_is_asked(server, generator):
    long = server.client.chat.completions.create(
        model="", messages=[{"role": "user", "content": QUESTION}], temperature=0, stop=["\0"],
        logit_bias={str(number): -100 for number in generator.codecs[generator.default].stop_ids},
    )  # fmt: skip
    assert long.usage.total_tokens == generator.max_length
    assert long.choices[0].finish_reason == "length"


@pytest.mark.parametrize(
    "content", [[{"type": "text", "text": "Where does "}, {"type": "text", "text": "the owl live?"}], QUESTION]
)
def test_content_may_be_parts_of_text(server, expected, content):
    assert server.ask(messages=[{"role": "user", "content": content}]).choices[0].message.content == expected


@pytest.mark.parametrize(
    "message",
    [
        {"content": "Name the opposite.\n\n### Input:\nWord: hot"},
        {"content": "Name the opposite.", "input": "Word: hot"},
    ],
)
def test_an_input_is_in_the_content(server, generator, message):
    """As every server takes it that renders the chat template which our exports bring."""
    expected = generator.stream("Name the opposite.", "Word: hot", **GREEDY)
    found = server.ask(messages=[{"role": "user"} | message])
    assert found.choices[0].message.content == expected.read()
    assert found.usage.prompt_tokens == expected.prompt_tokens


def test_models(server, generator):
    assert [model.id for model in server.client.models.list()] == [generator.base_name.rpartition("/")[2]]
    assert server.client.models.retrieve("base").id == "base"
    with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-4'; there are "):
        server.ask(model="gpt-4")
    with pytest.raises(openai.NotFoundError):
        server.client.models.retrieve("gpt-4")
    assert server.ask(model="base").model == "base"


REFUSED = {
    "a system message": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi."}],
    "turns, and the template alpaca takes one": [
        {"role": "user", "content": "Hi."},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "And now?"},
    ],
    "only text is taken": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}],
    "the last one is the assistant's": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "He"}],
    "a user turn after a user turn": [{"role": "user", "content": "Hi."}, {"role": "user", "content": "Ho."}],
    "role is \"wizard\"": [{"role": "wizard", "content": "Hi."}],
    "content is missing": [{"role": "user", "content": None}],
    "question is empty": [{"role": "user", "content": ""}],
    "an assistant turn": [{"role": "assistant", "content": "Hi."}, {"role": "user", "content": "Ho."}],
}  # fmt: skip


@pytest.mark.parametrize("words", REFUSED)
def test_what_a_template_cannot_hold_is_refused(server, words):
    with pytest.raises(openai.BadRequestError) as error:
        server.ask(messages=REFUSED[words])
    assert words in error.value.message


SCHEMA = {
    "type": "object",
    "properties": {"animal": {"enum": ["owl", "alpaca"]}, "legs": {"type": "integer", "minimum": 0, "maximum": 8}},
    "required": ["animal", "legs"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("seed", range(4))
def test_an_answer_of_a_schema_is_of_it(server, seed):
    asked = {"type": "json_schema", "json_schema": {"name": "animal", "schema": SCHEMA, "strict": True}}
    found = server.ask(response_format=asked, temperature=2, top_p=1, seed=seed, max_tokens=100)
    value = json.loads(found.choices[0].message.content)
    assert found.choices[0].finish_reason == "stop"
    assert value["animal"] in ("owl", "alpaca") and 0 <= value["legs"] <= 8 and len(value) == 2


def test_an_answer_that_shall_be_json_begins_as_an_object(server):
    found = server.ask(response_format={"type": "json_object"}, max_tokens=40)
    assert found.choices[0].message.content.startswith("{")


@pytest.mark.parametrize(
    "schema", [{"type": "nope"}, {"not": {}}, {"$ref": "http://example.org/x"}, {"enum": []}, None]
)
def test_a_schema_that_cannot_be_followed_is_refused(server, schema):
    with pytest.raises(openai.BadRequestError, match="response_format"):
        server.ask(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
