"""What a run is made of: `identify` and `prepare` find all that can fail cheaply, `load` is the first heavy step."""

import hashlib
import json
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from typing import Any

import torch

from lora_alpaca.artifacts import adapter_folder
from lora_alpaca.config import FinetuneConfig
from lora_alpaca.data import cache, held_out, preparation
from lora_alpaca.data.encoding import Encoder
from lora_alpaca.data.preparation import Prepared
from lora_alpaca.data.tokenization import hash_tokenizer
from lora_alpaca.distributed.strategy import Replicated, Strategy
from lora_alpaca.distributed.world import World
from lora_alpaca.engine import fitted
from lora_alpaca.errors import DataError
from lora_alpaca.models import full, lora
from lora_alpaca.models.base import locate_base
from lora_alpaca.models.device import as_stored
from lora_alpaca.models.fingerprint import hash_base
from lora_alpaca.models.full import FullWeights
from lora_alpaca.models.layers import check_layers
from lora_alpaca.models.lora import WEIGHTS, LoraAdapter
from lora_alpaca.models.tokenizer import load_tokenizer
from lora_alpaca.models.trainable import Trainable
from lora_alpaca.planning import preflight
from lora_alpaca.planning.plan import Plan
from lora_alpaca.planning.recipes import fill_defaults
from lora_alpaca.prompts import fitting_template, load_template
from lora_alpaca.storage.paths import sha256, user_path
from lora_alpaca.training import optimizers
from lora_alpaca.training.job import Inputs, Job
from lora_alpaca.training.progress import Progress
from lora_alpaca.training.proof import Proof
from lora_alpaca.training.reading import RunRows, read_rows
from lora_alpaca.training.resume import Start
from lora_alpaca.training.step import Stepper

DATA = ("data_path", "val_data_path")  # the flags that name rows


def identify(config: FinetuneConfig, rows: RunRows | None, world: World, start: Start, progress: Progress) -> Inputs:
    """Return what a config names; `rows` are those of its data, if they have been read.

    Raises ConfigError, DataError, TemplateError, ModelError and AdapterError.
    """
    log = progress.log
    template = load_template(config.prompt_template_name) if config.prompt_template_name else None
    if config.init_adapter:
        adapter_folder.check_init_adapter(config)
    config, notes = fill_defaults(config, world.world_size)
    log(*notes)
    config = start.with_rate(config)
    rows = rows or read_rows(config)
    read = {f"--{flag}": f"rows of sha256 {part.digest[:12]}" for flag, part in zip(DATA, rows.parts, strict=False)}
    world.require_same(read, "the processes read different rows; is a file being written?", DataError)
    base = locate_base(config.base_model, config.revision, config.trust_remote_code)
    spec, notes = as_stored(world.spec, base.config, base.name, config)
    log(*notes)
    check_layers(config.layers, base)
    preflight.check_export(config, base)
    config, notes = preflight.check_options(config, base)
    log(*notes)
    tokenizer, notes = load_tokenizer(base)
    log(*notes)
    template = (start.template(template) or fitting_template(rows.train.formats, tokenizer)).bound(tokenizer)
    return Inputs(config, rows, base, spec, tokenizer, hash_tokenizer(tokenizer), notes, template)


def record(inputs: Inputs, world: World) -> dict[str, Any]:
    """Return the record of a run of these inputs that begins, but for what becomes of their rows."""
    with world.main_process_first():  # the others find the hashes of its files in the cache
        described = inputs.record(world.world_size, hash_base(inputs.base))
    world.require_same(_contents(inputs, described), "every rank needs the same files")
    return described


def _contents(inputs: Inputs, described: dict[str, Any]) -> dict[str, str]:
    """Return what the files have in them that a run's options name, but for its rows: sha256 by flag or part."""
    template = hashlib.sha256(json.dumps(described["template"], sort_keys=True).encode()).hexdigest()
    found = {"--base_model": described["base_sha256"], "tokenizer": described["tokenizer_sha256"], "template": template}
    if inputs.config.init_adapter:
        found["--init_adapter"] = sha256(user_path(inputs.config.init_adapter) / WEIGHTS)
    return {name: f"sha256 {digest[:12]}" for name, digest in found.items()}


def prepare(inputs: Inputs, world: World, progress: Progress) -> Job:
    """Return the job of a run's inputs: their rows as examples, and the record that says what became of them.

    Raises DataError, TemplateError, ModelError and AdapterError, before anything heavy is loaded.
    """
    log, config, rows = progress.log, inputs.config, inputs.rows
    size, notes = preflight.check_model(config, inputs.base, inputs.spec, world)
    log(*notes)
    prepared = _examples(inputs, world, progress)
    train, validation, statistics = prepared.train, prepared.validation, prepared.statistics
    log(f"data: {config.data_path}, sha256 {rows.train.digest[:12]}; template {inputs.template.name}")
    if rows.validation is not None:
        log(f"validation data: {config.val_data_path}, sha256 {rows.validation.digest[:12]}")
    log(*(note for part in rows.parts for note in part.notes), *statistics.lines())
    log(*dict.fromkeys(line for part in rows.parts for line in part.fields.lines()))
    statistics.check(config.max_truncated, config.max_dropped, config.max_duplicates)
    if len(train) < config.batch_size:
        log(f"warning: {len(train)} rows are fewer than --batch_size {config.batch_size}: every step is an epoch")
    became = {"ledger": statistics.to_json(), "validation_sha256": validation.digest()}
    described = record(inputs, world) | became
    base, tokenizer, template = inputs.base, inputs.tokenizer, inputs.template
    return Job(config, base, inputs.spec, tokenizer, template, train, validation, statistics, size, described)


