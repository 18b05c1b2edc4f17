"""llama.cpp, built from source, answers from our GGUF files as we do: the ids of prompts, greedy answers and logits."""

import inspect

import gguf_files
import numpy as np
import pytest
import real_model
import torch
from environments import answer, environment
from short_models import NEW, exported, finetuned, generator, greedy

from lora_alpaca.export.writers.gguf import writer
from lora_alpaca.models.base import demo_base
from lora_alpaca.prompts.jinja import chat_messages

pytestmark = pytest.mark.clients

TIE = 1e-3  # two tokens whose logits are so close are one as good as the other
ANSWER = """
import ctypes, json, sys
import llama_cpp, numpy as np
given = json.load(sys.stdin)
settings = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32, "lora_path": given.get("lora")}
model = llama_cpp.Llama(given["model"], n_ctx=1024, n_threads=1, verbose=False, **settings)
vocab = llama_cpp.llama_model_get_vocab(model._model.model)
def logits():
    return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(model._ctx.ctx, -1), (model.n_vocab(),)).copy()
found, first = [], []
for text in given["prompts"]:
    ids = model.tokenize(text.encode(), add_bos=given["add_bos"], special=True)
    model.reset()
    model._ctx.kv_cache_clear()
    model.eval(ids)
    first.append(logits())
    made = []
    while len(made) < given["new"]:
        token = int(logits().argmax())
        if llama_cpp.llama_vocab_is_eog(vocab, token):
            break
        made.append(token)
        model.eval([token])
    found.append({"ids": ids, "made": made, "text": model.detokenize(made).decode("utf-8", "replace")})
chats = []
for messages in given.get("chats", []):
    model = model if chats else llama_cpp.Llama(given["model"], n_ctx=1024, n_threads=1, verbose=False, **settings)
    done = model.create_chat_completion(messages, temperature=0, max_tokens=given["new"], repeat_penalty=1.0)
    chats.append(done["choices"][0]["message"]["content"])
np.save(given["logits"], np.stack(first))
print(json.dumps({"answers": found, "chats": chats}))
"""


def require_same(adapter, asked, model, tmp_path, record_property, lora=None, chats=True):
    """Hold llama.cpp's answers to those of our generator, on 20 prompts."""
    ours = generator(adapter)
    template = ours.template
    prompts = ["".join(piece.text for piece in template.prompt(one)) for one in asked]
    messages = [chat_messages(template, one.prompt) for one in asked] if chats else []
    given = {
        "model": model, "lora": lora, "prompts": prompts, "add_bos": not template.begins_itself, "new": NEW,
        "logits": tmp_path / "logits.npy", "chats": messages,
    }  # fmt: skip
    theirs = answer("llama_cpp", ANSWER, given, seconds=1800)
    first = torch.from_numpy(np.load(tmp_path / "logits.npy"))
    differences, ties, texts, in_chat = [], [], 0, 0
    for number, (one, other) in enumerate(zip(asked, theirs["answers"], strict=True)):
        ids = ours.prompt_ids(one.question.text, one.question.input, ())
        assert other["ids"] == ids, prompts[number]
        made, logits = greedy(ours, ids)
        differences.append(float((first[number] - logits[0]).abs().max()))
        reply = ours.reply(one.question.text, one.question.input)
        if other["made"] != made:
            place = next(n for n, pair in enumerate(zip(made, other["made"], strict=False)) if len({*pair}) > 1)
            gap = float(logits[place].max() - logits[place][other["made"][place]])
            ties.append({"prompt": number, "token": place, "gap": gap})
            assert gap < TIE
        else:
            texts += other["text"].strip() == reply
            in_chat += bool(chats) and theirs["chats"][number].strip() == reply
    record_property("prompts", len(asked))
    record_property("texts equal", texts)
    record_property("texts equal through the chat endpoint", in_chat if chats else "not asked")
    record_property("ties", ties)
    record_property("largest difference of logits, and the largest logit", [max(differences), float(first.abs().max())])
    assert texts == len(asked) - len(ties)
    assert not chats or in_chat == len(asked) - len(ties)
    assert max(differences) < 2e-3 * float(first.abs().max())


@pytest.fixture(scope="module")
def demo(rows, tmp_path_factory):
    """Return the adapter of a short run on the demo's base, and its export as GGUF in fp32."""
    environment("llama_cpp")
    folder = tmp_path_factory.mktemp("demo")
    adapter = finetuned("demo", rows, folder, max_steps=20, learning_rate=5e-3)
    return adapter, exported(adapter, folder / "out", "--format", "gguf", "--gguf_type", "f32")


def test_the_demo_answers_as_ours(demo, rows, tmp_path, record_property):
    adapter, out = demo
    require_same(adapter, rows[:20], out / "model-f32.gguf", tmp_path, record_property)


def test_the_demo_answers_as_ours_with_the_adapter_alone(demo, rows, tmp_path, record_property):
    adapter, _ = demo
    base = gguf_files.write(demo_base(), tmp_path / "base").path
    lora = gguf_files.write_lora(adapter, tmp_path)
    require_same(adapter, rows[:20], base, tmp_path, record_property, lora, chats=False)


@pytest.fixture(scope="module")
def smollm2(rows, tmp_path_factory):
    """Return the adapter of a short run on SmolLM2-135M-Instruct with its own chat template, and the export."""
    environment("llama_cpp")
    if not real_model.is_there():
        pytest.skip(real_model.MISSING)
    folder = tmp_path_factory.mktemp("smollm2")
    adapter = finetuned(
        real_model.FOLDER, rows, folder, max_steps=4, learning_rate=1e-3, prompt_template_name="chat",
        lora_target_modules="q_proj,k_proj,v_proj,o_proj,down_proj",
    )  # fmt: skip
    return adapter, exported(adapter, folder / "out", "--format", "gguf", "--gguf_type", "f32")


