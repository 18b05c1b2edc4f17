"""Tools: given to the template, called by the model in the template's form, and given back as calls."""

import json
from pathlib import Path

import openai
import pytest
from conftest import LLAMA_SIZES
from running_server import Running, load, scripted, serving

from lora_alpaca.inference.sampling import Token
from lora_alpaca.inference.server.tool_calls import CallFinder, learn
from lora_alpaca.inference.token_generator import Channel, TokenStream

pytest_plugins = ["server_fixtures"]

TEMPLATES = Path(__file__).parent.parent.parent / "prompts" / "chat_templates"
FAMILIES = {  # the tiny model, its control tokens, the begin and end tokens, and what a call is written as
    "qwen3": ("Qwen2", ["<|im_start|>", "<|im_end|>"], {"eos_token": "<|im_end|>"}, "<tool_call>\n{}\n</tool_call>"),
    "hermes_3": (
        "GPT2", ["<s>", "<|im_start|>", "<|im_end|>"], {"bos_token": "<s>", "eos_token": "<|im_end|>"},
        "<tool_call>\n{}\n</tool_call>",
    ),
    "llama_3_1": (
        "GPT2", ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"],
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}, "{}",
    ),
    "mistral_nemo": (
        "GPT2", ["<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
                 "[/TOOL_RESULTS]", "[TOOL_CALLS]"],
        {"bos_token": "<s>", "eos_token": "</s>"}, "[TOOL_CALLS][{}]",
    ),
}  # fmt: skip
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"Return the {name}.",
            "parameters": {
                "type": "object",
                "properties": {
                    "place": {"type": "string", "enum": ["Cusco", "Lima"], "description": "Where."},
                    "days": {"type": "integer", "minimum": 1, "maximum": 9, "description": "How many."},
                },
                "required": ["place", "days"],
                "additionalProperties": False,
            },
        },
    }
    for name in ("temperature", "population")
]
CHATML = (
    "{{bos_token}}{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QUESTION = [{"role": "user", "content": "Is it warm in Cusco?"}]


class Scripted:
    """A token generator that answers with given ids, in one step each, and then with the end token."""

    def __init__(self):
        self.ids, self.prompts = [], []

    def generate(self, request):
        self.prompts.append(list(request.prompt_ids))
        channel = Channel()
        for number in [*self.ids, request.stop_ids[0]]:
            channel.put([Token(number)])
        channel.end()
        return TokenStream(channel)

    def close(self):
        pass


def model(tiny_model, folder, name):
    """Make a folder of a tiny model whose tokenizer has a public chat template."""
    import torch
    from transformers import AddedToken, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    base, tokens, named, _ = FAMILIES[name]
    tokenizer = AutoTokenizer.from_pretrained(tiny_model(base))
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in tokens], True)
    for key, token in named.items():
        setattr(tokenizer, key, token)
    source = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    tokenizer.chat_template = {"default": CHATML, "tool_use": source} if name == "hermes_3" else source
    tokenizer.save_pretrained(folder)
    sizes = LLAMA_SIZES | {"max_position_embeddings": 4096}
    torch.manual_seed(0)
    network = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, **sizes))
    network.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tiny_model, tmp_path_factory):
    """Return a family's name, a generator of it, and a server whose answers are scripted."""
    generator = load(model(tiny_model, tmp_path_factory.mktemp(request.param), request.param), prompt_template="chat")
    script = Scripted()
    with serving(None) as running:
        running.service.use(scripted(generator, script))
        yield request.param, generator, script, running
    generator.close()


def written(name, function, arguments):
    """Return a call as the models of a family write it."""
    key = "parameters" if name == "llama_3_1" else "arguments"
    return FAMILIES[name][3].replace("{}", json.dumps({"name": function, key: arguments}))


def ids_of(generator, text):
    tokenizer = generator.codecs[generator.default].tokenizer
    return tokenizer.encode(text, add_special_tokens=False)


def ask(running: Running, **parameters):
    return running.ask(**{"messages": QUESTION, "tools": TOOLS, "max_tokens": 300} | parameters)


def streamed(chunks):
    """Return content, calls and end of a stream of one choice."""
    content, calls, finish = "", [], None
    for chunk in chunks:
        [choice] = chunk.choices
        content += choice.delta.content or ""
        calls += choice.delta.tool_calls or []
        finish = choice.finish_reason or finish
    return content, calls, finish


