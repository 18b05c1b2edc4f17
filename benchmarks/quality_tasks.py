"""What benchmarks/quality.py compares: tasks, the alpaca-lora recipe, and the methods that are held to it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

RUNS = Path(__file__).parent / "results" / "quality_runs.jsonl"
TRIAL_SEEDS, SEEDS = (101,), (1, 2, 3, 4, 5)
QV, MLP = ["q_proj", "v_proj"], ["gate_proj", "up_proj", "down_proj"]
RECIPE = {  # of alpaca-lora
    "batch_size": 128, "num_epochs": 3, "lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.05,
    "lora_target_modules": QV, "warmup_steps": 100, "lr_scheduler": "linear",
}  # fmt: skip
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
OURS = {  # what all methods of ours begin from; a method changes some of it
    "batch_size": 8, "lora_r": 32, "lora_alpha": 64, "lora_dropout": 0.0, "lora_target_modules": ["all-linear"],
    "warmup_ratio": 0.1, "lr_scheduler": "linear",
}  # fmt: skip
RATES = (1e-3, 2e-3, 3e-3, 5e-3, 1e-2, 2e-2, 5e-2)  # of R1
LOWER_RATES = (2e-4, 5e-4, 1e-3, 2e-3, 3e-3, 5e-3, 1e-2)  # of methods that adapt more, or more often


@dataclass(frozen=True)
class Task:
    """Rows and a base; `options` are those of every run, and `budgets` epochs.

    R0 is trained on the seeds `plain`, and Trainer timed on those that are `priced`: more say little of them. Where the
    task is in 16 bits, Trainer is timed in these and, as alpaca-lora loads its base, in 8.
    """

    rows: int
    held_out: int
    options: dict[str, Any]
    budgets: tuple[float, ...]
    seeds: tuple[int, ...]
    plain: tuple[int, ...]
    priced: tuple[int, ...]
    reference_rates: tuple[float, ...]
    rates: tuple[float, ...]


TASKS = {
    "demo": Task(
        896, 200, {"base_model": "demo", "load_8bit": True, "dtype": "fp32"}, (0.25, 0.375, 0.5, 0.75),
        SEEDS, SEEDS, SEEDS[:3], RATES, LOWER_RATES,
    ),
    "alpaca": Task(
        300, 100, {"load_8bit": False, "cutoff_len": 256}, (0.375, 3 / 7, 0.5),
        SEEDS[:3], (), SEEDS[:1], (3e-3, 5e-3, 1e-2, 2e-2), (2e-4, 5e-4, 1e-3, 2e-3),
    ),
}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {  # name -> what differs from OURS
    "all-linear, batch 8": {},
    "all-linear, batch 4": {"batch_size": 4},
    "all-linear, batch 16": {"batch_size": 16},
    "all-linear, batch 2": {"batch_size": 2},
    "attention, batch 8": {"lora_target_modules": ATTENTION},
    "attention, batch 4": {"lora_target_modules": ATTENTION, "batch_size": 4},
    "q/v, batch 8": {"lora_target_modules": QV, "lora_r": 8, "lora_alpha": 16},
    "q/v, batch 4": {"lora_target_modules": QV, "lora_r": 8, "lora_alpha": 16, "batch_size": 4},
    "all-linear, batch 4, no clipping": {"batch_size": 4, "max_grad_norm": 0},
    "all-linear, batch 4, cosine": {"batch_size": 4, "lr_scheduler": "cosine"},
    "all-linear, batch 4, dropout 0.05": {"batch_size": 4, "lora_dropout": 0.05},
    "all-linear, batch 4, rank 8, alpha 16": {"batch_size": 4, "lora_r": 8, "lora_alpha": 16},
    "all-linear, batch 4, rank 64, alpha 128": {"batch_size": 4, "lora_r": 64, "lora_alpha": 128},
    "MLP, batch 4": {"batch_size": 4, "lora_target_modules": MLP},
    "all-linear, batch 4, NEFTune 5": {"batch_size": 4, "neftune_alpha": 5.0},
    "all-linear, batch 4, LoRA+ 4": {"batch_size": 4, "lora_plus_ratio": 4.0},
    "all-linear, batch 4, LoRA+ 16": {"batch_size": 4, "lora_plus_ratio": 16.0},
    "all-linear, batch 4, top 3 of 5 layers": {"batch_size": 4, "layers": "top:3"},
    "all-linear, batch 4, top 3 of 5 layers, cached": {"batch_size": 4, "layers": "top:3", "cache_hidden": True},
    "all-linear, batch 4, no warm-up": {"batch_size": 4, "warmup_ratio": 0},
    "all-linear, batch 4, warm-up 0.25": {"batch_size": 4, "warmup_ratio": 0.25},
}
