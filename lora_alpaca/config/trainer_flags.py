"""Flags of other trainers, by the flag of ours that means the same.

transformers' Trainer and its example scripts, TRL, PEFT, Stanford Alpaca and FastChat, QLoRA, LLaMA-Factory, axolotl
and ColossalAI. A value is our words, in which {} stands for the value that was given; `Omit` where ours does it without
being told, or needs no telling; `Missing` where there is nothing of that kind yet. Several values have a table each,
values of several words an `Each`; what a number or a file says is read by a function.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from lora_alpaca.storage.json_files import read_json
from lora_alpaca.storage.paths import user_path


class Omit(NamedTuple):
    """What is left out, and why."""

    why: str


class Missing(NamedTuple):
    """What there is none of yet, and what there is instead."""

    instead: str


Answer = str | Omit | Missing
Values = Mapping[str, Answer]


class Each(dict[str, Answer]):
    """The answers to the words of a value, each of which says something."""


ANY = "*"  # every other value
TRUE, FALSE = "true", "false"

_LAYERS_FOUND = Omit("the layers are found in the model; no name is needed")
_FSDP = Each(
    {
        "full_shard": "--shard full",
        "shard_grad_op": "--shard grads",
        "no_shard": "--shard none",
        "hybrid_shard": Omit("--shard full --shard_size N says it, N the devices of a node"),
        "hybrid_shard_zero2": Omit("--shard grads --shard_size N says it, N the devices of a node"),
        "auto_wrap": _LAYERS_FOUND,
        "offload": "--offload cpu",
        "": Omit("--shard says it"),
        TRUE: "--shard full",
        FALSE: Omit("--shard says it"),
    }
)
_STAGES_OF_ZERO: Values = {
    "0": "--shard none",
    "1": "--shard grads",
    "2": "--shard grads",
    "3": "--shard full",
    ANY: Missing("0, 1, 2 or 3"),
}
_STRATEGIES: Values = {
    **dict.fromkeys(("naive", "ddp"), Omit("torchrun starts several devices")),
    **dict.fromkeys(("colossalai_zero2", "deepspeed_stage_2"), "--shard grads"),
    **dict.fromkeys(
        ("colossalai_zero2_cpu", "deepspeed_stage_2_offload", "zero2_offload"), "--shard grads --offload cpu"
    ),
    **dict.fromkeys(("colossalai_gemini", "deepspeed_stage_3", "fsdp"), "--shard full"),
    "deepspeed_stage_3_offload": "--shard full --offload cpu",
    ANY: Missing("--shard grads or full"),
}


def _deepspeed(value: str) -> Answer:
    """Return what a file of DeepSpeed's settings is here: its stage and whether it offloads."""
    found = read_json(user_path(value)).get("zero_optimization") if user_path(value).is_file() else None
    if not isinstance(found, dict):
        return Omit("ZeRO stage 3 is --shard full, stage 2 --shard grads, offload to cpu --offload cpu")
    stage = _STAGES_OF_ZERO.get(str(found.get("stage", 0)), _STAGES_OF_ZERO[ANY])
    places = [found.get(part) for part in ("offload_param", "offload_optimizer")]
    offloads = any(isinstance(place, dict) and place.get("device") == "cpu" for place in places)
    return f"{stage} --offload cpu" if offloads and isinstance(stage, str) and stage != "--shard none" else stage


def _max_minutes(value: str) -> Answer:
    """Return what a time limit written as DD:HH:MM:SS is here."""
    parts = value.split(":")
    if len(parts) != 4 or not all(part.isdecimal() for part in parts):
        return Missing("--max_minutes N")
    days, hours, minutes, seconds = map(int, parts)
    return f"--max_minutes {days * 1440 + hours * 60 + minutes + seconds / 60:g}"


def _last_layers(value: str) -> Answer:
    """Return what a number of trainable layers is here; others count the first ones below zero."""
    return f"--layers top:{value}" if value.isdecimal() and int(value) else Missing("--layers top:N, the last N")


