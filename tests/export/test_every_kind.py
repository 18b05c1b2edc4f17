"""Kinds of adapters on architectures, merged as PEFT merges them, or as base + adapter answers where PEFT does not.

`python tests/export/every_kind.py` tries all of them on all, and keeps the results in benchmarks/results.
"""

import pytest
from every_kind import ARCHITECTURES, KINDS, make_base, try_kind

IN_MEMORY = ("LoRA, target_parameters", "LoRA, all-linear")  # of mixtures of experts
TIED = [
    "LoRA, rank_pattern and alpha_pattern", "LoRA on embeddings", "LoRA, lora_bias", "LoRA, bias all",
    "LoRA, modules_to_save head", "LoRA, trainable_token_indices", "DoRA", "AdaLoRA, ranks allotted", "LoKr", "VeRA",
    "trainable tokens",
]  # fmt: skip
FAST = [
    *((name, "LoRA") for name in ("Phi-3", "GPT-2", "OPT", "BLOOM", "GPT-NeoX")),
    *(("Llama, tied", kind) for kind in TIED),
    ("Mixtral", "LoRA, all-linear"), ("Qwen3-MoE", "LoRA, target_parameters"),
    ("GPT-2", "LoRA on the head"), ("BLOOM", "IA3"), ("GPT-NeoX", "LoRA on embeddings and head"),
]  # fmt: skip
NEVER = {  # and what the refusal says
    "PiSSA": "init_lora_weights is pissa: this adapter needs a base that was changed",
    "PiSSA, pissa_niter_4": "init_lora_weights is pissa_niter_4: this adapter needs a base that was changed",
    "OLoRA": "init_lora_weights is olora: this adapter needs a base that was changed",
    "KaSA": "kasa_config changes the base",
    "aLoRA": "alora_invocation_tokens changes what follows some tokens",
    "MonteCLoRA": "monteclora_config keeps what it draws by chance",
    "VeRA, projection not saved": "save_projection is false",
    "prompt tuning": "peft_type is PROMPT_TUNING, which is not merged",
    **dict.fromkeys(("SHiRA", "PSOFT", "Uni-LoRA", "FRoD", "OSF", "Lily"), "which is not merged"),
}
# a trained bias of a layer without one; GLoRA on one with it; OSF on GPT-2, of which PEFT saves nothing
NO_PLACE = ("no place for it", "changes the bias of", "holds no tensors")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Return `base(architecture)`: the folder of its tiny model, which is made once."""
    folders = {}

    def made(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("base") / "model"
            make_base(ARCHITECTURES[name], folders[name])
        return folders[name]

    return made


def require_exact(found):
    assert found.result.startswith("exact"), found
    assert sum(found.units.values()) > 0 or found.result == "exact (PEFT is not)"
    assert set(found.units) <= {"0", "1"}
    assert found.units.get("1", 0) <= 0.001 * sum(found.units.values())


@pytest.mark.parametrize(("name", "kind"), FAST)
def test_it_is_merged_exactly(name, kind, base, tmp_path):
    found = try_kind(base(name), ARCHITECTURES[name], kind, tmp_path / "case")
    require_exact(found)
    assert found.in_memory == (name in ("Mixtral", "Qwen3-MoE") and kind in IN_MEMORY)


@pytest.mark.parametrize("kind", ["PiSSA", "PiSSA, pissa_niter_4", "prompt tuning", "aLoRA"])
def test_it_is_refused_by_name(kind, base, tmp_path):
    found = try_kind(base("Llama"), ARCHITECTURES["Llama"], kind, tmp_path / "case")
    assert found.result.startswith("refused") and NEVER[kind] in found.result


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_plain_lora_on_every_architecture(name, base, tmp_path):
    require_exact(try_kind(base(name), ARCHITECTURES[name], "LoRA", tmp_path / "case"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Llama", "Llama, tied", "GPT-2"])
def test_every_kind(name, base, tmp_path):
    wrong = {}
    for kind in KINDS:
        found = try_kind(base(name), ARCHITECTURES[name], kind, tmp_path / "case")
        refused = found.result.startswith("refused")
        named = kind in NEVER and NEVER[kind] in found.result
        if found.result.startswith("not put on") or (
            refused and (named or any(why in found.result for why in NO_PLACE))
        ):
            continue
        try:
            require_exact(found)
        except AssertionError:
            wrong[kind] = found
    assert not wrong
