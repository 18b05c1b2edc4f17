"""What the tests of GGUF share: models as facts and tensors, written as an export does, and read again."""

import json
from pathlib import Path

import gguf
from safetensors import safe_open

from lora_alpaca.artifacts import adapter_folder, prompt_contract
from lora_alpaca.export.tensors import ModelFacts
from lora_alpaca.export.writers.gguf.lora import write_gguf_lora
from lora_alpaca.export.writers.gguf.writer import GgufWriter
from lora_alpaca.models.base import locate_base
from lora_alpaca.models.tokenizer import load_tokenizer
from lora_alpaca.models.weights import TensorInfo
from lora_alpaca.prompts import load_template


def tensors(folder):
    """Return the tensors of a model's files by name, in their order."""
    found = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def facts_of(folder, template="alpaca"):
    """Return what the writers know of a model whose folder has its small files too."""
    base = locate_base(str(folder))
    tokenizer, _ = load_tokenizer(base)
    bound = load_template(template).bound(tokenizer)
    infos = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors(folder).items()}
    config = base.config.get_text_config()
    stop_ids = prompt_contract.stop_ids(config.eos_token_id, tokenizer, bound)
    return ModelFacts(base, tokenizer, bound, stop_ids, Path(folder), infos, config.tie_word_embeddings)


def write(folder, target, gguf_type="f32", template="alpaca"):
    """Write a model's folder as GGUF and return the writer."""
    target.mkdir(parents=True, exist_ok=True)
    writer = GgufWriter(target, facts_of(folder, template), gguf_type)
    for name, tensor in tensors(folder).items():
        writer.write(name, tensor)
    writer.finish()
    return writer


def write_lora(adapter, target):
    """Write an adapter on the base that it records as GGUF and return the file."""
    base = adapter_folder.read_info(adapter).base_model
    return write_gguf_lora(target, [(adapter, 1.0)], locate_base(base))


def logits(folder, file):
    """Return the logits of a model for ids that are written to a file, in fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    ids = [(7 * n * n + 11 * n + 5) % (model.config.vocab_size - 10) + 5 for n in range(40)]
    file.write_text(json.dumps(ids))
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


def metadata(path):
    """Return the keys and values of a GGUF file."""
    fields = gguf.GGUFReader(path).fields
    return {name: field.contents() for name, field in fields.items() if not name.startswith("GGUF.")}


def with_config(source, target, **changes):
    """Copy a model's folder with keys of its config changed."""
    import shutil

    shutil.copytree(source, target)
    path = target / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return target


SIZES = {
    "vocab_size": 640, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "intermediate_size": 128, "max_position_embeddings": 512, "initializer_range": 0.1,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 128,
    "short_factor": [1.0 + n / 10 for n in range(8)], "long_factor": [2.0 + n for n in range(8)],
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
EXPERTS = {"num_experts_per_tok": 2}
MODELS = {  # name -> architecture, what its config has besides the sizes, and the family whose tokenizer it gets
    "llama": ("Llama", {}, "Llama"),
    "llama tied, with biases, Llama 3's rope": (
        "Llama",
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3},
        "Llama",
    ),
    "llama without grouped queries, rope scaled linearly": (
        "Llama",
        {"num_key_value_heads": 4, "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
        "Llama",
    ),
    "mistral": ("Mistral", {}, "Mistral"),
    "mixtral": ("Mixtral", {"num_local_experts": 4, **EXPERTS}, "Mistral"),
    "qwen2": ("Qwen2", {}, "Qwen2"),
    "qwen2, rope scaled by YaRN": ("Qwen2", {"rope_parameters": YARN}, "Qwen2"),
    "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}, "Qwen3"),
    "qwen3 moe": (
        "Qwen3Moe",
        {"num_experts": 4, "moe_intermediate_size": 32, "norm_topk_prob": True, **EXPERTS},
        "Qwen3",
    ),
    "gemma": ("Gemma", {"head_dim": 32}, "Gemma"),
    "gemma2": ("Gemma2", {"query_pre_attn_scalar": 16, "sliding_window": 32}, "Gemma"),
    "gemma3": ("Gemma3Text", {"query_pre_attn_scalar": 16, "sliding_window": 32, "num_hidden_layers": 7}, "Gemma"),
    "phi3": ("Phi3", {"pad_token_id": 0}, "Llama"),
    "phi3, rope scaled by position": ("Phi3", {"pad_token_id": 0, "rope_parameters": LONG}, "Llama"),
    "gpt2": ("GPT2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512, "n_ctx": 512}, "GPT2"),
}


def make(name, tiny_model, folder, dtype="float32"):
    """Save the model of a name, with random weights, norms and biases too, and the tokenizer of its family."""
    import shutil

    import torch
    import transformers

    architecture, changes, family = MODELS[name]
    shutil.copytree(tiny_model(family), folder, ignore=shutil.ignore_patterns("config.json", "model.safetensors"))
    (folder / "generation_config.json").unlink(missing_ok=True)
    settings = folder / "tokenizer_config.json"  # in words that transformers 4 reads too, as the files of an export are
    settings.write_text(settings.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos")}
    sizes = {} if architecture == "GPT2" else SIZES
    config = getattr(transformers, f"{architecture}Config")(**sizes | {"vocab_size": len(tokenizer)} | ids | changes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1 if parameter.dim() > 1 else 0.5)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder
