"""The main job as a story: `finetune` prepares, cheap failures first, lets the loop run, and saves what came of it."""

import tempfile
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lora_alpaca import data
from lora_alpaca.artifacts import adapter_folder, checkpoint, prompt_contract, run_record
from lora_alpaca.artifacts.adapter_folder import TrainedAdapter
from lora_alpaca.artifacts.run_record import RunResult
from lora_alpaca.config import FinetuneConfig
from lora_alpaca.data import Rows, cache, preparation
from lora_alpaca.data.encoding import Encoder
from lora_alpaca.data.preparation import Prepared
from lora_alpaca.data.tokenization import hash_tokenizer
from lora_alpaca.distributed.world import World
from lora_alpaca.engine import Settings, fitted
from lora_alpaca.errors import DataError, TrainingError
from lora_alpaca.models import lora
from lora_alpaca.models.base import load_base, locate_base
from lora_alpaca.models.fingerprint import hash_base
from lora_alpaca.models.tokenizer import load_tokenizer
from lora_alpaca.planning import preflight
from lora_alpaca.planning.plan import ENGINE_OPTIONS, Plan, fill_defaults, resolve, resolve_engine
from lora_alpaca.prompts import AnyTemplate, fitting_template, load_template
from lora_alpaca.signals import Interrupted, Stop
from lora_alpaca.storage import atomic, output_folder
from lora_alpaca.storage.paths import user_path
from lora_alpaca.training import resume
from lora_alpaca.training.loop import Loop
from lora_alpaca.training.progress import minutes
from lora_alpaca.training.state import TrainState
from lora_alpaca.training.step import Stepper


def train(config: FinetuneConfig, rows: Rows | None = None) -> RunResult:
    """Train a LoRA adapter and return what came of it; the adapter lies, self-describing, in `config.output_dir`.

    `rows` are those of `config.data_path`, if they have been read already.

    Reads the data, holds out a validation split, trains with AdamW, validates and writes checkpoints at intervals,
    and keeps the adapter with the best validation loss. On one CPU, one config gives bit-identical adapters.
    Raises the children of LoraAlpacaError, and those about options, folders and data before a model is loaded.
    """
    stop = Stop()
    with stop.watching(), World(config, stop) as ranks, ExitStack() as until_trained:
        say = ranks.reporter.say
        output_dir = user_path(config.output_dir)
        if config.resume and output_folder.read_record(output_dir).get("status") == "finished":
            if ranks.first:
                output_folder.check_lock(output_dir)
            say(f"{output_dir}: this run is already finished")
            return run_record.finished_run(output_dir)
        checkpoint_dir = ranks.first_says(lambda: resume.find(config, output_dir, ranks.reporter))
        template = load_template(config.prompt_template_name) if config.prompt_template_name else None
        if config.init_adapter:
            adapter_folder.check_init_adapter(config)
        config = fill_defaults(config, ranks.world_size, ranks.reporter)
        rows = rows or Rows(config.data_path, config.columns, config.skip_bad_rows)
        if not ranks.agree(rows.digest):
            raise DataError(f"--data_path {config.data_path}: the processes read different rows; is it being written?")
        held_out = data.held_out(len(rows), config.val_set_size, config.seed)

        base = locate_base(config.base_model, config.revision, config.trust_remote_code)
        config = preflight.preflight(config, base, ranks.spec, ranks.reporter)
        tokenizer = load_tokenizer(base)
        resumed = checkpoint.load(checkpoint_dir) if checkpoint_dir else None
        as_before = resume.template_as_before(resumed, template)
        template = (as_before or fitting_template(rows.formats, tokenizer)).bound(tokenizer)
        prepared = _prepare(config, rows, held_out, tokenizer, template, ranks)
        train, validation, ledger = prepared.train, prepared.validation, prepared.statistics
        say(f"data: {config.data_path}, sha256 {rows.digest[:12]}; template {template.name}", *ledger.lines())
        if rows.ignored:
            say(f"fields that are not used: {', '.join(sorted(map(str, rows.ignored)))}")
        ledger.check(config.max_truncated, config.max_dropped, config.max_duplicates)
        if len(train) < config.batch_size:
            say(f"warning: {len(train)} rows are fewer than --batch_size {config.batch_size}: every step is an epoch")
        if not config.add_eos_token:
            say("warning: --add_eos_token False: the end token is not learned, so answers will not stop by themselves")

        with ranks.first_here():  # the others find the hashes of its files in the cache
            base_sha256 = hash_base(base)
        hashes = (base_sha256, template, hash_tokenizer(tokenizer))
        record = run_record.describe(config, base, *hashes, ranks.spec, ranks.world_size, rows.digest, ledger)
        record["validation_sha256"] = validation.digest()
        changed = resume.check_same(resumed, record, config.allow_change or []) if resumed else {}
        say(*changed.values())
        plan = resume.plan_as_before(resumed, config, train, ranks.world_size) if resumed else None
        plan = plan or resolve(config, len(train), ranks.world_size)
        say(f"base: {base.name}, {ranks.spec}", f"plan: {plan}")

        torch.manual_seed(config.seed)  # the adapter's first weights are the same on every rank
        model, notes = load_base(base, ranks.spec)  # the first heavy step
        say(*notes)
        if config.init_adapter:
            start = user_path(config.init_adapter)
            model = adapter_folder.load(model, start, trainable=True, dropout=config.lora_dropout)
        else:
            model = lora.attach(model, config, base)
        output_folder.check_space(output_dir, _bytes_written(model, config, plan))
        if not resumed or ENGINE_OPTIONS & changed.keys():
            resolve_engine(config, plan, model, ranks.device, train.lengths, ranks.world_size)
        if plan.gradient_checkpointing:
            model.enable_input_require_grads()
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        settings = Settings(
            plan.engine,
            ranks.device,
            ranks.spec.dtype,
            plan.token_budget,
            config.share_prefix,
            plan.micro_batch_size,
            tokenizer.pad_token_id,
            plan.compiled,
            checked=resumed is not None,
        )
        engine, said = until_trained.enter_context(fitted(model, settings, train, train.lengths, ranks.autocast))
        say(*said)
        plan.engine = engine.name
        shrinks = config.on_oom == "shrink"
        learner = Stepper(engine, ranks, config.weight_decay, config.max_grad_norm, shrinks)
        progress = TrainState()
        if resumed:
            resume.restore(resumed, learner)
            progress = TrainState(**resumed.facts["progress"], best=resumed.best)
            if resumed.facts["record"]["validation_sha256"] != record["validation_sha256"]:
                progress.forget_best()

        ranks.wait()  # until all have looked at the folder that the first now makes its own
        if ranks.first:
            goes_on = not config.overwrite and output_folder.folder_status(output_dir) == "unfinished"
            with output_folder.disk_errors_named(output_dir):
                say(*until_trained.enter_context(output_folder.locked_for_run(output_dir, config.overwrite, goes_on)))
                checkpoint.remove_leftovers(output_dir)
                say(*checkpoint.set_aside_after(output_dir, checkpoint_dir))
                atomic.replace(output_dir / output_folder.RECORD, atomic.as_json(record))
        ranks.start_tracker(config, model, resumed.facts["tracker"] if resumed else "")

        with stop.patient():
            Loop(config, plan, learner, train, validation, output_dir, record, progress).run()
            run = progress.result(output_dir)
            if ranks.first:
                checkpoint.remove_leftovers(output_dir)  # nothing hidden stays in what is finished
                state = progress.best or lora.state(model)
                stop_ids = prompt_contract.stop_ids(model.generation_config.eos_token_id, tokenizer, template)
                contract = prompt_contract.build(tokenizer, template, stop_ids, train)
                _save(TrainedAdapter(state, lora.peft_config(model), tokenizer, contract, record), run)
            ranks.wait()
        ranks.keep_model(config, output_dir)
        say(f"adapter saved in {output_dir}: {run.steps} steps in {minutes(run.seconds)}{_gain(run)}")
        if stop:
            raise Interrupted(stop.asked, f"the run was at its end, and its adapter is in {output_dir}")
        return run