_PARTS: Values = {"all": Omit("--layer_parts is all"), "mlp": "--layer_parts mlp", ANY: Missing("all, or mlp")}
_FULL: Values = {TRUE: "--tune full", FALSE: Omit("--tune says it")}
_BITS: Values = {
    "4": "--load_4bit True",
    "8": "--load_8bit True",
    "16": "--load_8bit False",
    ANY: Missing("4, 8 or 16 bits"),
}
_LEVELS: Values = {
    "no": "--val_set_size 0",
    "steps": Omit("--eval_steps N says when"),
    ANY: Missing("--eval_steps N counts steps"),
}
_SAVES: Values = {
    "steps": Omit("--save_steps N says when"),
    "best": Omit("the best one is kept besides the newest"),
    ANY: Missing("--save_steps N counts steps"),
}
_SCHEDULES: Values = {
    "linear": "--lr_scheduler linear",
    "cosine": "--lr_scheduler cosine",
    "constant": "--lr_scheduler constant",
    "constant_with_warmup": "--lr_scheduler constant",
    ANY: Missing("linear, cosine and constant"),
}
_DTYPES: Values = {
    "bfloat16": "--dtype bf16", "bf16": "--dtype bf16", "float16": "--dtype fp16", "fp16": "--dtype fp16",
    "float32": "--dtype fp32", "fp32": "--dtype fp32", "auto": "--dtype auto", "no": "--dtype fp32",
    ANY: Missing("--dtype bf16, fp16 or fp32"),
}  # fmt: skip
_OPTIMIZERS: Values = {
    **dict.fromkeys(("adamw", "adamw_torch", "adamw_hf", "adamw_torch_fused"), Omit("it is AdamW")),
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_8bit"), "--optimizer adamw_8bit"),
    "adafactor": "--optimizer adafactor",
    ANY: Missing("--optimizer adamw, adamw_8bit or adafactor"),
}
_TEMPLATES: Values = {
    "alpaca": "--prompt_template_name alpaca",
    "vicuna": "--prompt_template_name vicuna",
    "chatml": "--prompt_template_name chatml",
    ANY: "--prompt_template_name chat",  # the tokenizer's own
}
_KINDS: Values = {
    "lora": Omit("it is LoRA"),
    "qlora": "--load_4bit True",
    **dict.fromkeys(("full", "freeze"), "--tune full"),
    ANY: Missing("adapters are LoRA"),
}
_USES_LORA: Values = {TRUE: Omit("--tune is lora"), FALSE: "--tune full"}
_STAGES: Values = {
    "sft": Omit("it is supervised finetuning"),
    "pt": Omit("rows of plain text are documents"),
    ANY: Missing(""),
}
_ALWAYS_ON: Values = {TRUE: Omit("it is always so"), FALSE: Missing("it is always so")}
_NEVER: Values = {FALSE: Omit("it is never so"), "none": Omit("it is never so"), ANY: Missing("")}