def _examples(inputs: Inputs, world: World, progress: Progress) -> Prepared:
    """Return the examples: from the cache, or made by the main process of each machine while the others wait."""
    config, rows = inputs.config, inputs.rows
    of_train = held_out(len(rows.train), 0 if rows.validation is not None else config.val_set_size, config.seed)
    number = sum(map(len, rows.parts))
    encoder = Encoder.from_options(inputs.tokenizer, inputs.template, config, inputs.base.vocabulary)
    folder, notes = cache.cache_folder(config.cache_dir) if number >= cache.CACHED_FROM else (None, [])
    progress.log(*notes)
    key = cache.cache_key(rows.train, encoder, of_train, inputs.tokenizer_sha256, rows.validation)
    with world.main_process_first() if folder else nullcontext():
        if found := cache.cached(folder, key):
            progress.log(f"prepared rows found in {folder}")
            return found
        with progress.counting(number, "rows") as count:
            prepared = preparation.prepare(rows.train, encoder, of_train, count, rows.validation)
        return cache.keep(folder, key, prepared)


def strategy(config: FinetuneConfig, plan: Plan, world: World) -> Strategy:
    """Return how the model of a run is spread over the ranks. Raises ConfigError for an optimizer that forbids it."""
    optimizers.require_whole(config, plan.shard)
    if plan.shard == "none":
        return Replicated(world)
    from lora_alpaca.distributed.fsdp import Sharded  # a second of imports that few runs need

    offloads, trains_base = config.offload == "cpu", config.tune == "full"
    return Sharded(world, plan.shard == "grads", config.shard_size, offloads, trains_base)


def fit(
    job: Job, plan: Plan, world: World, resources: ExitStack, progress: Progress, is_proven: bool = False
) -> tuple[Stepper, list[str]]:
    """Return the stepper of a run, its model loaded and its engine fitted, and the notes on that.

    The model is as it was when `resources` end. The engine that was chosen is in the plan then.
    """
    spread = strategy(job.config, plan, world)
    with progress.stage(f"loading {job.base.name}"):
        trainable, notes = load(job, plan, spread)
    progress.log(*notes)
    pad_id, proof = job.tokenizer.pad_token_id, Proof(job, plan, world)
    is_proven = is_proven or proof.holds()
    fitting = fitted(trainable.model, plan, job.spec, pad_id, job.train, world.autocast, is_proven, spread)
    with progress.stage("checking the engine on rows"):
        engine, notes = resources.enter_context(fitting)
    if not is_proven and engine.name in ("packed", plan.engine):  # packs that were refused are tried again
        proof.keep(notes)
    notes = list(dict.fromkeys([*proof.notes, *notes]))
    plan.engine = engine.name
    return Stepper(engine, trainable, spread, world, job.config, progress.log, progress.advance), notes


def load(job: Job, plan: Plan, strategy: Strategy) -> tuple[Trainable, list[str]]:
    """Return what is trained, on its base, and notes. This is the first heavy step of a run.

    An adapter is a new one, or that of --init_adapter.
    """
    torch.manual_seed(job.config.seed)  # the adapter's first weights are the same on every rank
    if job.config.tune == "lora":
        model, notes = strategy.load(job.base, job.spec, lambda model: _with_adapter(model, job, plan))
        return LoraAdapter(model), notes
    stored = job.base.config.get_text_config().dtype or torch.float32  # exact, whatever becomes of it then
    model, notes = strategy.load(
        job.base, replace(job.spec, dtype=stored), lambda model: _with_learning_weights(model, job, plan)
    )
    return FullWeights(model), notes


def _with_adapter(model: Any, job: Job, plan: Plan) -> Any:
    """Return a base with the adapter that is trained."""
    config = job.config
    if config.init_adapter:
        folder = user_path(config.init_adapter)
        model = adapter_folder.load(model, folder, trainable=True, dropout=config.lora_dropout)
    else:
        model = lora.attach(model, config, job.base)
    return _recomputing(model, plan)


def _with_learning_weights(model: Any, job: Job, plan: Plan) -> Any:
    """Return a base whose own weights are trained, those that --layers and --layer_parts name."""
    return _recomputing(full.mark_learning(model, job.config, job.spec.dtype), plan)


def _recomputing(model: Any, plan: Plan) -> Any:
    """Return a model that recomputes the activations of its layers, if that is planned."""
    if plan.gradient_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        model.disable_input_require_grads()  # or nothing would be spared below the first weight that learns
    return model