def _bytes_written(model: Any, config: FinetuneConfig, plan: Plan) -> int:
    """Return what lies on the disk at the most: checkpoints with adapter, two moments and the best, and one staged."""
    adapter = sum(parameter.numel() * 4 for parameter in lora.trainable_parameters(model))
    kept = min(config.save_total_limit, plan.total_steps // plan.save_steps)
    return 4 * adapter * (kept + 1)


def _save(adapter: TrainedAdapter, run: RunResult) -> None:
    """Save the adapter. Where its folder cannot be written to, it is put where temporary files are, and that is said.

    Raises TrainingError naming that folder.
    """
    try:
        adapter_folder.save(run.output_dir, adapter, run)
    except OSError as error:
        what = f"--output_dir {run.output_dir}: the adapter could not be saved there ({error.strerror or error})"
        try:
            elsewhere = Path(tempfile.mkdtemp(prefix="lora-alpaca-"))
            adapter_folder.save(elsewhere, adapter, replace(run, output_dir=elsewhere))
        except OSError:
            raise TrainingError(
                f"{what}, nor in {tempfile.gettempdir()}; free space, and --resume goes on from the last checkpoint"
            ) from None
        raise TrainingError(f"{what}; it is complete in {elsewhere}: free space and move it") from None


def _prepare(
    config: FinetuneConfig, rows: Rows, held_out: set[int], tokenizer: Any, template: AnyTemplate, ranks: World
) -> Prepared:
    """Return the examples: from the cache, or made by the first process of each machine while the others wait."""
    encoder = Encoder(
        tokenizer, template, config.cutoff_len, config.train_on_inputs, config.add_eos_token, config.train_on
    )
    folder = cache.cache_folder(config.cache_dir) if len(rows) >= cache.CACHED_FROM else None
    key = cache.cache_key(rows, encoder, config, held_out, hash_tokenizer(tokenizer))
    with ranks.first_here() if folder else nullcontext():
        found = cache.cached(folder, key)
        if found:
            ranks.reporter.say(f"prepared rows found in {folder}")
            return found
        with ranks.reporter.counting(len(rows), "rows") as progress:
            prepared = preparation.prepare(rows, encoder, config, held_out, progress)
        return cache.keep(folder, key, prepared)


def _gain(run: RunResult) -> str:
    if run.validation_loss is None or run.first_validation_loss is None:
        return ""
    return f"; validation loss {run.first_validation_loss:.4f} -> {run.validation_loss:.4f}"
