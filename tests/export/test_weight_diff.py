"""A finetuned model comes back from its base and its difference bit for bit, or one line says why it does not."""

import json
import shutil

import pytest
import torch
import transformers
from command import error_line, run
from safetensors.torch import load_file, save_file

from lora_alpaca.export.weight_diff import FACTS, FOLDER

ONE = "model.safetensors"


def tensors(folder):
    return {name: t for path in sorted(folder.glob("*.safetensors")) for name, t in load_file(path).items()}


def same_bits(one, other):
    def flat(tensor):
        return tensor.contiguous().reshape(-1).view(torch.uint8)

    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(flat(one), flat(other))


@pytest.fixture
def tuned(tiny_llama, tmp_path):
    """Return `tuned(change)`: the folder of a model whose tensors are the base's after a change."""

    def make(change=lambda state: {name: tensor + 0.01 * tensor.sign() for name, tensor in state.items()}):
        folder = shutil.copytree(tiny_llama, tmp_path / "tuned")
        save_file(change(load_file(folder / ONE)), folder / ONE, metadata={"format": "pt"})
        return folder

    return make


def in_bf16(state):
    return {name: (tensor * 1.01).to(torch.bfloat16) for name, tensor in state.items()}


def with_rows(state):
    name = "model.embed_tokens.weight"
    return state | {name: torch.cat([state[name] * 1.5, torch.randn(3, state[name].shape[1])])}


def with_fewer_rows(state):
    name = "model.embed_tokens.weight"
    return state | {name: state[name][:-5].clone() * 2}


def with_another(state):
    return state | {"model.layers.0.self_attn.q_proj.bias": torch.randn(64), "scale": torch.tensor(0.5)}


def with_odd_numbers(state):
    odd = torch.tensor([float("nan"), -0.0, float("inf"), 1e-45])
    name = "model.norm.weight"
    return state | {name: odd.repeat(len(state[name]) // 4)}


@pytest.mark.parametrize(
    "change",
    [None, in_bf16, with_rows, with_fewer_rows, with_another, with_odd_numbers],
    ids=lambda f: f and f.__name__,
)
def test_a_model_comes_back_bit_for_bit(tuned, tiny_llama, tmp_path, change):
    folder = tuned(change) if change else tuned()
    made = run("weight_diff", "make", tiny_llama, folder, tmp_path / "diff", "--max_shard_size", "100KB")
    assert made.code == 0, made
    assert not list((tmp_path / "diff").glob("*.safetensors"))  # that a program could take for weights
    assert len(list((tmp_path / "diff" / FOLDER).glob("*.safetensors"))) > 2
    done = run("weight_diff", "recover", tiny_llama, tmp_path / "diff", tmp_path / "back")
    assert done.code == 0, done
    before, after = tensors(folder), tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(same_bits(before[name], after[name]) for name in before)
    small = {path.name for path in folder.iterdir()} - {ONE}
    assert small == {path.name for path in (tmp_path / "back").iterdir()} - {ONE}
    assert all((folder / name).read_bytes() == (tmp_path / "back" / name).read_bytes() for name in small)
    assert ("1 of them with more rows" in done.out) == (change in (with_rows, with_fewer_rows))
    assert ("2 of them not in the base" in done.out) == (change is with_another)


def test_what_is_recovered_loads_and_answers(tuned, tiny_llama, tmp_path):
    folder = tuned()
    assert run("weight_diff", "make", tiny_llama, folder, tmp_path / "diff").code == 0
    assert run("weight_diff", "recover", tiny_llama, tmp_path / "diff", tmp_path / "back").code == 0
    ids = torch.arange(8)[None]
    models = [transformers.AutoModelForCausalLM.from_pretrained(path) for path in (folder, tmp_path / "back")]
    assert torch.equal(*(model(ids).logits for model in models))
    with pytest.raises(OSError, match="no file named"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "diff")


def test_the_difference_tells_nothing_of_the_base_and_no_path(tuned, tiny_llama, tmp_path):
    """What a tensor is where nothing was trained is zero in the difference."""
    folder = tuned(lambda state: state)
    assert run("weight_diff", "make", tiny_llama, folder, tmp_path / "diff").code == 0
    assert not any(tensor.any() for tensor in tensors(tmp_path / "diff" / FOLDER).values())
    facts = json.loads((tmp_path / "diff" / FACTS).read_text())
    assert facts["base_model"] == tiny_llama.name
    assert str(tmp_path) not in json.dumps(facts)


def refusal(tmp_path, *words):
    before = sorted(tmp_path.rglob("*"))
    line = error_line(run("weight_diff", *words), 1)
    assert sorted(tmp_path.rglob("*")) == before  # nothing is left of what was begun
    return line


def test_another_base_is_refused(tuned, tiny_llama, tmp_path):
    assert run("weight_diff", "make", tiny_llama, tuned(), tmp_path / "diff").code == 0
    other = shutil.copytree(tiny_llama, tmp_path / "other")
    state = load_file(other / ONE)
    state["model.norm.weight"][7] += 1
    save_file(state, other / ONE, metadata={"format": "pt"})
    line = refusal(tmp_path, "recover", other, tmp_path / "diff", tmp_path / "back")
    assert "model.norm.weight comes out otherwise than it was (its sha256): it is not the base of DIFF, " in line


def test_the_same_base_in_other_files_will_do(tuned, tiny_llama, tmp_path):
    folder = tuned()
    assert run("weight_diff", "make", tiny_llama, folder, tmp_path / "diff").code == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert run("weight_diff", "recover", tmp_path / "sharded", tmp_path / "diff", tmp_path / "back").code == 0
    before, after = tensors(folder), tensors(tmp_path / "back")
    assert all(same_bits(before[name], after[name]) for name in before)


def damage_bits(diff):
    path = diff / FOLDER / ONE
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def damage_facts(diff):
    facts = json.loads((diff / FACTS).read_text())
    facts["tensors"].popitem()
    (diff / FACTS).write_text(json.dumps(facts))


def no_facts(diff):
    (diff / FACTS).write_text("{}")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (damage_bits, "comes out otherwise than it was (its sha256): DIFF is damaged"),
        (damage_facts, f"{FACTS} and its tensors do not agree; copy or download it again"),
        (no_facts, "copy or download it again"),
        (lambda diff: (diff / FOLDER / ONE).unlink(), f"{FOLDER}/{ONE} is missing"),
        (lambda diff: (diff / FOLDER / ONE).write_bytes(b""), f"{FOLDER}/{ONE} is empty (0 bytes)"),
    ],
)
def test_a_difference_that_is_damaged(tuned, tiny_llama, tmp_path, damage, said):
    assert run("weight_diff", "make", tiny_llama, tuned(), tmp_path / "diff").code == 0
    damage(tmp_path / "diff")
    assert said in refusal(tmp_path, "recover", tiny_llama, tmp_path / "diff", tmp_path / "back")


