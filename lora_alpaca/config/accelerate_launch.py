"""What `accelerate launch` hands down of its config file, in terms of our flags: none of it acts in silence.

Its variables would change how the library of that name scales losses, picks a device and loads weights. What they ask
for is compared with our flags, and then they are taken out of the environment.
"""

from collections.abc import Iterator, MutableMapping
from typing import NamedTuple

from lora_alpaca.config.options import Options
from lora_alpaca.errors import ConfigError

PREFIXES = ("ACCELERATE_", "FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_")
SHARDED = {  # FSDP's strategies by name and number, FSDP2's by what becomes of a layer after its forward
    "full_shard": "full", "1": "full", "true": "full",
    "shard_grad_op": "grads", "2": "grads", "false": "grads",
    "no_shard": "none", "3": "none",
    "hybrid_shard": "full", "4": "full",
    "hybrid_shard_zero2": "grads", "5": "grads",
}  # fmt: skip
STAGES = {"0": "none", "1": "grads", "2": "grads", "3": "full"}  # of DeepSpeed's ZeRO
NONE_HERE = {  # what there is none of, by the variable that turns it on
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config (tensor, context or sequence parallel)",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker's data parallelism",
}


class _Asked(NamedTuple):
    """What the config file asks for, and our flag that says it. `decides` is false where a run without it is right."""

    what: str
    flag: str
    value: str
    decides: bool = True


def take_out(options: Options, environ: MutableMapping[str, str]) -> list[str]:
    """Return notes on what `accelerate launch` was configured to do and our flags do not say, and unset its variables.

    Raises ConfigError, naming our flags, where a run without them would not be the one that was asked for.
    """
    found = {name: value for name, value in environ.items() if name.startswith(PREFIXES)}
    missing = [
        asked
        for asked in _asked(found)
        if str(getattr(options, asked.flag)).lower() != asked.value
        and not (asked.decides and options.is_set(asked.flag))
    ]
    if refused := [asked for asked in missing if asked.decides]:
        words = " ".join(f"--{asked.flag} {asked.value}" for asked in refused)
        what = " and ".join(asked.what for asked in refused)
        raise ConfigError(
            f"accelerate's config asks for {what}, which is not read here: say it by {words}, or take it out of that "
            "config"
        )
    for name in found:
        del environ[name]
    steps = found.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    notes = [f"accelerate's {asked.what} is not read: --{asked.flag} {asked.value} says it" for asked in missing]
    if steps not in ("1", "auto"):
        notes.append(
            f"accelerate's gradient_accumulation_steps {steps} is not read: --batch_size counts the rows of a step"
        )
    return notes


def _asked(found: dict[str, str]) -> Iterator[_Asked]:
    """Yield what the variables ask for. Raises ConfigError for what there is none of."""

    def on(name: str) -> bool:
        return found.get(name, "").lower() in ("true", "1", "yes")

    for name, what in NONE_HERE.items():
        if on(name):
            raise ConfigError(f"accelerate's config turns on {what}, which there is none of here; take it out")
    if on("ACCELERATE_USE_FSDP"):
        ways = [found.get(name, "").lower() for name in ("FSDP_SHARDING_STRATEGY", "FSDP_RESHARD_AFTER_FORWARD")]
        ways = ways[::-1] if found.get("FSDP_VERSION") == "2" else ways
        way = next((way for way in ways if way in SHARDED), "full_shard")
        yield _Asked(f"FSDP ({way})", "shard", SHARDED[way])
        if on("FSDP_OFFLOAD_PARAMS"):
            yield _Asked("offload_params", "offload", "cpu")
        if on("FSDP_ACTIVATION_CHECKPOINTING"):
            yield _Asked("activation checkpointing", "gradient_checkpointing", "true", decides=False)
    if on("ACCELERATE_USE_DEEPSPEED"):
        stage = found.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
        yield _Asked(f"DeepSpeed (ZeRO stage {stage})", "shard", STAGES.get(stage, "full"))
        if "cpu" in {found.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{part}_DEVICE") for part in ("PARAM", "OPTIMIZER")}:
            yield _Asked("offload to the CPU", "offload", "cpu")
    if on("ACCELERATE_USE_CPU"):
        yield _Asked("use_cpu", "device", "cpu")
    if found.get("ACCELERATE_TORCH_DEVICE"):
        device = found["ACCELERATE_TORCH_DEVICE"].partition(":")[0]
        yield _Asked(f"the device {found['ACCELERATE_TORCH_DEVICE']}", "device", device)
    precision = found.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision in ("bf16", "fp16"):
        yield _Asked(f"mixed_precision {precision}", "dtype", precision, decides=False)
    elif precision == "fp8":
        raise ConfigError("accelerate's config says mixed_precision fp8, which there is none of here; --dtype bf16 is")
    if found.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        yield _Asked("dynamo backend", "compile", "true", decides=False)
