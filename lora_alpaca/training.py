"""The main job as a story: `finetune` prepares, cheap failures first, and `_train` is the loop."""

import math
import time
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from lora_alpaca import adapters, checkpoints, contracts, data, folders, models, planning, preparation, records
from lora_alpaca.adapters import State
from lora_alpaca.batching import rows_of_step
from lora_alpaca.checkpoints import Checkpoint
from lora_alpaca.config import FinetuneConfig
from lora_alpaca.data import Rows
from lora_alpaca.encoding import Encoder
from lora_alpaca.engine import Settings, fitted
from lora_alpaca.errors import DataError
from lora_alpaca.examples import Examples
from lora_alpaca.fingerprints import base_fingerprint
from lora_alpaca.options import user_path
from lora_alpaca.planning import Plan
from lora_alpaca.preparation import Prepared
from lora_alpaca.prompts import AnyTemplate, fitting_template, load_template, template_from_json
from lora_alpaca.ranks import Ranks
from lora_alpaca.records import Run
from lora_alpaca.reports import Reporter, minutes
from lora_alpaca.step import Learner
from lora_alpaca.tokenization import fingerprint


def finetune(config: FinetuneConfig, rows: Rows | None = None) -> Run:
    """Train a LoRA adapter and return what came of it; the adapter lies, self-describing, in `config.output_dir`.

    `rows` are those of `config.data_path`, if they have been read already.

    Reads the data, holds out a validation split, trains with AdamW, validates and writes checkpoints at intervals,
    and keeps the adapter with the best validation loss. On one CPU, one config gives bit-identical adapters.
    Raises the children of LoraAlpacaError, and those about options, folders and data before a model is loaded.
    """
    with Ranks(config) as ranks, ExitStack() as until_trained:
        say = ranks.reporter.say
        output_dir = user_path(config.output_dir)
        if config.resume and folders.read_record(output_dir).get("status") == "finished":
            say(f"{output_dir}: this run is already finished")
            return records.finished_run(output_dir)
        checkpoint_dir = _checkpoint_to_resume(config, output_dir, ranks.reporter)
        template = load_template(config.prompt_template_name) if config.prompt_template_name else None
        if config.init_adapter:
            adapters.check_start(config)
        config = planning.with_recipe(config, ranks.world_size, ranks.reporter)
        rows = rows or Rows(config.data_path, config.columns, config.skip_bad_rows)
        if not ranks.agree(rows.digest):
            raise DataError(f"--data_path {config.data_path}: the processes read different rows; is it being written?")
        held_out = data.held_out(len(rows), config.val_set_size, config.seed)

        base = models.locate_base(config.base_model, config.revision, config.trust_remote_code)
        config = planning.within_model(config, base, ranks.placement, ranks.reporter)
        tokenizer = models.load_tokenizer(base)
        resumed = checkpoints.load(checkpoint_dir) if checkpoint_dir else None
        template = (_as_before(resumed, template) or fitting_template(rows.formats, tokenizer)).bound(tokenizer)
        prepared = _prepare(config, rows, held_out, tokenizer, template, ranks)
        train, validation, ledger = prepared.train, prepared.validation, prepared.ledger
        say(f"data: {config.data_path}, sha256 {rows.digest[:12]}; template {template.name}", *ledger.lines())
        if rows.ignored:
            say(f"fields that are not used: {', '.join(sorted(map(str, rows.ignored)))}")
        ledger.check(config.max_truncated, config.max_dropped, config.max_duplicates)
        if len(train) < config.batch_size:
            say(f"warning: {len(train)} rows are fewer than --batch_size {config.batch_size}: every step is an epoch")
        if not config.add_eos_token:
            say("warning: --add_eos_token False: the end token is not learned, so answers will not stop by themselves")

        with ranks.first_here():  # the others find the hashes of its files in the cache
            base_sha256 = base_fingerprint(base)
        hashes = (base_sha256, template, fingerprint(tokenizer))
        record = records.describe(config, base, *hashes, ranks.placement, ranks.world_size, rows.digest, ledger)
        if resumed:
            records.check_same(resumed.facts["record"], record)
        plan = Plan(**resumed.facts["plan"]) if resumed else planning.resolve(config, len(train), ranks.world_size)
        say(f"base: {base.name}, {ranks.placement}", f"plan: {plan}")

        torch.manual_seed(config.seed)  # the adapter's first weights are the same on every rank
        model = models.load_base(base, ranks.placement)  # the first heavy step
        if config.init_adapter:
            start = user_path(config.init_adapter)
            model = adapters.load(model, start, trainable=True, dropout=config.lora_dropout)
        else:
            model = adapters.attach(model, config, base)
        lengths = train.lengths
        if not resumed:
            planning.resolve_engine(config, plan, model, ranks.device, lengths, ranks.world_size)
        if plan.gradient_checkpointing:
            model.enable_input_require_grads()
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        settings = Settings(
            plan.engine,
            ranks.device,
            ranks.placement.dtype,
            plan.token_budget,
            config.share_prefix,
            plan.micro_batch_size,
            tokenizer.pad_token_id,
            plan.compiled,
            checked=resumed is not None,
        )
        engine, said = until_trained.enter_context(fitted(model, settings, train, lengths, ranks.autocast))
        say(*said)
        plan.engine = engine.name
        learner = Learner(engine, ranks, config.weight_decay, config.max_grad_norm)

        ranks.wait()  # until all have looked at the folder that the first now makes its own
        if ranks.first:
            goes_on = not config.overwrite and folders.standing(output_dir) == "unfinished"
            say(*([] if goes_on else folders.claim(output_dir, config.overwrite)))
            folders.write_json(output_dir / folders.RECORD, record)
        ranks.wait()
        ranks.start_tracker(config, model)
        torch.manual_seed(config.seed + 1 + ranks.rank)  # dropout differs from rank to rank
        progress = _restored(resumed, learner, ranks) if resumed else Progress()

        _train(config, plan, learner, ranks, train, validation, progress, record)

        run = progress.result(output_dir)
        if ranks.first:
            state = progress.best or adapters.state(model)
            stop_ids = contracts.stop_ids(model.generation_config.eos_token_id, tokenizer, template)
            contract = contracts.draw_up(tokenizer, template, stop_ids, train)
            records.save_adapter(output_dir, state, adapters.settings(model), tokenizer, contract, record, run)
        ranks.wait()
        ranks.keep_model(config, output_dir)
        say(f"adapter saved in {output_dir}: {run.steps} steps in {minutes(run.seconds)}{_gain(run)}")
        return run


