"""The model card, `README.md`: what a model is, how it was trained and how to load it, from the record of its run.

It has figures and settings, and no row of the data.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from lora_alpaca._version import __version__
from lora_alpaca.models.base import Base, base_file
from lora_alpaca.prompts import AnyTemplate, Template

FILE = "README.md"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
LICENSE = re.compile(r"^(license|license_name|license_link): *([\w.:/#-]+) *$", re.MULTILINE)  # of a card of the base
FRONT_MATTER = re.compile(r"---\n(.*?\n)---\n", re.DOTALL)
OPTIONS = (  # of training, that people compare runs by
    "learning_rate", "lr_scheduler", "warmup_steps", "batch_size", "num_epochs", "max_steps", "weight_decay",
    "cutoff_len", "train_on", "train_on_inputs", "lora_dropout", "seed",
)  # fmt: skip
SETTINGS = ("r", "lora_alpha", "target_modules", "modules_to_save", "use_rslora", "use_dora")
Kind = Literal["adapter", "merged"]
Facts = Mapping[str, Any]


def card(
    kind: Kind,
    name: str,
    base: Base,
    record: Facts,
    settings: Facts,
    template: AnyTemplate,
    limits: Sequence[str] = (),
    figures: Facts | None = None,
) -> str:
    """Return the text of a model card.

    `name` is that of the folder or repository, `record` the published one of the run, empty where there is none,
    `settings` those of `adapter_config.json`, `limits` sentences on what cannot load the adapter, and `figures` those
    of the receipt by their names.
    """
    known = base_id(base, settings)
    parts = [
        _front_matter(kind, base, known, record),
        f"# {name.rpartition('/')[2]}",
        _first_words(kind, known, base, record),
        _use(kind, name, known, settings, limits),
        _prompt(template),
        _training(record, settings),
        _table("Receipt", (figures or {}).items()),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def base_id(base: Base, settings: Facts) -> str:
    """Return the id of a base on the hub, empty for one that is a folder, or the demo."""
    recorded = str(settings.get("base_model_name_or_path") or "")
    found = base.name if base.revision else recorded
    return found if HUB_ID.fullmatch(found) and not found.startswith(".") else ""


def _front_matter(kind: Kind, base: Base, known: str, record: Facts) -> str:
    """Return what the hub reads of a card, in YAML."""
    data = str(_inside(record, "options", "data_path") or "")
    tags = ["lora", "instruction-tuning", "text-generation"]
    facts: dict[str, Any] = {
        "library_name": "peft" if kind == "adapter" else "transformers",
        "pipeline_tag": "text-generation",
        "tags": [*tags, *([f"base_model:{'adapter' if kind == 'adapter' else 'finetune'}:{known}"] if known else [])],
    }
    if known:
        facts |= {"base_model": known, "base_model_relation": "adapter" if kind == "adapter" else "finetune"}
    if HUB_ID.fullmatch(data) and "." not in data.rpartition("/")[2]:
        facts["datasets"] = [data]
    facts |= _license(base)
    return "\n".join(["---", *(f"{key}: {json.dumps(value)}" for key, value in facts.items()), "---"])


def _license(base: Base) -> dict[str, str]:
    """Return what the card of a base says of its license, if there is a card and it says that."""
    path = base_file(base, FILE, optional=True)
    text = path.read_text(encoding="utf-8", errors="replace")[:100_000] if path else ""
    return dict(LICENSE.findall(match[1])) if (match := FRONT_MATTER.match(text)) else {}


def _first_words(kind: Kind, known: str, base: Base, record: Facts) -> str:
    named = f"[{known}](https://huggingface.co/{known})" if known else f"`{base.name.rpartition('/')[2]}`"
    what = f"A LoRA adapter for {named}" if kind == "adapter" else f"{named} with a LoRA adapter merged into it"
    rows, learned = _inside(record, "ledger", "train"), _inside(record, "ledger", "learned")
    on = f", trained on {rows:,} examples" if isinstance(rows, int) else ""
    on += f" with {learned:,} tokens to learn" if on and isinstance(learned, int) else ""
    return f"{what}{on}. Made with lora_alpaca {_inside(record, 'versions', 'lora_alpaca') or __version__}."


def _use(kind: Kind, name: str, known: str, settings: Facts, limits: Sequence[str]) -> str:
    """Return how the model is loaded; the chat template in its folder makes the prompt that it was trained with."""
    base = known or "BASE"
    load = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        *(["from peft import PeftModel"] if kind == "adapter" else []),
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
        f'model = AutoModelForCausalLM.from_pretrained("{base if kind == "adapter" else name}")',
        *([f'model = PeftModel.from_pretrained(model, "{name}")'] if kind == "adapter" else []),
        'messages = [{"role": "user", "content": "Tell me about alpacas."}]',
        "inputs = tokenizer.apply_chat_template(",
        '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
        ")",
        "answer = model.generate(**inputs, max_new_tokens=200)[0, inputs['input_ids'].shape[1] :]",
        "print(tokenizer.decode(answer, skip_special_tokens=True))",
    ]
    parts = ["## Use", "```python\n" + "\n".join(load) + "\n```"]
    if kind == "adapter":
        flags = f" --max-lora-rank {rank_of_vllm(settings)}" if highest_rank(settings) > 16 else ""
        served = f"vllm serve {base} --enable-lora{flags} --lora-modules tuned={name} \\\n"
        served += f"    --chat-template {name}/chat_template.jinja  # of a folder; the base's own is another prompt"
        command = f"lora-alpaca generate --base_model {base} --lora_weights {name}"
    else:
        served = f"vllm serve {name}"
        command = f"lora-alpaca generate --base_model {name}"
    if not any("vLLM cannot" in line for line in limits):
        parts.append(f"```sh\n{served}\n```")
    parts.append(f"```sh\n{command} --instruction 'Tell me about alpacas.'\n```")
    if not known and kind == "adapter":
        parts.append("`BASE` is the folder of the base model, which is not on the hub.")
    parts += ["\n".join(f"- {line}" for line in limits)]
    return "\n\n".join(part for part in parts if part)


def highest_rank(settings: Facts) -> int:
    """Return the highest rank of an adapter's layers."""
    pattern = settings.get("rank_pattern")
    ranks = [settings.get("r"), *(pattern.values() if isinstance(pattern, dict) else [])]
    return max((rank for rank in ranks if isinstance(rank, int)), default=0)


