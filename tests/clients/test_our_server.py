"""`generate --serve`, spoken to by programs that nobody here wrote: litellm, langchain and lm_eval."""

import contextlib
import json
import math
import socket
import subprocess
import sys
import time

import httpx
import pytest
import torch
from conftest import ROOT
from environments import answer

from lora_alpaca import GenerateConfig, Generator
from lora_alpaca.models.base import demo_base

pytestmark = pytest.mark.clients

OPTIONS = {
    "base_model": "demo", "lora_weights": "none", "prompt_template": "alpaca", "device": "cpu", "dtype": "fp32",
}  # fmt: skip
QUESTION = "Where does the owl live?"
GREEDY = {"temperature": 0, "max_new_tokens": 16}


@pytest.fixture(scope="module")
def generator():
    return Generator.load(GenerateConfig(**OPTIONS))


@pytest.fixture(scope="module")
def address():
    """Return the address of a process that serves the demo, with a key."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = [word for name, value in OPTIONS.items() for word in (f"--{name}", value)]
    command = [sys.executable, str(ROOT / "generate.py"), "--serve", "--server_port", str(port), *words]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 300
        while time.monotonic() < end:
            with contextlib.suppress(httpx.ConnectError):
                if httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == 200:
                    break
            assert process.poll() is None
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(30)


LITELLM = """
import json, sys, litellm
given = json.load(sys.stdin)
ask = {"api_base": given["address"], "api_key": "none", "temperature": 0, "max_tokens": 16}
messages = [{"role": "user", "content": given["question"]}]
whole = litellm.completion(model="openai/demo", messages=messages, **ask)
stream = litellm.completion(model="openai/demo", messages=messages, stream=True, **ask)
text = litellm.text_completion(model="text-completion-openai/demo", prompt=given["question"], **ask)
try:
    litellm.completion(model="openai/none", messages=messages, **ask)
except litellm.NotFoundError as error:
    refused = str(error)
print(json.dumps({
    "whole": whole.choices[0].message.content,
    "tokens": whole.usage.total_tokens,
    "stream": "".join(chunk.choices[0].delta.content or "" for chunk in stream),
    "text": text.choices[0].text,
    "refused": refused,
}))
"""


def test_litellm(address, generator):
    found = answer("litellm", LITELLM, {"address": address, "question": QUESTION})
    expected = generator.stream(QUESTION, **GREEDY)
    assert found["whole"] == found["stream"] == expected.read()
    assert found["tokens"] == expected.prompt_tokens + expected.completion_tokens
    assert found["text"] == generator.complete(QUESTION, **GREEDY).read()
    assert "there is no model 'none'" in found["refused"]


LANGCHAIN = """
import json, sys
from typing import Literal
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

class Animal(BaseModel):
    name: Literal["owl", "frog"]
    legs: Literal[2, 4]

given = json.load(sys.stdin)
model = ChatOpenAI(model="demo", base_url=given["address"], api_key="none", temperature=0, max_tokens=16)
long = ChatOpenAI(model="demo", base_url=given["address"], api_key="none", temperature=0, max_tokens=64)
found = long.with_structured_output(Animal, method="json_schema").invoke(given["question"])
print(json.dumps({
    "whole": model.invoke(given["question"]).content,
    "stream": "".join(chunk.content for chunk in model.stream(given["question"])),
    "batch": [reply.content for reply in model.batch([given["question"]] * 3)],
    "animal": found.model_dump(),
}))
"""


def test_langchain(address, generator):
    found = answer("litellm", LANGCHAIN, {"address": address, "question": QUESTION})
    expected = generator.reply(QUESTION, **GREEDY)
    assert [found["whole"], found["stream"], *found["batch"]] == [expected] * 5
    assert found["animal"]["name"] in ("owl", "frog") and found["animal"]["legs"] in (2, 4)


LM_EVAL = """
import json, sys
import lm_eval
from lm_eval.tasks import TaskManager

given = json.load(sys.stdin)
found = {}
for model, path, more, tasks in (
    ("local-completions", "completions", "tokenizer=" + given["tokenizer"], ["homes", "homes_told"]),
    ("local-chat-completions", "chat/completions", "", ["homes_told"]),
):
    arguments = f"base_url={given['address']}/{path},model=demo,num_concurrent=4,max_length=1024"
    done = lm_eval.simple_evaluate(
        model=model,
        model_args=arguments + (",tokenizer_backend=huggingface," + more if more else ""),
        tasks=tasks,
        task_manager=TaskManager(include_path=given["folder"], include_defaults=False),
        apply_chat_template=not more,
        log_samples=True,
        bootstrap_iters=0,
    )
    for task in tasks:
        samples = sorted(done["samples"][task], key=lambda sample: sample["doc_id"])
        found[f"{path} {task}"] = {
            "scores": {key: value for key, value in done["results"][task].items() if isinstance(value, float)},
            "answers": [sample["filtered_resps"] for sample in samples],
        }
print(json.dumps(found))
"""
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
doc_to_text: "{text}"
"""
CHOICES = """
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}]
"""
TOLD = """
output_type: generate_until
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 16}
metric_list: [{metric: exact_match}]
"""


def test_lm_eval(address, generator, tmp_path):
    """A task of choices and one of answers: its likelihoods are those of transformers, its answers ours."""
    homes = ["In a forest.", "In a hive."]
    rows = [
        {"question": f"Where does the {animal} live?", "choices": homes, "answer": number % 2}
        for number, animal in enumerate(("owl", "frog", "bee", "fox", "camel", "penguin"))
    ]
    file = tmp_path / "homes.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    tasks = {"homes": ("Q: {{question}} A:", CHOICES), "homes_told": ("{{question}}", TOLD)}
    for name, (text, rest) in tasks.items():
        (tmp_path / f"{name}.yaml").write_text(TASK.format(name=name, file=file, text=text) + rest)
    given = {"address": address, "tokenizer": demo_base(), "folder": tmp_path}
    found = answer("lm_eval", LM_EVAL, given)

    likelihoods = [[_likelihood(f"Q: {row['question']} A:", f" {home}") for home in homes] for row in rows]
    for row, expected in zip(found["completions homes"]["answers"], likelihoods, strict=True):
        assert [float(score) for score, _ in row] == pytest.approx(expected, abs=1e-3)
    right = [expected.index(max(expected)) == row["answer"] for row, expected in zip(rows, likelihoods, strict=True)]
    assert found["completions homes"]["scores"]["acc,none"] == pytest.approx(sum(right) / len(right))

    tokenizer = generator.codecs[generator.default].tokenizer
    prompts = [tokenizer(row["question"], add_special_tokens=False)["input_ids"] for row in rows]  # as it sends them
    told = [generator.complete(prompt, stop=("\n",), **GREEDY).read() for prompt in prompts]
    assert [row[0] for row in found["completions homes_told"]["answers"]] == told
    chats = [generator.reply(row["question"], stop=("\n",), **GREEDY) for row in rows]
    assert [row[0] for row in found["chat/completions homes_told"]["answers"]] == chats


def _likelihood(context, continuation):
    """Return the log-likelihood that transformers gives a text behind another one, as lm_eval splits the two."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_base())
    model = AutoModelForCausalLM.from_pretrained(demo_base(), dtype=torch.float32)
    before = tokenizer(context, add_special_tokens=False)["input_ids"]
    whole = tokenizer(context + continuation, add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        known = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    scores = [float(known[place - 1, number]) for place, number in enumerate(whole)][len(before) :]
    assert all(map(math.isfinite, scores))
    return sum(scores)
