"""Every kind of adapter on every architecture: merged by us, held against PEFT's own merge and base + adapter.

    python tests/export/every_kind.py [ARCHITECTURE ...]     all of them, and a table of the results in JSON

The bases are tiny and random, their weights such as bf16 holds; PEFT makes and saves the adapters. A result is `exact`,
`refused`, `not put on` where PEFT does not put the kind on that model, or, where PEFT itself merges wrongly, `exact
(PEFT is not)`: then the logits are base + adapter's.
"""

import copy
import json
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file

from lora_alpaca.errors import LoraAlpacaError
from lora_alpaca.export.merge.loaded_deltas import open_deltas
from lora_alpaca.models.base import locate_base
from lora_alpaca.models.weights import TensorInfo

ROOT = Path(__file__).parents[2]
EXACT = 1e-6  # of a tensor's largest value
LOGITS = 1e-4  # of the largest logit
IDS = torch.arange(3, 43)[None]
EAGER = {"experts_implementation": "eager"}  # the other ones know no fp64
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.2,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip
GPT = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


@dataclass(frozen=True)
class Architecture:
    """A tiny model of a family: the options of its config, and how its layers are called."""

    config: str
    options: dict[str, Any]
    linear: tuple[str, str] = ("q_proj", "down_proj")  # of attention, and feed-forward
    biased: str = ""  # a linear layer with a bias
    embeddings: str = "embed_tokens"
    head: str = "lm_head"
    norm: str = "input_layernorm"
    parameters: tuple[str, ...] = ("q_proj.weight",)