def rank_of_vllm(settings: Facts) -> int:
    """Return the smallest value of --max-lora-rank that vLLM knows and that suffices, 0 if there is none."""
    return next((rank for rank in (8, 16, 32, 64, 128, 256, 320, 512) if rank >= highest_rank(settings)), 0)


def _prompt(template: AnyTemplate) -> str:
    if not isinstance(template, Template):
        return "## Prompt\n\nThe chat template in this folder, which is the one that the model was trained with."
    texts = dict.fromkeys((template.prompt_no_input, template.prompt_input))
    shown = "\n\n".join(f"````text\n{text}\n````" for text in texts)
    return f"## Prompt\n\nThe template `{template.name}`; the chat template in this folder renders it.\n\n{shown}"


def _training(record: Facts, settings: Facts) -> str:
    """Return the options, the size of the data and the losses of a run, as a table."""
    rows: list[tuple[str, Any]] = [(key, settings.get(key)) for key in SETTINGS]
    rows += [(key, _inside(record, "options", key)) for key in OPTIONS]
    rows += [
        ("precision", record.get("precision")),
        ("examples", _inside(record, "ledger", "train")),
        ("validation examples", _inside(record, "ledger", "validation")),
        ("tokens to learn", _inside(record, "ledger", "learned")),
        ("steps", _inside(record, "result", "steps")),
        ("validation loss before", _inside(record, "result", "first_validation_loss")),
        ("validation loss", _inside(record, "result", "validation_loss")),
        ("seconds", _inside(record, "result", "seconds")),
    ]
    versions = record.get("versions")
    rows += [(f"{name} version", version) for name, version in versions.items()] if isinstance(versions, dict) else []
    return _table("Training", rows)


def _table(title: str, rows: Iterable[tuple[str, Any]]) -> str:
    lines = [f"| {key} | {_shown(value)} |" for key, value in rows if value not in (None, "", [], {}, False)]
    return "\n".join([f"## {title}", "", "| | |", "|---|---|", *lines]) if lines else ""


def _shown(value: Any) -> str:
    """Return a value in one cell of a table."""
    if isinstance(value, (list, tuple)):
        value = ", ".join(map(str, value))
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    text = f"{value:.4g}" if isinstance(value, float) else text
    return re.sub(r"[|\s`<>]+", " ", text)[:200]


def _inside(record: Facts, part: str, key: str) -> Any:
    """Return a value of a part of a record, None where a record of anybody's has none."""
    found = record.get(part)
    return found.get(key) if isinstance(found, dict) else None