def test_models_that_do_not_belong_together(tuned, tiny_model, tiny_llama, tmp_path):
    assert "have no tensor in common" in refusal(tmp_path, "make", tiny_llama, tiny_model("GPT2"), tmp_path / "diff")
    folder = tuned(lambda state: state | {"model.norm.weight": torch.ones(7, 9)})
    line = refusal(tmp_path, "make", tiny_llama, folder, tmp_path / "diff")
    assert "model.norm.weight is [7, 9], and [64] in BASE" in line
    (tmp_path / "there").mkdir()
    line = error_line(run("weight_diff", "make", tiny_llama, folder, tmp_path / "there"), 2)
    assert "is there already, and is not written over" in line
    assert "ACTION BASE SOURCE TARGET are needed" in error_line(run("weight_diff", "make", tiny_llama), 2)
    assert "--action mix" in error_line(run("weight_diff", "mix", tiny_llama, folder, tmp_path / "diff"), 2)


def test_a_difference_of_floats_as_stanford_alpaca_published_one(tuned, tiny_llama, tmp_path):
    """With a row for a token that was added, whose embedding began as the mean of the others."""
    base = load_file(tiny_llama / ONE)
    wanted = with_rows(base) | {"lm_head.weight": torch.cat([base["lm_head.weight"], torch.randn(3, 64)])}

    def differences(state):
        means = {name: tensor.mean(0, keepdim=True) for name, tensor in base.items()}
        more = {name: len(wanted[name]) - len(tensor) for name, tensor in base.items()}
        began = {name: torch.cat([tensor, *[means[name]] * more[name]]) for name, tensor in base.items()}
        return {name: wanted[name] - began[name] for name in base}

    diff = tuned(differences)
    done = run("weight_diff", "recover", tiny_llama, diff, tmp_path / "back")
    assert done.code == 0, done
    assert "no sha256 to check them by" in done.out
    after = tensors(tmp_path / "back")
    for name, tensor in wanted.items():
        torch.testing.assert_close(after[name], tensor, rtol=1e-5, atol=1e-6)


def test_a_disk_without_room(tuned, tiny_llama, tmp_path, monkeypatch):
    folder = tuned()
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10, 5, 5))
    assert "are free on that disk" in error_line(run("weight_diff", "make", tiny_llama, folder, tmp_path / "d"), 2)