TABLE: dict[str, Any] = {  # an Answer, value -> Answer, or a function of the value
    # which base
    "model_name_or_path": "--base_model {}",
    "model_name": "--base_model {}",
    "model_id": "--base_model {}",
    "model_path": "--base_model {}",
    "pretrained_model_name_or_path": "--base_model {}",
    "pretrain": "--base_model {}",
    "model": {
        **dict.fromkeys(("bloom", "opt", "gpt2", "llama", "llama2", "chatglm"), Omit("the base's own files tell it")),
        ANY: "--base_model {}",
    },
    "model_type": Omit("the base's own files tell it"),
    "model_revision": "--revision {}",
    "config_name": Omit("it is the base's own"),
    "tokenizer_name": Omit("it is the base's own"),
    "tokenizer": Omit("it is the base's own"),
    "use_fast_tokenizer": Omit("it is the base's own"),
    "use_auth_token": Omit("the hub's own variable HF_TOKEN is used"),
    "hf_hub_token": Omit("the hub's own variable HF_TOKEN is used"),
    "adapter_name_or_path": "--init_adapter {}",
    "lora_weights_path": "--init_adapter {}",
    "peft_model": "--lora_weights {}",
    "lora_path": "--lora_weights {}",
    # in what precision, on what
    "bf16": {TRUE: "--dtype bf16", FALSE: Omit("--dtype says it")},
    "fp16": {TRUE: "--dtype fp16", FALSE: Omit("--dtype says it")},
    "pure_bf16": {TRUE: "--dtype bf16", FALSE: Omit("--dtype says it")},
    "tf32": {FALSE: Omit("it is never so"), ANY: Missing("--dtype bf16 is faster still")},
    "torch_dtype": _DTYPES,
    "mixed_precision": _DTYPES,
    "compute_dtype": _DTYPES,
    "load_in_4bit": "--load_4bit {}",
    "load_in_8bit": "--load_8bit {}",
    "quantization_bit": _BITS,
    "bits": _BITS,
    "quant_type": {"nf4": Omit("4 bits are NF4"), ANY: Missing("4 bits are NF4")},
    "bnb_4bit_quant_type": {"nf4": Omit("4 bits are NF4"), ANY: Missing("4 bits are NF4")},
    "bnb_4bit_compute_dtype": _DTYPES,
    "double_quant": Omit("4 bits are NF4, their scales in 8 bits"),
    "use_bnb_nested_quant": Omit("4 bits are NF4, their scales in 8 bits"),
    "no_cuda": {TRUE: "--device cpu", FALSE: Omit("--device says it")},
    "use_cpu": {TRUE: "--device cpu", FALSE: Omit("--device says it")},
    "fsdp": _FSDP,
    "fsdp_config": Omit("--shard and --offload say it; the layers are found in the model"),
    "fsdp_transformer_layer_cls_to_wrap": _LAYERS_FOUND,
    "fsdp_min_num_params": _LAYERS_FOUND,
    "deepspeed": _deepspeed,
    "zero_stage": _STAGES_OF_ZERO,
    "cpu_offload": {TRUE: "--offload cpu", FALSE: Omit("--offload says it")},
    "strategy": _STRATEGIES,
    "num_processes": "--processes {}",
    "nproc_per_node": "--processes {}",
    "num_gpus": "--processes {}",
    "local_rank": Omit("torchrun sets a variable"),
    "ddp_timeout": "--rank_timeout {}",
    "ddp_find_unused_parameters": Omit("gradients are summed once a step"),
    "ddp_backend": Omit("nccl on GPUs, gloo on CPUs"),
    "flash_attn": Omit("--engine chooses the attention too"),
    "use_flash_attention_2": Omit("--engine chooses the attention too"),
    "attn_implementation": Omit("--engine chooses the attention too"),
    "torch_compile": {TRUE: "--compile True", FALSE: "--compile False"},
    "use_unsloth": _NEVER,
    # which rows
    "dataset": "--data_path {}",
    "datasets": "--data_path {}",
    "dataset_name": "--data_path {}",
    "dataset_path": "--data_path {}",
    "train_file": "--data_path {}",
    "train_data": "--data_path {}",
    "training_file": "--data_path {}",
    "dataset_dir": Missing("--data_path is the path of the file, folder included"),
    "data_dir": Missing("--data_path is the path of the file, folder included"),
    "dataset_config_name": Missing("it is part of --data_path, as in ID:CONFIG:SPLIT"),
    "dataset_config": Missing("it is part of --data_path, as in ID:CONFIG:SPLIT"),
    "dataset_train_split": Missing("it is part of --data_path, as in ID::SPLIT"),
    "dataset_text_field": "--columns text={}",
    "eval_dataset": "--val_data_path {}",
    "eval_data_path": "--val_data_path {}",
    "eval_file": "--val_data_path {}",
    "validation_file": "--val_data_path {}",
    "validation_data": "--val_data_path {}",
    "val_size": "--val_set_size {}",
    "eval_dataset_size": "--val_set_size {}",
    "validation_split_percentage": Missing("--val_set_size is rows, or a share below 1"),
    "test_size": "--val_set_size {}",
    "max_samples": Missing("--data_path takes a shorter file"),
    "max_train_samples": Missing("--data_path takes a shorter file"),
    "max_datasets_size": Missing("--data_path takes a shorter file"),
    "max_eval_samples": "--val_set_size {}",
    "template": _TEMPLATES,
    "prompt_template": "--prompt_template_name {}",  # of our own generate and export, and the other way round
    "prompt_template_name": "--prompt_template {}",
    "chat_template_path": Missing("--prompt_template_name chat takes the tokenizer's own"),
    "max_seq_length": "--cutoff_len {}",
    "max_seq_len": "--cutoff_len {}",
    "max_length": "--cutoff_len {}",
    "max_len": "--cutoff_len {}",
    "model_max_length": "--cutoff_len {}",
    "sequence_len": "--cutoff_len {}",
    "block_size": "--cutoff_len {}",
    "source_max_len": Missing("--cutoff_len is of prompt and answer together"),
    "target_max_len": Missing("--cutoff_len is of prompt and answer together"),
    "packing": {TRUE: Omit("rows are packed, and do not see each other"), FALSE: "--engine padded"},
    "sample_packing": {TRUE: Omit("rows are packed, and do not see each other"), FALSE: "--engine padded"},
    "neat_packing": {TRUE: Omit("rows are packed, and do not see each other"), FALSE: "--engine padded"},
    "eval_packing": Omit("validation is exact either way"),
    "lazy_preprocess": Omit("rows are read as a stream"),
    "streaming": Omit("rows are read as a stream"),
    "mask_history": {TRUE: "--train_on last", FALSE: "--train_on all"},
    "train_on_source": "--train_on_inputs {}",
    "train_on_prompt": "--train_on_inputs {}",
    "completion_only_loss": {TRUE: "--train_on_inputs False", FALSE: "--train_on_inputs True"},
    "assistant_only_loss": {TRUE: "--train_on_inputs False", FALSE: "--train_on_inputs True"},
    "response_template": Omit("the template tells where an answer begins"),
    "overwrite_cache": "--cache_dir none",
    "preprocessing_num_workers": Omit("rows are encoded by as many threads as help"),
    "dataset_num_proc": Omit("rows are encoded by as many threads as help"),
    "dataloader_num_workers": Omit("rows are encoded once, before the first step"),
    "dataloader_pin_memory": Omit("rows are encoded once, before the first step"),
    "dataloader_drop_last": {FALSE: Omit("the last step of an epoch takes the rows that are left"), ANY: Missing("")},
    "remove_unused_columns": Omit("unused fields are told"),
    "neftune_noise_alpha": "--neftune_alpha {}",
    "noisy_embedding_alpha": "--neftune_alpha {}",
    # how long, how fast
    "num_train_epochs": "--num_epochs {}",
    "max_epochs": "--num_epochs {}",
    "epochs": "--num_epochs {}",
    "n_epochs": "--num_epochs {}",
    "max_train_steps": "--max_steps {}",
    "max_time": _max_minutes,
    "total_batch_size": "--batch_size {}",
    "train_batch_size": "--batch_size {}",
    "per_device_eval_batch_size": Omit("validation is computed as training is"),
    "eval_batch_size": Omit("validation is computed as training is"),
    "auto_find_batch_size": {TRUE: "--on_oom shrink", FALSE: "--on_oom stop"},
    "lr": "--learning_rate {}",
    "lr_scheduler_type": _SCHEDULES,
    "scheduler": _SCHEDULES,
    "num_warmup_steps": "--warmup_steps {}",
    "max_norm": "--max_grad_norm {}",
    "gradient_clipping": "--max_grad_norm {}",
    "optim": _OPTIMIZERS,
    "adam_beta1": {"0.9": Omit("it is 0.9"), ANY: Missing("it is 0.9")},
    "adam_beta2": {"0.999": Omit("it is 0.999"), ANY: Missing("it is 0.999")},
    "adam_epsilon": {"1e-8": Omit("it is 1e-8"), "1e-08": Omit("it is 1e-8"), ANY: Missing("it is 1e-8")},
    "label_smoothing_factor": {"0": Omit("it is 0"), "0.0": Omit("it is 0"), ANY: Missing("")},
    "grad_checkpoint": "--gradient_checkpointing {}",
    "use_gradient_checkpointing": "--gradient_checkpointing {}",
    "disable_gradient_checkpointing": {TRUE: "--gradient_checkpointing False", FALSE: "--gradient_checkpointing True"},
    "gradient_checkpointing_kwargs": Omit("it is not reentrant"),
    "data_seed": "--seed {}",
    "random_seed": "--seed {}",
    "full_determinism": Omit("one config gives the same bits on a CPU"),
    # LoRA
    "stage": _STAGES,
    "finetuning_type": _KINDS,
    "adapter": _KINDS,
    "freeze_trainable_layers": _last_layers,
    "num_layer_trainable": _last_layers,
    "freeze_trainable_modules": _PARTS,
    "name_module_trainable": _PARTS,
    "use_peft": _USES_LORA,
    "use_lora": _USES_LORA,
    "q_lora": {TRUE: "--load_4bit True", FALSE: Omit("--load_4bit says it")},
    "full_finetune": _FULL,
    "full_finetuning": _FULL,
    "r": "--lora_r {}",
    "rank": "--lora_r {}",
    "lora_rank": "--lora_r {}",
    "lora_dim": "--lora_r {}",
    "lora_scaling": Missing("--lora_alpha is the scale times --lora_r"),
    "target_modules": "--lora_target_modules {}",
    "target_parameters": "--lora_target_parameters {}",
    "lora_target": {"all": "--lora_target_modules all-linear", ANY: "--lora_target_modules {}"},
    "lora_modules": {"all": "--lora_target_modules all-linear", ANY: "--lora_target_modules {}"},
    "lora_target_linear": {TRUE: "--lora_target_modules all-linear", FALSE: Omit("--lora_target_modules says it")},
    "lora_bias": {"none": Omit("biases stay as they are"), ANY: Missing("biases stay as they are")},
    "bias": {"none": Omit("biases stay as they are"), ANY: Missing("biases stay as they are")},
    "task_type": Omit("it is a causal language model"),
    "lora_task_type": Omit("it is a causal language model"),
    "modules_to_save": Missing("the adapter is LoRA alone"),
    "lora_modules_to_save": Missing("the adapter is LoRA alone"),
    "additional_target": Missing("the adapter is LoRA alone"),
    "init_lora_weights": {TRUE: Omit("B begins as zero"), ANY: Missing("B begins as zero")},
    "pissa_init": _NEVER,
    "loraplus_lr_ratio": "--lora_plus_ratio {}",
    "lorap_lr_ratio": "--lora_plus_ratio {}",
    "loraplus_lr_embedding": Missing("--lora_plus_ratio is of B, of embeddings too"),
    "merge_lora_weights": Missing("lora-alpaca export merges the adapter afterwards"),
    # what is said and saved
    "save_path": "--output_dir {}",
    "output_path": "--output_dir {}",
    "overwrite_output_dir": "--overwrite {}",
    "evaluation_strategy": _LEVELS,
    "eval_strategy": _LEVELS,
    "do_eval": {TRUE: Omit("it is on"), FALSE: "--val_set_size 0"},
    "do_train": Omit("finetune trains"),
    "do_predict": Missing("lora-alpaca generate answers"),
    "eval_on_start": Omit("it is always so"),
    "eval_delay": _NEVER,
    "save_strategy": _SAVES,
    "logging_strategy": {"steps": Omit("--logging_steps N says when"), ANY: Missing("--logging_steps N counts steps")},
    "log_interval": "--logging_steps {}",
    "logging_first_step": Omit("--logging_steps 1 shows every step"),
    "logging_dir": Omit("figures of tensorboard go below --output_dir"),
    "load_best_model_at_end": _ALWAYS_ON,
    "metric_for_best_model": Omit("it is the validation loss"),
    "greater_is_better": Omit("it is the validation loss"),
    "save_safetensors": Omit("it is always so"),
    "save_only_model": {FALSE: Omit("it is never so"), ANY: Missing("checkpoints are whole, so that runs resume")},
    "need_optim_ckpt": Omit("checkpoints are whole, so that runs resume"),
    "ignore_data_skip": Omit("a run that resumes skips the rows it has seen"),
    "use_wandb": {TRUE: "--report_to wandb", FALSE: "--report_to none"},
    "run_name": "--wandb_run_name {}",
    "disable_tqdm": Omit("a bar is for terminals only"),
    "plot_loss": Omit("--report_to tensorboard plots"),
    "log_level": Omit("what is printed is little"),
    "push_to_hub": {FALSE: Omit("it is never so"), ANY: Missing("hf upload uploads the folder")},
    "hub_model_id": Missing("hf upload uploads the folder"),
    "hub_token": Missing("hf upload uploads the folder"),
}