@pytest.mark.parametrize("said", ["", "I look it up. "])
def test_a_call_is_given_back(family, said):
    name, generator, script, running = family
    if said and name == "llama_3_1":
        pytest.skip("a call has no mark there: it is the whole answer")
    script.ids = ids_of(generator, said + written(name, "temperature", {"place": "Cusco", "days": 2}))
    [choice] = ask(running).choices
    assert choice.finish_reason == "tool_calls"
    [call] = choice.message.tool_calls
    assert call.type == "function" and call.function.name == "temperature"
    assert json.loads(call.function.arguments) == {"place": "Cusco", "days": 2}
    assert (choice.message.content or "") == said.strip()
    assert len(call.id) == 9 and call.id.isalnum()
    content, calls, finish = streamed(ask(running, stream=True))
    assert (content.strip(), finish) == (said.strip(), "tool_calls")
    assert [one.function for one in calls] == [type(calls[0].function)(**call.function.model_dump())]


def test_a_conversation_with_calls_goes_on(family):
    """What the API gave is given back to it, with the result; the prompt is what the template makes of it."""
    name, generator, script, running = family
    script.ids = ids_of(generator, written(name, "temperature", {"place": "Cusco", "days": 2}))
    message = ask(running).choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": '{"celsius": 12}'}
    script.ids = ids_of(generator, "No.")
    [choice] = ask(running, messages=[*QUESTION, message, result]).choices
    assert (choice.message.content, choice.finish_reason, choice.message.tool_calls) == ("No.", "stop", None)
    prompt = generator.codecs[generator.default].tokenizer.decode(script.prompts[-1])
    assert "celsius" in prompt and "population" in prompt and "days" in prompt


@pytest.mark.parametrize(
    "text",
    [
        "It is warm.",
        "{",
        "<tool_call>",
        '<tool_call>\n{"name": 1}\n</tool_call>',
        '{"name": "none"}',
        "a < b and <tool",
    ],
)
def test_what_is_no_call_stays_text(family, text):
    _, generator, script, running = family
    script.ids = ids_of(generator, text)
    [choice] = ask(running).choices
    assert (choice.message.content, choice.finish_reason, choice.message.tool_calls) == (text, "stop", None)
    assert streamed(ask(running, stream=True)) == (text, [], "stop")


def test_without_tools_nothing_is_a_call(family):
    name, generator, script, running = family
    call = written(name, "temperature", {"place": "Cusco", "days": 2})
    script.ids = ids_of(generator, call)
    for choice in (ask(running, tool_choice="none"), running.ask(messages=QUESTION, max_tokens=300)):
        assert choice.choices[0].finish_reason == "stop"
        assert choice.choices[0].message.content == call.removeprefix("[TOOL_CALLS]")  # a control token
    assert "population" not in generator.codecs[generator.default].tokenizer.decode(script.prompts[-1])


def test_every_split_of_a_call_is_the_same(family):
    name, generator, _, _ = family
    form = learn(generator.codecs[generator.default])
    text = "Well. " * (name != "llama_3_1") + written(name, "population", {"place": "Lima", "days": 1})
    for size in (1, 2, 3, 7, len(text)):
        finder = CallFinder(form, ["population"])
        shown = "".join(finder.add(text[start : start + size]) for start in range(0, len(text), size)) + finder.end()
        assert shown.strip() == ("Well." if name != "llama_3_1" else "")
        assert json.loads(finder.calls[0]["function"]["arguments"]) == {"place": "Lima", "days": 1}


def test_a_call_can_be_asked_for(family):
    """The weights are random, so it is the grammar that makes the call."""
    _, generator, _, _ = family
    with serving(generator) as running:
        for choice, names in (
            ("required", {"temperature", "population"}),
            ({"type": "function", "function": {"name": "population"}}, {"population"}),
        ):
            [found] = ask(running, tool_choice=choice, temperature=1, seed=3, top_p=1).choices
            assert found.finish_reason == "tool_calls", found
            for call in found.message.tool_calls:
                arguments = json.loads(call.function.arguments)
                assert call.function.name in names
                assert arguments["place"] in ("Cusco", "Lima") and 1 <= arguments["days"] <= 9 and len(arguments) == 2
        with pytest.raises(openai.BadRequestError, match="there is no such tool"):
            ask(running, tool_choice={"type": "function", "function": {"name": "none"}})
        with pytest.raises(openai.BadRequestError, match="exclude each other"):
            ask(running, response_format={"type": "json_object"})


def test_a_template_without_tools_says_so(server):
    with pytest.raises(openai.BadRequestError, match="tools, and the template alpaca has none"):
        ask(server, max_tokens=4)