TIED = {"tie_word_embeddings": True}
ARCHITECTURES = {
    "Llama": Architecture("Llama", SIZES),
    "Llama, tied": Architecture("Llama", SIZES | TIED | {"attention_bias": True}, biased="q_proj"),
    "Mistral": Architecture("Mistral", SIZES),
    "Qwen2": Architecture("Qwen2", SIZES, biased="q_proj"),
    "Qwen3": Architecture("Qwen3", SIZES | TIED),
    "Gemma": Architecture("Gemma", SIZES | TIED),
    "Phi-3": Architecture("Phi3", SIZES, ("qkv_proj", "gate_up_proj"), parameters=("qkv_proj.weight",)),
    "GPT-2": Architecture(
        "GPT2", GPT | {"bos_token_id": 1, "eos_token_id": 2}, ("c_attn", "c_fc"), "c_attn", "wte", norm="ln_1",
        parameters=("c_attn.weight",),
    ),
    "OPT": Architecture(
        "OPT", SIZES | {"ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.2, "tie_word_embeddings": True},
        ("q_proj", "fc1"), "q_proj", norm="final_layer_norm",
    ),
    "BLOOM": Architecture(
        "Bloom", {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2},
        ("query_key_value", "dense_h_to_4h"), "query_key_value", "word_embeddings",
        parameters=("query_key_value.weight",),
    ),
    "GPT-NeoX": Architecture(
        "GPTNeoX", SIZES, ("query_key_value", "dense_h_to_4h"), "query_key_value", "embed_in",
        parameters=("query_key_value.weight",),
    ),
    "Mixtral": Architecture(
        "Mixtral", SIZES | EXPERTS, ("q_proj", "o_proj"), parameters=("experts.gate_up_proj", "experts.down_proj"),
    ),
    "Qwen3-MoE": Architecture(
        "Qwen3Moe", SIZES | EXPERTS, ("q_proj", "o_proj"), parameters=("experts.gate_up_proj", "experts.down_proj"),
    ),
}  # fmt: skip

Kind = Callable[[Architecture], peft.PeftConfig]


def lora(**options: Any) -> Kind:
    """Return a kind of LoRA; an option that is a function is asked for the architecture's value."""
    return of(peft.LoraConfig, **{"r": 4, "lora_alpha": 6} | options)


def of(config: Any, **options: Any) -> Kind:
    """Return a kind of adapter, on attention and feed-forward unless it names its own targets."""

    def make(facts: Architecture) -> peft.PeftConfig:
        asked = {key: value(facts) if callable(value) else value for key, value in options.items()}
        return config(**{"task_type": "CAUSAL_LM", "target_modules": list(facts.linear)} | asked)

    return make


KINDS: dict[str, Kind] = {
    "LoRA": lora(),
    "LoRA, rank-stabilised": lora(use_rslora=True),
    "LoRA, rank_pattern and alpha_pattern": lora(
        rank_pattern=lambda facts: {facts.linear[0]: 2}, alpha_pattern=lambda facts: {facts.linear[1]: 3}
    ),
    "LoRA, layers_to_transform": lora(layers_to_transform=[1]),
    "LoRA, all-linear": lora(target_modules="all-linear"),
    "LoRA, init gaussian": lora(init_lora_weights="gaussian"),
    "LoRA, init orthogonal": lora(init_lora_weights="orthogonal"),
    "LoRA, init eva": lora(init_lora_weights="eva"),
    "LoRA on embeddings": lora(target_modules=lambda facts: [facts.linear[0], facts.embeddings]),
    "LoRA on the head": lora(target_modules=lambda facts: [facts.linear[0], facts.head]),
    "LoRA on embeddings and head": lora(target_modules=lambda facts: [facts.embeddings, facts.head]),
    "LoRA, target_parameters": lora(target_modules=[], target_parameters=lambda facts: list(facts.parameters)),
    "LoRA, lora_bias": lora(target_modules=lambda facts: [facts.biased or facts.linear[0]], lora_bias=True),
    "LoRA, bias lora_only": lora(bias="lora_only"),
    "LoRA, bias all": lora(bias="all"),
    "LoRA, modules_to_save embeddings": lora(modules_to_save=lambda facts: [facts.embeddings]),
    "LoRA, modules_to_save head": lora(modules_to_save=lambda facts: [facts.head]),
    "LoRA, modules_to_save both": lora(modules_to_save=lambda facts: [facts.embeddings, facts.head]),
    "LoRA, modules_to_save norm": lora(modules_to_save=lambda facts: [facts.norm]),
    "LoRA, ensure_weight_tying": lora(
        target_modules=lambda facts: [facts.linear[0], facts.embeddings], ensure_weight_tying=True
    ),
    "LoRA, trainable_token_indices": lora(trainable_token_indices=lambda facts: {facts.embeddings: [5, 9]}),
    "DoRA": lora(use_dora=True),
    "DoRA on embeddings": lora(use_dora=True, target_modules=lambda facts: [facts.linear[0], facts.embeddings]),
    "PiSSA": lora(init_lora_weights="pissa"),
    "PiSSA, pissa_niter_4": lora(init_lora_weights="pissa_niter_4"),
    "OLoRA": lora(init_lora_weights="olora"),
    "MiCA": lora(init_lora_weights="mica"),
    "aLoRA": lora(alora_invocation_tokens=[5, 6]),
    "BD-LoRA": lora(
        use_bdlora=lambda facts: peft.tuners.lora.config.BdLoraConfig(
            nblocks=2, target_modules_bd_b=[facts.linear[0]], match_strict=False
        )
    ),
    "KaSA": lora(kasa_config=lambda facts: peft.tuners.lora.config.KasaConfig()),
    "VeLoRA": lora(velora_config=lambda facts: peft.tuners.lora.config.VeloraConfig()),
    "MonteCLoRA": lora(monteclora_config=lambda facts: peft.tuners.lora.config.MontecloraConfig()),
    "AdaLoRA": of(peft.AdaLoraConfig, init_r=4, target_r=2, lora_alpha=6, total_step=10),
    "AdaLoRA, ranks allotted": of(peft.AdaLoraConfig, init_r=4, target_r=2, lora_alpha=6, total_step=10),
    "LoHa": of(peft.LoHaConfig, r=4, alpha=6),
    "LoKr": of(peft.LoKrConfig, r=4, alpha=6),
    "IA3": of(peft.IA3Config, feedforward_modules=lambda facts: [facts.linear[1]]),
    "IA3 on a bias": of(
        peft.IA3Config, target_modules=lambda facts: [facts.biased or facts.linear[0]], feedforward_modules=[]
    ),
    "VeRA": of(peft.VeraConfig, r=8, target_modules=lambda facts: [facts.linear[0]]),
    "VeRA, projection not saved": of(
        peft.VeraConfig, r=8, target_modules=lambda facts: [facts.linear[0]], save_projection=False
    ),
    "trainable tokens": of(
        peft.TrainableTokensConfig, target_modules=lambda facts: [facts.embeddings], token_indices=[5, 9]
    ),
    "OFT": of(peft.OFTConfig, oft_block_size=8),
    "OFT, Cayley": of(peft.OFTConfig, oft_block_size=8, use_cayley_neumann=False),
    "BOFT": of(peft.BOFTConfig, boft_block_size=4),
    "HRA": of(peft.HRAConfig, r=4),
    "RandLoRA": of(peft.RandLoraConfig, r=4, target_modules=lambda facts: [facts.linear[0]]),
    "FourierFT": of(peft.FourierFTConfig, n_frequency=50),
    "C3A": of(peft.C3AConfig, block_size=8),
    "SHiRA": of(peft.ShiraConfig, r=4),
    "VB-LoRA": of(peft.VBLoRAConfig, r=2, num_vectors=8, vector_length=8),
    "MiSS": of(peft.MissConfig, r=4),
    "LayerNorm tuning": of(peft.LNTuningConfig, target_modules=lambda facts: [facts.norm]),
    "WaveFT": of(peft.WaveFTConfig, n_frequency=50),
    "GLoRA": of(peft.GloraConfig, r=4),
    "GraLoRA": of(peft.GraloraConfig, r=4, gralora_k=2),
    "RoAd": of(peft.RoadConfig, group_size=8),
    "HiRA": of(peft.HiraConfig, r=4),
    "DeLoRA": of(peft.DeloraConfig, r=4),
    "PSOFT": of(peft.PsoftConfig, r=4),
    "TinyLoRA": of(peft.TinyLoraConfig, r=2, u=8),
    "Uni-LoRA": of(peft.UniLoraConfig, r=2, theta_d_length=32),
    "PVeRA": of(peft.PveraConfig, r=8, target_modules=lambda facts: [facts.linear[0]]),
    "BEFT": of(peft.BeftConfig, target_modules=lambda facts: [facts.biased or facts.linear[0]]),
    "AdaMSS": of(peft.AdamssConfig, r=4, num_subspaces=2, subspace_rank=1),
    "FRoD": of(peft.FrodConfig, target_modules=lambda facts: [facts.linear[0]]),
    "DEFT": of(peft.DeftConfig, r=4),
    "OSF": of(peft.OSFConfig, effective_rank=4),
    "Lily": of(peft.LilyConfig, r=4),
    "Peanut": of(peft.PeanutConfig, r=4),
    "prompt tuning": lambda facts: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


@dataclass
class Found:
    """What became of a kind of adapter on an architecture.

    `tensors` is the largest difference from PEFT's merge in fp32, as a part of the tensor's largest value, `logits` and
    `peft_logits` how far our merge and PEFT's are from base + adapter. `units` counts the values of merged bf16 tensors
    by their distance, in units in the last place, from the rounded fp32 result of PEFT.
    """

    result: str
    tensors: float = 0.0
    logits: float = 0.0
    peft_logits: float = 0.0
    units: dict[str, int] = field(default_factory=dict)
    in_memory: bool = False


def make_base(facts: Architecture, folder: Path) -> None:
    """Save a random model with weights that bf16 holds."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = getattr(transformers, f"{facts.config}Config")(**facts.options)
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "bias" in name:
                    parameter.normal_(0, 0.1)
                parameter.copy_(parameter.bfloat16().float())
        model.save_pretrained(folder)


def adapted(base: Path, kind: Kind, facts: Architecture, seed: int = 1) -> Any:
    """Return a model with a random adapter, as PEFT puts it on."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base, **EAGER), kind(facts))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def in_fp64(model: Any) -> Any:
    """Return a copy of a model in fp64, or the model itself where a copy would not share what it shares."""
    try:
        return copy.deepcopy(model).double()
    except RuntimeError:
        return model


def allot(model: Any) -> None:
    """Let AdaLoRA be as it is after training: some of the ranks that it began with are zero, and are not saved."""
    pattern = {}
    for name, parameter in model.named_parameters():
        if "lora_E" in name:
            kept = [True, False, True, "down" in name]
            parameter.data[~torch.tensor(kept)] = 0
            pattern[name.removeprefix("base_model.model.")] = kept
    model.peft_config["default"].rank_pattern = pattern


def try_kind(base: Path, facts: Architecture, name: str, scratch: Path) -> Found:
    """Return what becomes of a kind of adapter on a base of an architecture; `scratch` is emptied."""
    kind = KINDS[name]
    shutil.rmtree(scratch, ignore_errors=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = adapted(base, kind, facts)
            if "ranks allotted" in name:
                allot(model)
            model.save_pretrained(scratch / "adapter")
            with torch.no_grad():
                expected = in_fp64(model)(input_ids=IDS).logits
        except Exception as error:
            return Found(f"not put on: {first_line(error)}")
    stored = load_file(base / "model.safetensors")
    infos = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in stored.items()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            deltas = open_deltas([(scratch / "adapter", 1.0)], locate_base(str(base)), infos)
        merged = merge(deltas, stored, torch.float32)
    except LoraAlpacaError as error:
        return Found(f"refused: {str(error).replace(str(scratch), '').replace(str(base), 'BASE')}")
    found = Found("exact", in_memory=type(deltas).__name__ == "LoadedDeltas")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shutil.copytree(base, scratch / "ours")
        save_file(merged, scratch / "ours" / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((base / "config.json").read_text()) | {"tie_word_embeddings": deltas.tied}
        (scratch / "ours" / "config.json").write_text(json.dumps(config))
        found.logits = distance(logits(scratch / "ours"), expected)
        try:
            model.merge_and_unload(safe_merge=True).save_pretrained(scratch / "peft")
            found.peft_logits = distance(logits(scratch / "peft"), expected)
        except Exception as error:
            found.result = f"exact (PEFT does not merge it: {first_line(error)})"
            found.peft_logits = float("nan")
    if found.logits > LOGITS:
        found.result = "WRONG"
    elif found.peft_logits > LOGITS:
        found.result = "exact (PEFT is not)"
    elif found.peft_logits <= LOGITS:
        by_peft = load_file(scratch / "peft" / "model.safetensors")
        if by_peft.keys() != merged.keys():
            found.result = f"WRONG: other tensors than PEFT's: {sorted(by_peft.keys() ^ merged.keys())[:3]}"
            return found
        found.tensors = max(distance(merged[name], tensor) for name, tensor in by_peft.items())
        if found.tensors > EXACT:
            found.result = "WRONG"
        short = merge(deltas, {name: tensor.bfloat16() for name, tensor in stored.items()}, torch.bfloat16)
        changed = [*deltas.changed, *deltas.added]
        found.units = dict(sum((units(short[name], by_peft[name]) for name in changed), Counter[str]()))
    return found


def merge(deltas: Any, stored: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the merged tensors of a base, by their names in its files."""
    merged = {
        name: deltas.merged(name, tensor, dtype) if name in deltas.changed else tensor
        for name, tensor in stored.items()
    }
    return merged | {name: deltas.merged(name, stored[deltas.source(name)], dtype) for name in deltas.added}


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    """Return the logits of a saved model, computed in fp64."""
    return (
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **EAGER)
        .eval()(input_ids=IDS)
        .logits
    )


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference, as a part of the largest value that is expected."""
    return ((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()


def units(found: torch.Tensor, expected: torch.Tensor) -> Counter[str]:
    """Return how many values of a bf16 tensor are so many units in the last place from an fp32 one that is rounded."""
    ordered = [tensor.bfloat16().contiguous().view(torch.int16).int() for tensor in (found, expected)]
    one, other = (torch.where(bits < 0, -(bits & 0x7FFF), bits) for bits in ordered)
    steps, counts = (one - other).abs().unique(return_counts=True)
    return Counter({str(step): count for step, count in zip(steps.tolist(), counts.tolist(), strict=True)})


def first_line(error: BaseException) -> str:
    """Return the beginning of the first line of an error."""
    return (str(error).splitlines() or [type(error).__name__])[0][:160]


def main(names: list[str]) -> int:
    """Try all kinds on the named architectures, or on all; print the table, and write it beside the other results."""
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in names or ARCHITECTURES:
            make_base(ARCHITECTURES[name], Path(scratch) / name)
            for kind in KINDS:
                found = try_kind(Path(scratch) / name, ARCHITECTURES[name], kind, Path(scratch) / "case")
                results.setdefault(kind, {})[name] = vars(found)
                print(
                    f"{name:12} {kind:40} {found.result:50.200} {found.tensors:.0e} {found.logits:.0e} {found.units}",
                    flush=True,
                )
    cells = [found for row in results.values() for found in row.values()]
    wrong = sum(found["result"].startswith("WRONG") for found in cells)
    versions = {library.__name__: library.__version__ for library in (torch, transformers, peft)}
    totals = {
        "results": Counter(found["result"].partition(":")[0] for found in cells),
        "units": sum((Counter(found["units"]) for found in cells), Counter()),
        "largest_difference_from_peft": max(found["tensors"] for found in cells),
    }
    if not names:
        path = ROOT / "benchmarks" / "results" / f"merged_kinds-{date.today()}.json"
        lines = [
            f"  {json.dumps(f'{kind} on {name}')}: {json.dumps(found)}"
            for kind, row in results.items()
            for name, found in row.items()
        ]
        head = f' "versions": {json.dumps(versions)},\n "totals": {json.dumps(totals)},\n "found": '
        path.write_text("{\n" + head + "{\n" + ",\n".join(lines) + "\n }\n}\n")
    print(json.dumps({"wrong": wrong, "tried": sum(map(len, results.values()))}))
    return int(wrong > 0)


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    sys.exit(main(sys.argv[1:]))