def _prepare(
    config: FinetuneConfig, rows: Rows, held_out: set[int], tokenizer: Any, template: AnyTemplate, ranks: Ranks
) -> Prepared:
    """Return the examples: from the cache, or made by the first process of each machine while the others wait."""
    encoder = Encoder(
        tokenizer, template, config.cutoff_len, config.train_on_inputs, config.add_eos_token, config.train_on
    )
    folder = preparation.cache_folder(config.cache_dir) if len(rows) >= preparation.CACHED_FROM else None
    key = preparation.cache_key(rows, encoder, config, held_out, fingerprint(tokenizer))
    with ranks.first_here() if folder else nullcontext():
        found = preparation.cached(folder, key)
        if found:
            ranks.reporter.say(f"prepared rows found in {folder}")
            return found
        with ranks.reporter.counting(len(rows), "rows") as progress:
            prepared = preparation.prepare(rows, encoder, config, held_out, progress)
        return preparation.keep(folder, key, prepared)


@dataclass
class Progress:
    """Where a run stands: everything that changes from step to step but the weights. It travels in the checkpoints."""

    step: int = 0
    seconds: float = 0.0
    first_loss: float | None = None  # of validation, before the first step
    best_loss: float = math.inf
    best_step: int = 0
    without_gain: int = 0  # validations since the best one
    window_loss: float = 0.0  # summed over the labels since the last logged line
    window_labels: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    best: State = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """Return what fits into JSON."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "best"}

    def mean_loss(self) -> float:
        """Return the mean loss per label since the last logged line."""
        return self.window_loss / max(1, self.window_labels)

    def result(self, output_dir: Path) -> Run:
        """Return what the caller gets."""
        validated = self.first_loss is not None
        kept = (self.best_loss if validated else None, self.first_loss, self.best_step if validated else None)
        return Run(output_dir, self.step, *kept, seconds=self.seconds, history=self.history)


def _train(
    config: FinetuneConfig,
    plan: Plan,
    learner: Learner,
    ranks: Ranks,
    train: Examples,
    validation: Examples,
    progress: Progress,
    record: dict[str, Any],
) -> None:
    """Take the steps from `progress.step` to the plan's end; log, validate and write checkpoints in between."""
    reporter, output_dir = ranks.reporter, user_path(config.output_dir)
    lengths = train.lengths
    if validation and progress.step == 0:
        progress.first_loss = learner.evaluate(validation)
        reporter.say(f"validation loss {progress.first_loss:.4f} before the first step")
    clock = time.perf_counter
    begun, window_begun, window_tokens = clock() - progress.seconds, clock(), 0
    reporter.start(plan.total_steps, progress.step)

    while progress.step < plan.total_steps:
        rows = rows_of_step(progress.step, lengths, config.batch_size, config.seed, config.group_by_length)
        rate = plan.learning_rate(progress.step, config)
        step = learner.step([train[row] for row in rows], rate, progress.step + 1)
        progress.step += 1
        progress.window_loss += step.loss * step.labels
        progress.window_labels += step.labels
        progress.seconds = clock() - begun
        window_tokens += step.tokens
        speed = window_tokens / max(1e-9, clock() - window_begun)
        reporter.progress(progress.step, progress.mean_loss(), speed)
        if step.skipped:
            reporter.say(f"step {progress.step}: the gradients overflow fp16; the loss scale is lowered, nothing moved")
        last = progress.step == plan.total_steps

        if progress.step % config.logging_steps == 0 or last:  # once in a while: say how it goes
            figures = {
                "loss": progress.mean_loss(),
                "learning_rate": rate,
                "grad_norm": step.grad_norm,
                "tokens_per_second": speed,
            }
            reporter.interval(progress.step, figures["loss"], rate, speed)
            progress.history.append({"step": progress.step, **figures})
            ranks.track(figures, progress.step)
            progress.window_loss, progress.window_labels = 0.0, 0
            window_begun, window_tokens = clock(), 0

        if validation and (progress.step % plan.eval_steps == 0 or last):  # once in a while: validate, keep the best
            loss = learner.evaluate(validation)
            progress.history.append({"step": progress.step, "validation_loss": loss})
            ranks.track({"validation_loss": loss}, progress.step)
            progress.without_gain += 1
            if loss < progress.best_loss:
                progress.best_loss, progress.best_step, progress.without_gain = loss, progress.step, 0
                progress.best = adapters.state(learner.model)
            reporter.say(
                f"validation loss {loss:.4f} at step {progress.step}" + ("" if progress.without_gain else ", the best")
            )
            if progress.without_gain == config.early_stopping_patience:
                reporter.say(f"stopped early: {progress.without_gain} validations without a better loss")
                break

        if progress.step % plan.save_steps == 0 and not last:  # once in a while: make sure nothing is lost
            facts = {"step": progress.step, "plan": asdict(plan), "progress": progress.facts(), "record": record}
            random_state = ranks.random_state()
            if ranks.first:
                state = adapters.state(learner.model)
                checkpoint = Checkpoint(facts, state, learner.optimizer_state(), random_state, progress.best)
                checkpoints.save(output_dir, checkpoint, adapters.settings(learner.model))
                checkpoints.rotate(output_dir, config.save_total_limit)
            ranks.wait()
    reporter.stop()


