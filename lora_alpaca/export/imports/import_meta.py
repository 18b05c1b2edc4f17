"""Turn Meta's original checkpoint of a Llama into a folder that transformers loads: the first step of old tutorials.

Tensors are read from the mapped files, put together of their slices and written one at a time, bit for bit. Config and
tokenizer are written so that every version of transformers reads them alike.
"""

from pathlib import Path
from typing import Any

from lora_alpaca.config import ImportMetaConfig
from lora_alpaca.errors import FolderError, ModelError
from lora_alpaca.export.disk import require_space
from lora_alpaca.export.progress import counting_bytes
from lora_alpaca.export.writers import meta_format
from lora_alpaca.export.writers.meta_checkpoint import ORIGINAL, TOKENIZER, MetaTensors, checkpoint_files, read_params
from lora_alpaca.export.writers.meta_format import EMBEDDINGS, LLAMA_3, SCALED
from lora_alpaca.models import meta_tokenizer
from lora_alpaca.models.memory import gigabytes
from lora_alpaca.models.meta_tokenizer import MetaTokenizer
from lora_alpaca.models.shards import ShardWriter
from lora_alpaca.storage import atomic
from lora_alpaca.storage.output_folder import OutputFolder
from lora_alpaca.storage.paths import user_path


def import_meta(config: ImportMetaConfig) -> Path:
    """Write the model of Meta's checkpoint folder to a new folder for transformers, and return the new folder.

    Raises ModelError for files with more than the tensors of a Llama in them, or with fewer, and FolderError where the
    new folder exists already or its disk is full. Then nothing is written.
    """
    old, new = user_path(config.old), user_path(config.new)
    if new.exists() or new.is_symlink():
        raise FolderError(f"{new} is there already, and is not written over; name another folder")
    if not old.is_dir():
        raise ModelError(f"OLD {old}: no such folder; name the one that holds {meta_format.PARAMS}")
    params = read_params(old)
    tensors = MetaTensors(checkpoint_files(old), params)
    length = config.context_length or context_length(params, tensors.sizes.vocabulary)
    tokenizer = _read_tokenizer(old, length, bool(params.get("use_scaled_rope")))
    if tokenizer is not None and len(tokenizer.tokenizer) > tensors.sizes.vocabulary:
        tokens = f"{len(tokenizer.tokenizer)} tokens, and the model {tensors.sizes.vocabulary}"
        raise ModelError(
            f"{tokenizer.file} has {tokens}: it is another model's; put the right one beside the checkpoint"
        )
    require_space(str(new), new, "the model", needed := sum(info.nbytes for info in tensors.infos.values()))
    folder = OutputFolder(new)
    with folder.staging() as stage:
        writer = ShardWriter(stage, tensors.infos, config.max_shard_size)
        with counting_bytes(needed, "converting") as advance:
            for name, info in tensors.infos.items():
                writer.write(name, tensors.read(name))
                advance(info.nbytes)
        writer.finish()
        _write_configs(stage, tensors, params, length, tokenizer)
        atomic.fsync_tree(stage)
        folder.publish(stage, overwrite=False)
    _report(new, tensors, length, given=bool(config.context_length), tokenizer=tokenizer)
    return new


def context_length(params: dict[str, Any], vocabulary: int) -> int:
    """Return the positions that a model of Meta's was trained for, which only its other params tell."""
    if params.get("use_scaled_rope"):
        return 131_072  # Llama 3.1 to 3.3
    if vocabulary >= LLAMA_3:
        return 8192
    if (params.get("rope_theta") or 10_000) > 10_000:
        return 16_384  # Code Llama
    largest = params["n_layers"] == 80 and not params.get("n_kv_heads")  # of the first Llamas, and alone of its kind
    return 2048 if params["norm_eps"] < 1e-5 or largest else 4096


def config_json(tensors: MetaTensors, params: dict[str, Any], length: int, ids: dict[str, Any]) -> dict[str, Any]:
    """Return the content of `config.json`, in the spelling of transformers before version 5 and in the one since."""
    sizes, theta = tensors.sizes, float(params.get("rope_theta") or 10_000)
    scaling: dict[str, Any] | None = None
    if params.get("use_scaled_rope"):
        scaling = {"rope_type": "llama3", "factor": meta_format.scaling_factor(tensors.tied), **SCALED}
    dtype = str(tensors.infos[EMBEDDINGS].dtype).removeprefix("torch.")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": sizes.vocabulary,
        "hidden_size": sizes.dim,
        "intermediate_size": sizes.hidden,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": length,
        "rms_norm_eps": params["norm_eps"],
        "rope_theta": theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_theta": theta, **(scaling or {"rope_type": "default"})},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tensors.tied,
        "initializer_range": 0.02,
        "use_cache": True,
        "torch_dtype": dtype,
        "dtype": dtype,
        **ids,
    }


def _read_tokenizer(old: Path, length: int, scaled: bool) -> MetaTokenizer | None:
    """Return the tokenizer beside a checkpoint or in the folder above, where Meta puts that of several sizes."""
    found = [path for path in (old / TOKENIZER, old.parent / TOKENIZER) if path.is_file()]
    return meta_tokenizer.read(found[0], length, scaled) if found else None


def _write_configs(
    stage: Path, tensors: MetaTensors, params: dict[str, Any], length: int, tokenizer: MetaTokenizer | None
) -> None:
    ids: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2}
    if tokenizer is not None:
        ids = {"bos_token_id": tokenizer.tokenizer.bos_token_id, "eos_token_id": tokenizer.tokenizer.eos_token_id}
        tokenizer.save(stage)
        atomic.write(stage / "tokenizer_config.json", atomic.as_json(tokenizer.settings))
        # what reads `tokenizer.model` takes it for SentencePiece's
        beside = stage if tokenizer.kind == "sentencepiece" else stage / ORIGINAL
        beside.mkdir(exist_ok=True)
        atomic.write(beside / TOKENIZER, tokenizer.file.read_bytes())
        stops = tokenizer.stop_ids if len(tokenizer.stop_ids) > 1 else tokenizer.stop_ids[0]
        atomic.write(stage / "generation_config.json", atomic.as_json(ids | {"eos_token_id": stops}))
    atomic.write(stage / "config.json", atomic.as_json(config_json(tensors, params, length, ids)))


def _report(new: Path, tensors: MetaTensors, length: int, given: bool, tokenizer: MetaTokenizer | None) -> None:
    size = gigabytes(sum(info.nbytes for info in tensors.infos.values()))
    print(f"{len(tensors.infos)} tensors ({size}) written to {new}" + "; the head is the embeddings" * tensors.tied)
    if not given:
        print(f"its context length is taken to be {length}, which Meta's files do not say; else set --context_length")
    if tokenizer is None:
        print(f"warning: no {TOKENIZER} beside the checkpoint or in the folder above: copy a tokenizer into {new}")
