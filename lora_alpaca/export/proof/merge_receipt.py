"""`merge_receipt.json` and `merge_receipt.md`: what an export did to every tensor, and how what it wrote answers."""

from collections import Counter
from pathlib import Path
from typing import Any

from lora_alpaca.artifacts import run_record
from lora_alpaca.artifacts.privacy import published
from lora_alpaca.export.job import Job
from lora_alpaca.export.merge.merged_model import MergedModel
from lora_alpaca.models.shards import NAMES
from lora_alpaca.storage import atomic
from lora_alpaca.storage.paths import sha256

FILE, PAGE = "merge_receipt.json", "merge_receipt.md"
FORMAT = 1
HALF = 0.5  # of what the adapter changes: rounding away so much is worth a warning


def begin(job: Job, model: MergedModel, hashes: dict[str, str]) -> dict[str, Any]:
    """Return the part of a receipt that says what was merged, and what became of every tensor."""
    infos, kinds = model.tensors.infos, model.tensors.kinds
    public = published({"base_model": job.source.base.name})
    return {
        "format": FORMAT,
        "base_model": public["base_model"],
        "base_revision": job.source.base.revision,
        "adapters": [
            {"name": path.resolve().name, "weight": weight, "sha256": sha256(path / "adapter_model.safetensors")}
            for path, weight in job.adapters
        ],
        "merged_into": job.config.merge_into,
        "dtype": str(job.dtype).removeprefix("torch."),
        "tied": model.tied,
        "changed_tensors": model.tensors.changed,
        "counts": dict(Counter(kinds[name] for name in infos)),
        "tensors": {
            name: {
                "kind": kinds[name],
                "dtype": NAMES[info.dtype],
                "shape": list(info.shape),
                "sha256": hashes[name],
            }
            for name, info in infos.items()
        },
        "versions": run_record.versions(),
    }


def figures(receipt: dict[str, Any]) -> dict[str, Any]:
    """Return a receipt without the list of tensors, for a record."""
    return {key: value for key, value in receipt.items() if key not in ("tensors", "versions", "format")}


def in_words(receipt: dict[str, Any], name: str) -> dict[str, str]:
    """Return the figures of a format by what they are called, none where nothing was compared."""
    found = receipt.get("formats", {}).get(name)
    if not found:
        return {}
    words = {
        "saved as": found["what"],
        "largest difference of a logit, as a part of the largest": f"{found['largest_logit_difference']:.1e}",
        "KL divergence, nats per token": f"{found['kl']:.1e}",
        "same top token": f"{found['same_top_token']:.1%} of {receipt['samples']['tokens']}",
    }
    if "loss" in found:
        losses = f"{found['loss']:.4f} ({found['loss_of_base_and_adapter']:.4f} of base + adapter)"
        words[f"loss of {receipt['samples']['rows']} validation rows"] = losses
    return words


def write(folder: Path, receipt: dict[str, Any]) -> None:
    """Write a receipt into a folder, for programs and for people."""
    atomic.write(folder / FILE, atomic.as_json(receipt))
    atomic.write(folder / PAGE, page(receipt).encode())


def summary(receipt: dict[str, Any]) -> list[str]:
    """Return a receipt in a few sentences, with a warning where rounding loses half of what the adapter changes."""
    changed = receipt["changed_tensors"]
    if "adapter_effect" not in receipt:
        return [f"{changed} tensors changed; nothing was compared, as asked (--receipt False)"]
    lines = [f"merge checked: {changed} tensors changed; logits equal base + adapter to {receipt['merge_error']:.1e}"]
    for name, found in receipt["formats"].items():
        if "same_top_token" not in found:
            lines.append(f"{name}: {found['note']}")
            continue
        greedy = f", and at {found['greedy_agreement']:.1%} of its answers" if "greedy_agreement" in found else ""
        lines.append(
            f"{found['what']}: the top token is that of base + adapter at {found['same_top_token']:.1%} of "
            f"{receipt['samples']['tokens']} tokens{greedy}"
        )
        if found["share_of_the_adapter"] > HALF:
            lines.append(
                f"warning: {found['what']} loses {found['share_of_the_adapter']:.0%} of what the adapter changes; "
                + ("--dtype fp32 keeps it" if name == "hf" else "a wider type keeps more")
            )
    if found := receipt.get("to_training"):
        lines.append(
            f"training held the base in {found['bits']} bits: against that, the top token is the same at "
            f"{found['same_top_token']:.1%}, KL {found['kl']:.1e}"
        )
    return lines


def page(receipt: dict[str, Any]) -> str:
    """Return a receipt as a page of Markdown."""
    adapters = ", ".join(
        f"{one['name']}" + (f" x {one['weight']:g}" if one["weight"] != 1 else "") for one in receipt["adapters"]
    )
    lines = [
        "# Merge receipt", "",
        f"{adapters}, merged into {receipt['base_model']}, saved as {receipt['dtype']}.", "",
        *(f"- {line}" for line in summary(receipt)), "",
    ]  # fmt: skip
    rows = [(name, found) for name, found in receipt.get("formats", {}).items() if "kl" in found]
    if rows:
        learned = any("loss" in found for _, found in rows)
        lines += [
            "| format | largest logit difference | mean | KL, nats | same top token | greedy agreement |"
            + (" loss, base + adapter |" * learned),
            "|---|---|---|---|---|---|" + "---|" * learned,
        ]
        for _, found in rows:
            greedy = f"{found['greedy_agreement']:.1%}" if "greedy_agreement" in found else "-"
            loss = f" {found['loss']:.4f}, {found['loss_of_base_and_adapter']:.4f} |" if "loss" in found else ""
            lines.append(
                f"| {found['what']} | {found['largest_logit_difference']:.1e} | "
                f"{found['mean_logit_difference']:.1e} | {found['kl']:.1e} | {found['same_top_token']:.1%} | {greedy} |"
                + loss
            )
        samples = receipt["samples"]
        rows_said = f"{samples['rows']} rows of the run's validation" if samples["rows"] else samples["rows_left_out"]
        lines += [
            "",
            f"Logit differences are parts of the largest logit. Base + adapter is computed in fp64. Compared are "
            f"{samples['tokens']} tokens: {samples['probes']} prompts of lora_alpaca, and {rows_said}. "
            f"The adapter changes logits by {receipt['adapter_effect']:.1e}.", "",
        ]  # fmt: skip
    counts = ", ".join(f"{number} {kind}" for kind, number in sorted(receipt["counts"].items()))
    lines += [f"Tensors: {counts}. `{FILE}` has the sha256 of each.", ""]
    return "\n".join(lines)