# --------------------------------------------------------------------------------------------------------- resuming


def _checkpoint_to_resume(config: FinetuneConfig, output_dir: Path, reporter: Reporter) -> Path | None:
    """Return the checkpoint folder to go on from, or None for a fresh start, for which the output folder is checked."""
    if config.resume_from_checkpoint:
        folder = checkpoints.named(config.resume_from_checkpoint)
        folders.check(output_dir, overwrite=folders.standing(output_dir) == "unfinished", ways_on="")
        return folder
    if config.resume:
        newest, passed = checkpoints.newest(output_dir)
        reporter.say(*passed, f"resuming from {newest}" if newest else "--resume: no checkpoint yet; starting fresh")
        if newest:
            return newest
    ways_on = "go on with --resume, or start anew with --overwrite"
    folders.check(output_dir, config.overwrite or config.resume, ways_on)
    return None


def _as_before(checkpoint: Checkpoint | None, template: AnyTemplate | None) -> AnyTemplate | None:
    """Return the template to use; that of a run that goes on with a chat template is the one of then, with its date."""
    if checkpoint is None or (template is not None and template.name != "chat"):
        return template
    recorded = template_from_json(checkpoint.facts["record"]["template"], "", "checkpoint")
    return recorded if recorded.name == "chat" else template


def _restored(checkpoint: Checkpoint, learner: Learner, ranks: Ranks) -> Progress:
    """Put adapter, optimizer and random states back, and return where the run stood."""
    adapters.set_state(learner.model, checkpoint.adapter, "checkpoint")
    learner.load_optimizer_state(checkpoint.optimizer)
    ranks.restore_random_state(checkpoint.random)
    return Progress(**checkpoint.facts["progress"], best=checkpoint.best)


def _gain(run: Run) -> str:
    if run.validation_loss is None or run.first_validation_loss is None:
        return ""
    return f"; validation loss {run.first_validation_loss:.4f} -> {run.validation_loss:.4f}"
