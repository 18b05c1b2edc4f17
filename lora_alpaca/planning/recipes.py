"""Recipes: named sets of defaults for a run. Whatever is said by hand wins over each of them.

recipe                    | for
--recipe NAME             | any base, once it is named
demo/recipe[_full].json   | the demo base; below a named recipe, only what fits its rows
FULL                      | --tune full
the defaults of the flags | all else, which are those of alpaca-lora
"""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from lora_alpaca.config import FinetuneConfig
from lora_alpaca.config.shared import DEMO, UPSTREAM_DATA
from lora_alpaca.models.base import demo_base


class Recipe(NamedTuple):
    """Values of options, under a title that the log names."""

    title: str
    values: Mapping[str, Any]


NAMED: dict[str, Mapping[str, Any]] = {
    "alpaca-lora": {},
    "fast": {
        "lora_target_modules": ["all-linear"],
        "lora_r": 32,
        "lora_alpha": 64,
        "lora_dropout": 0.0,
        "batch_size": 4,
        "learning_rate": 1e-3,
        "warmup_ratio": 0.1,
        "lr_scheduler": "linear",
        "num_epochs": 1,
    },
}
FULL = {"learning_rate": 2e-5, "lr_scheduler": "cosine", "warmup_ratio": 0.03, "weight_decay": 0.0}  # Stanford's
GIVES_WAY = {  # an option of a recipe -> options that say the same otherwise
    "warmup_ratio": ("warmup_steps",),
    "num_epochs": ("max_steps", "max_minutes"),
    **dict.fromkeys(("lora_r", "lora_alpha", "lora_target_modules"), ("init_adapter",)),
}


def fill_defaults(config: FinetuneConfig, world_size: int) -> tuple[FinetuneConfig, list[str]]:
    """Return the config with base, data and the values of its recipes filled in where the user set none; and notes."""
    chosen: dict[str, Any] = {}
    notes = []
    if not config.base_model:
        chosen["base_model"] = DEMO
        if config.data_path:
            notes.append("no --base_model given: using the tiny demo model in the package")
    if not config.data_path:
        chosen["data_path"] = UPSTREAM_DATA if config.base_model not in ("", DEMO) else DEMO
    for recipe in _recipes(_with(config, chosen)):
        values = _fitted(recipe, _with(config, chosen), world_size)
        if values or not recipe.values:
            said = ", ".join(f"{name} {_written(value)}" for name, value in values.items())
            notes.append(f"{recipe.title}: {said or 'the defaults of all flags'}")
        if config.init_adapter and "lora_r" in recipe.values:
            notes.append("rank, scale and modules of the adapter are those of --init_adapter, not of the recipe")
        chosen |= values
    return _with(config, chosen), notes


def _recipes(config: FinetuneConfig) -> Iterator[Recipe]:
    """Yield the recipes of a config that has base and data; the earlier ones win."""
    is_full, is_named = config.tune == "full", config.is_set("recipe")
    if is_named:
        yield Recipe(f"recipe {config.recipe}", NAMED[config.recipe])
    if config.base_model == DEMO:
        text = (demo_base().parent / ("recipe_full.json" if is_full else "recipe.json")).read_text(encoding="utf-8")
        values = json.loads(text)
        of_rows = {"val_set_size": values.pop("val_set_size")}
        values = {} if is_named else values
        if config.data_path == DEMO and not config.val_data_path:
            values |= of_rows
        if values:
            yield Recipe("demo recipe", values)
    elif is_full:
        yield Recipe("recipe of full finetuning", FULL)


def _fitted(recipe: Recipe, config: FinetuneConfig, world_size: int) -> dict[str, Any]:
    """Return those values of a recipe that nothing said by hand replaces, made to fit what is said by hand."""
    values = {
        name: value
        for name, value in recipe.values.items()
        if not config.is_set(name) and all(getattr(config, other) is None for other in GIVES_WAY.get(name, ()))
    }
    if "lora_alpha" in values:  # the adapter keeps its scale, whatever its rank
        rank, scale = values.get("lora_r", config.lora_r), values["lora_alpha"] / recipe.values["lora_r"]
        values["lora_alpha"] = scale * (math.sqrt(rank) if config.use_rslora else rank)
    if "batch_size" in values:  # a default as any other: it gives way to the ranks and the micro-batch
        unit = world_size * (config.micro_batch_size if config.is_set("micro_batch_size") else 1)
        values["batch_size"] = math.ceil(values["batch_size"] / unit) * unit
    if "micro_batch_size" in values:
        share = values.get("batch_size", config.batch_size) // world_size
        values["micro_batch_size"] = math.gcd(values["micro_batch_size"], share)
    return values


def _with(config: FinetuneConfig, chosen: dict[str, Any]) -> FinetuneConfig:
    """Return a config with some options set besides those that the user set."""
    return FinetuneConfig(**{name: getattr(config, name) for name in config.model_fields_set} | chosen)


def _written(value: Any) -> str:
    """Return a value as it is written on a command line."""
    if isinstance(value, list):
        return ",".join(value)
    return f"{value:g}" if isinstance(value, float) else str(value)
