"""Adapters alone as a GGUF file, which llama.cpp adds to a base while it answers: `llama-server -m BASE --lora FILE`.

llama.cpp adds `alpha / r * B A` to the weight of a layer, with one alpha for all layers. What differs from that in a
layer, and the weights of several adapters, is multiplied into its B; several adapters become one of their ranks' sum.
"""

from collections.abc import Sequence
from pathlib import Path

import gguf
import torch

from lora_alpaca.artifacts import adapter_folder
from lora_alpaca.errors import AdapterError
from lora_alpaca.export.writers.gguf.architectures import Place, Places, architecture_of, interleaved
from lora_alpaca.models.adapter_layers import AdapterLayers, embedding_names
from lora_alpaca.models.base import Base
from lora_alpaca.models.changes import Change, Product, Rows, Rule, Whole
from lora_alpaca.models.lora import WEIGHTS
from lora_alpaca.models.meta import meta_model

LORA_FILE = "adapter.gguf"
_INSTEAD = "llama.cpp adds plain LoRA alone; merge it with --format gguf"
_ADVICE = "export with --format adapter, and convert that with llama.cpp's convert_lora_to_gguf.py"

Pair = tuple[torch.Tensor, torch.Tensor]


def write_gguf_lora(folder: Path, adapters: Sequence[tuple[Path, float]], base: Base) -> Path:
    """Write adapters, each with what its change is multiplied by, as one GGUF file in a folder, and return the file.

    Raises AdapterError for what llama.cpp cannot add, ModelError for an architecture that is not proven.
    """
    architecture = architecture_of(base, _ADVICE)
    places, changes = Places(base, architecture), _products(adapters, base)
    alpha = next(product.scale * product.right.shape[0] for pairs in changes.values() for product, _ in pairs)
    path = folder / LORA_FILE
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[architecture.name]])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_name(adapters[0][0].resolve().name)
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for name, products in changes.items():
        rows, columns = products[0][0].left.shape[0], products[0][0].right.shape[1]
        place = places.of(name, (rows, columns))
        a, b = _as_stored(_pair(products, alpha), place)
        writer.add_tensor(f"{place.name}.lora_a", a.contiguous().numpy())
        writer.add_tensor(f"{place.name}.lora_b", b.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _products(adapters: Sequence[tuple[Path, float]], base: Base) -> dict[str, list[tuple[Product, float]]]:
    """Return name of a weight -> what adapters add to it, each with its weight. Raises AdapterError for other kinds."""
    bare = meta_model(base)
    assert bare is not None  # of an architecture that is known
    embeddings = embedding_names(bare)
    tied = len(embeddings) > 1 and len({id(bare.get_parameter(name)) for name in embeddings}) == 1
    found: dict[str, list[tuple[Product, float]]] = {}
    for folder, weight in adapters:
        tensors = adapter_folder.read_weights(folder)
        layers = AdapterLayers(meta_model(base), folder, tensors, f"{folder} on {base.name}")
        for name, changes in layers.changes.items():
            for change in changes:
                if isinstance(change, Whole) and not change.trained:  # the base's own, kept beside the adapter
                    continue
                if not isinstance(change, Product):
                    raise AdapterError(f"--format gguf_lora: {folder}: {_kind(change)} of {name}: {_INSTEAD}")
                if tied and name in embeddings:
                    raise AdapterError(
                        f"--format gguf_lora: {folder}: LoRA on {name}, which is head and embeddings in one: {_INSTEAD}"
                    )
                found.setdefault(name, []).append((change, weight))
    if not found:
        raise AdapterError(f"--format gguf_lora: {adapters[0][0]} adds nothing")
    return found


def _kind(change: Change) -> str:
    """Return what kind of change llama.cpp cannot add."""
    if isinstance(change, Rule):
        return change.kind
    return {Rows: "trained tokens", Whole: "weights that were trained whole"}.get(type(change), "a trained bias")


def _pair(products: Sequence[tuple[Product, float]], alpha: float) -> Pair:
    """Return A and B, of which llama.cpp makes `alpha / r * B A`."""
    rank = sum(product.right.shape[0] for product, _ in products)
    a = torch.cat([product.right for product, _ in products])
    factors = [product.scale * weight * rank / alpha for product, weight in products]
    b = [
        product.left if factor == 1 else product.left * factor
        for (product, _), factor in zip(products, factors, strict=True)
    ]
    return a, torch.cat(b, dim=1)


def _as_stored(pair: Pair, place: Place) -> Pair:
    """Return A and B for the weight as the file has it: transposed, or its rows in another order."""
    a, b = pair
    if place.expert is not None:
        raise AdapterError(f"--format gguf_lora: LoRA on single experts: {_INSTEAD}")
    if place.transposed:
        a, b = b.T, a.T
    if place.heads:
        b = b[interleaved(len(b), place.heads)]
    if place.name == "token_embd.weight":  # llama.cpp takes the row of a token of the left factor
        return b, a.T
    return a, b


def bytes_needed(adapters: Sequence[tuple[Path, float]]) -> int:
    """Return about how many bytes the file will take."""
    return sum(2 * (folder / WEIGHTS).stat().st_size for folder, _ in adapters)