def test_smollm2_answers_as_ours(smollm2, rows, tmp_path, record_property):
    adapter, out = smollm2
    require_same(adapter, rows[:20], out / "model-f32.gguf", tmp_path, record_property)


def test_smollm2_answers_as_ours_with_the_adapter_alone(smollm2, rows, tmp_path, record_property):
    adapter, _ = smollm2
    base = gguf_files.write(real_model.FOLDER, tmp_path / "base", template="chat").path
    require_same(
        adapter, rows[:20], base, tmp_path, record_property, gguf_files.write_lora(adapter, tmp_path), chats=False
    )


@pytest.mark.parametrize("name", gguf_files.MODELS)
def test_llama_cpp_computes_what_transformers_does(name, tiny_model, rows, tmp_path, record_property):
    """Random models of each architecture, of ids that no tokenizer made: logits at the end of a prompt."""
    environment("llama_cpp")
    folder = gguf_files.make(name, tiny_model, tmp_path / "model")
    path = gguf_files.write(folder, tmp_path / "out").path
    expected, found = gguf_files.logits(folder, tmp_path / "ids.json"), tmp_path / "logits.npy"
    answer("llama_cpp", LOGITS, {"model": path, "ids": tmp_path / "ids.json", "logits": found})
    difference = float((torch.from_numpy(np.load(found)) - expected).abs().max())
    record_property("largest difference of logits, and the largest logit", [difference, float(expected.abs().max())])
    assert difference < 2e-3 * float(expected.abs().max())


LOGITS = """
import json, sys
import llama_cpp, numpy as np
given = json.load(sys.stdin)
ids = json.load(open(given["ids"]))
model = llama_cpp.Llama(given["model"], n_ctx=512, n_threads=1, verbose=False, logits_all=True,
                        type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32)
model.eval(ids)
np.save(given["logits"], np.array(model.scores[: len(ids)]))
print(json.dumps({}))
"""


@pytest.mark.parametrize("family", ["Llama", "Gemma", "Qwen2", "GPT2"])
def test_llama_cpp_reads_text_as_the_tokenizer_does(family, tiny_model, rows, tmp_path, record_property):
    """But for a text that begins with a space: for LLaMA, transformers puts no other before it, and llama.cpp does."""
    environment("llama_cpp")
    names = {"Llama": "llama", "Gemma": "gemma2", "Qwen2": "qwen2", "GPT2": "gpt2"}
    folder = gguf_files.make(names[family], tiny_model, tmp_path / "model")
    writer = gguf_files.write(folder, tmp_path / "out")
    tokenizer = gguf_files.facts_of(folder).tokenizer
    texts = [text for row in rows for text in (row.question.text, row.answers[0])]
    texts += [
        "two  spaces ",
        "line\n\n\nbreaks\t",
        "1234567 3.14",
        "naïve café 你好 🦙",
        "I'll we'VE",
        "a" * 50,
        "x=y;\r\n}",
    ]
    given = {"model": writer.path, "texts": texts}
    found = answer("llama_cpp", TOKENS, given)
    different = [text for text, ids in zip(texts, found, strict=True) if ids != tokenizer(text)["input_ids"]]
    record_property("texts read alike", f"{len(texts) - len(different)} of {len(texts)}")
    record_property("read otherwise", different)
    assert not different


TOKENS = """
import json, sys
import llama_cpp
given = json.load(sys.stdin)
model = llama_cpp.Llama(given["model"], vocab_only=True, verbose=False)
print(json.dumps([model.tokenize(text.encode(), add_bos=True, special=False) for text in given["texts"]]))
"""


@pytest.mark.parametrize("gguf_type", ["q4_k_m", "q5_k_m", "q6_k"])
def test_llama_cpp_quantises_to_types_of_its_own(gguf_type, tiny_model, tmp_path, monkeypatch, record_property):
    """Our function, run where llama-cpp-python is installed; what comes back is off by less than a step of the type."""
    environment("llama_cpp")
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    monkeypatch.setitem(gguf_files.MODELS, "wide", ("Llama", sizes, "Llama"))
    folder = gguf_files.make("wide", tiny_model, tmp_path / "model", "bfloat16")
    own = inspect.getsource(writer._quantise_file)

    def quantise(source, target, kind):
        called = f"_quantise_file(Path({str(source)!r}), Path({str(target)!r}), {kind!r})\nprint('{{}}')"
        answer("llama_cpp", f"from pathlib import Path\nfrom gguf import LlamaFileType\n{own}\n{called}", {})

    monkeypatch.setattr(writer, "_quantise_file", quantise)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: True)
    written = gguf_files.write(folder, tmp_path / "out", gguf_type)
    assert [path.name for path in written.path.parent.glob("*.gguf")] == [f"model-{gguf_type}.gguf"]
    read, base = written.read_back(), gguf_files.tensors(folder)
    errors = {
        name: float((read.read(name) - base[name]).pow(2).mean() ** 0.5 / base[name].float().std()) for name in base
    }
    record_property("largest error of a tensor, as a part of its deviation", max(errors.values()))
    assert 0 < max(errors.values()) < {"q4_k_m": 0.12, "q5_k_m": 0.06, "q6_k": 0.03}[gguf_type]
    assert written.path.stat().st_size < {"q4_k_m": 0.4, "q5_k_m": 0.45, "q6_k": 0.5}[gguf_type] * sum(
        tensor.nbytes for tensor in base.values()
    )
