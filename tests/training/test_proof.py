"""The check at start is made once for one setting: whatever differs, or is damaged, has it made again."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command import run
from short_run import flags, same

from lora_alpaca import FinetuneConfig
from lora_alpaca.engine import attention
from lora_alpaca.planning.plan import Plan
from lora_alpaca.training import proof as proofs
from lora_alpaca.training.proof import FILE, Proof

SKIPPED = "the check at start passed before"
PLAN: dict[str, Any] = {
    "engine": "auto", "token_budget": 512, "micro_batch_size": 4, "total_steps": 9, "warmup_steps": 1, "eval_steps": 3,
    "save_steps": 3,
}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Begin with an empty cache, and return the file of proofs in it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lora_alpaca" / FILE


class World:
    """One rank of many, of which the others have a proof or have none."""

    device = torch.device("cpu")

    def __init__(self, *others: bool):
        self.others = others

    def gather(self, value: bool) -> list[bool]:
        """Return the values of all ranks."""
        return [value, *self.others]


def proof(world: World | None = None, plan: dict[str, Any] | None = None, facts: Any = None, **options: Any) -> Proof:
    """Return the proof of a setting: plan, recorded facts and options over those of all tests here."""
    config = FinetuneConfig(**options)
    record = {"base_model": "b", "template": {"name": "alpaca", "prompt": "p"}, "options": config.model_dump()}
    hashes = {"base_sha256": "1", "tokenizer_sha256": "2", "data_sha256": "3", "precision": "fp32 on cpu", "ranks": 1}
    job: Any = SimpleNamespace(config=config, record=record | hashes | (facts or {}))
    anyone: Any = world or World()
    return Proof(job, Plan(**PLAN | (plan or {})), anyone)


def test_what_was_proven_holds_and_its_notes_are_told_again():
    assert not proof().holds()
    proof().keep(["a note", "engine: packs of 512 tokens, ready in 1.0 s"])
    again = proof(output_dir="another", logging_steps=7)  # which decide nothing
    assert again.holds()
    assert again.notes[0] == "a note" and SKIPPED in again.notes[1] and len(again.notes) == 2


@pytest.mark.parametrize(
    "other",
    [
        {"facts": {"base_sha256": "another"}},
        {"facts": {"tokenizer_sha256": "another"}},
        {"facts": {"data_sha256": "another"}},
        {"facts": {"precision": "bf16 on cpu"}},
        {"facts": {"ranks": 2}},
        {"facts": {"template": {"name": "alpaca", "prompt": "another"}}},
        {"plan": {"token_budget": 1024}},
        {"plan": {"compiled": True}},
        {"lora_r": 4},
        {"use_dora": True},
        {"seed": 7},
        {"cutoff_len": 64},
    ],
    ids=str,
)
def test_another_setting_is_not_proven(other):
    proof().keep([])
    assert proof().holds() and not proof(**other).holds()


def test_another_machine_is_not_proven(monkeypatch):
    proof().keep([])
    assert proof().holds()
    for name, value in (("MKL_CBWR", "COMPATIBLE"), ("OMP_WAIT_POLICY", "active"), ("DNNL_MAX_CPU_ISA", "AVX2")):
        with monkeypatch.context() as patched:
            patched.setenv(name, value)
            assert not proof().holds(), name
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert not proof().holds()
    finally:
        torch.set_num_threads(threads)
    with monkeypatch.context() as patched:
        patched.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": "another"})
        assert not proof().holds()
    with monkeypatch.context() as patched:
        patched.setattr(proofs, "version_of", lambda name: "another" if name == "peft" else "1")
        assert not proof().holds()
    with monkeypatch.context() as patched:
        patched.setattr(proofs, "code_sha256", lambda: "another")
        assert not proof().holds()
    assert proof().holds()


def test_an_adapter_that_is_trained_further_is_a_fact(tmp_path):
    (tmp_path / "adapter_model.safetensors").write_bytes(b"one")
    proof(init_adapter=str(tmp_path)).keep([])
    assert proof(init_adapter=str(tmp_path)).holds()
    (tmp_path / "adapter_model.safetensors").write_bytes(b"other")
    assert not proof(init_adapter=str(tmp_path)).holds()


@pytest.mark.parametrize("options", [{"recheck": True}, {"cache_dir": "none"}, {"trust_remote_code": True}], ids=str)
def test_a_proof_is_not_used(options):
    proof(**options).keep([])
    proof().keep([])
    assert not proof(**options).holds()


def test_all_ranks_need_their_proof():
    proof().keep([])
    assert proof(World(True)).holds()
    one_without = proof(World(False))
    assert not one_without.holds() and one_without.notes == []


def turned(text):
    """Return a proof in whose notes a letter is another."""
    return text.replace("a note", "a mote")


@pytest.mark.parametrize("damage", [lambda _: "", lambda text: text[:-9], lambda _: "[]", turned], ids=range(4))
def test_a_damaged_proof_is_none(cache, damage):
    proof().keep(["a note"])
    cache.write_text(damage(cache.read_text()))
    assert not proof().holds()
    proof().keep(["a note"])
    assert proof().holds()


@pytest.mark.parametrize("entry", [3, None, [], {}, {"notes": 3}, {"notes": [], "sha256": "0" * 64}], ids=str)
def test_an_entry_of_another_kind_is_none(cache, entry):
    proof().keep([])
    cache.write_text(json.dumps(dict.fromkeys(json.loads(cache.read_text()), entry)))
    assert not proof().holds()


def test_proofs_that_others_can_write_are_not_believed(cache):
    proof().keep([])
    cache.parent.chmod(0o777)
    assert not proof().holds()


def test_the_oldest_proofs_are_forgotten(cache, monkeypatch):
    monkeypatch.setattr(proofs, "KEPT", 3)
    for seed in (1, 2, 3, 4, 2):
        proof(seed=seed).keep([])
    assert len(json.loads(cache.read_text())) == 3
    assert [proof(seed=seed).holds() for seed in (1, 2, 3, 4)] == [False, True, True, True]


@pytest.fixture
def train(tiny_llama, data_path, tmp_path):
    """Return a function that runs the command into a folder, and returns what it printed."""
    options = {
        "base_model": tiny_llama, "data_path": data_path, "batch_size": 4, "max_steps": 2, "val_set_size": 4,
        "cutoff_len": 128, "dtype": "fp32", "load_8bit": False, "report": False,
    }  # fmt: skip

    def trained(name, **more):
        found = run("finetune", *flags(options | {"output_dir": tmp_path / name} | more))
        assert found.code == 0, found
        return found.out

    return trained


def test_the_same_run_checks_once_and_trains_the_same(train, tmp_path):
    assert SKIPPED not in train("one")
    assert train("two").count(SKIPPED) == 1
    assert SKIPPED not in train("three", recheck=True)
    assert SKIPPED not in train("four", learning_rate=1e-2)
    assert same(tmp_path / "one", tmp_path / "two") and same(tmp_path / "one", tmp_path / "three")


def test_packs_that_were_refused_are_tried_again(train, cache, monkeypatch):
    """And where a run trains on padded rows because of that, nothing is proven."""

    def leaky(*inputs, **options):
        return by_segment(*inputs, **options) * 1.5

    by_segment = attention._by_segment
    monkeypatch.setattr(attention, "_by_segment", leaky)
    for name in ("one", "two"):
        assert "this model cannot take packs" in train(name)
    assert not cache.exists()


def test_where_nothing_can_be_kept_the_check_is_made(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/cache")
    proof().keep([])
    assert not proof().holds()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def refused(*_):
        raise PermissionError(13, "no")

    monkeypatch.setattr(proofs.atomic, "replace", refused)
    proof().keep([])
    assert not proof().holds()
