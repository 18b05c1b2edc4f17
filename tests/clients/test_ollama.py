"""Ollama's Modelfile, rendered by Go's own text/template: the ids of training, for every template and row."""

import itertools
import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from gguf_files import facts_of
from transformers import AutoTokenizer

from lora_alpaca.data.encoding import Encoder
from lora_alpaca.export.writers.ollama import modelfile
from lora_alpaca.prompts import Conversation, Message, template_names
from lora_alpaca.prompts.jinja import chat_messages

pytestmark = [
    pytest.mark.clients,
    pytest.mark.skipif(shutil.which("go") is None, reason="go is not installed; apt-get install golang-go"),
]

CHATML = (  # Qwen2's, without tools (Apache-2.0)
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content']}}"
    "{{'<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA2 = (  # the shape of Llama 2's
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + message['content'] + "
    "' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + ' ' + eos_token }}"
    "{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def render(tmp_path_factory):
    """Return `render(modelfile, conversations)`: the prompts that Go makes of conversations of messages."""
    folder = tmp_path_factory.mktemp("go")
    environment = {"GOCACHE": str(folder / "cache"), "GO111MODULE": "off", "HOME": str(folder), "PATH": "/usr/bin:/bin"}
    program = folder / "render"
    source = Path(__file__).parent / "render.go"
    subprocess.run(["go", "build", "-o", str(program), str(source)], check=True, env=environment)

    def run(text, conversations):
        given = json.dumps({"modelfile": text, "conversations": conversations})
        done = subprocess.run([str(program)], input=given, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def conversations(rows, template):
    """Return 200 prompts that a template takes: rows, odd texts, and several turns with a system message."""
    asked = [row.question for row in rows]
    odd = ["{{ .System }}", "\u00a0soft\u00adhyphen", 'three """ quotes', "```\nx\n```", "   a"]
    found = [(message,) for message in [*asked, *(Message("user", text) for text in odd)]]
    if getattr(template, "turn", "chat"):
        for first, second in itertools.pairwise(asked):
            turns = (first, Message("assistant", "Yes, it is."), replace(second, input=""))
            system = Message("system", "Be brief.")
            found += [turns, (system, first), (system, *turns)]
    for number, messages in enumerate(found[: 200 - len(found)] if len(found) < 200 else [], start=1):
        found.append((*messages[:-1], replace(messages[-1], text=f"{number}. {messages[-1].text}")))
    while len(found) < 200:
        found.append((replace(found[len(found) - 50][0], text=f"Say {len(found)}."),))
    prompts = [Conversation(messages) for messages in found[:200]]
    for prompt in prompts:
        template.check(prompt)
    return prompts


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Gemma"])
@pytest.mark.parametrize("name", sorted(set(template_names()) - {"chat"}))
def test_go_writes_the_prompt_of_training(name, family, tiny_model, rows, render, tmp_path, record_property):
    folder = tiny_model(family)
    if name == "chatml":
        folder = shutil.copytree(folder, tmp_path / "model")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
        tokenizer.save_pretrained(folder)
    _same_ids(facts_of(folder, name), rows, render, record_property)


@pytest.mark.parametrize(("source", "family"), [(CHATML, "Qwen2")])
def test_go_writes_the_prompt_of_a_chat_template(source, family, tiny_model, rows, render, tmp_path, record_property):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model(family), folder)
    (folder / "chat_template.jinja").write_text(source)
    _same_ids(facts_of(folder, "chat"), rows, render, record_property)


def test_a_chat_template_that_is_no_plain_one_is_told(tiny_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model("Llama"), folder)
    (folder / "chat_template.jinja").write_text(
        LLAMA2.replace("' [/INST]'", "('!' if loop.first else '?') + ' [/INST]'")
    )
    text, notes = modelfile(facts_of(folder, "chat"), "model.gguf")
    assert 'TEMPLATE "' not in text
    assert notes[0].startswith("warning: Modelfile: it has no TEMPLATE (the chat template writes some turns otherwise")


def _same_ids(facts, rows, render, record_property):
    text, notes = modelfile(facts, "model-f16.gguf")
    assert notes == []
    encoder = Encoder.for_prompts(facts.tokenizer, facts.template)
    asked = conversations(rows, facts.template)
    prompts = render(text, [chat_messages(facts.template, one) for one in asked])
    begins = facts.template.begins_itself
    ids = [facts.tokenizer(prompt, add_special_tokens=not begins)["input_ids"] for prompt in prompts]
    expected = [encoder.prompt(one) for one in asked]
    different = [n for n in range(len(asked)) if ids[n] != expected[n]]
    record_property("prompts with the ids of training", f"{len(asked) - len(different)} of {len(asked)}")
    assert not different, (prompts[different[0]], facts.tokenizer.decode(expected[different[0]]))
