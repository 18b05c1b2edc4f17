"""What a run is made of: `prepare` finds all that can fail cheaply, `load` is the first heavy step."""

from contextlib import nullcontext

import torch

from lora_alpaca.artifacts import adapter_folder
from lora_alpaca.config import FinetuneConfig
from lora_alpaca.data import Rows, cache, held_out, preparation
from lora_alpaca.data.encoding import Encoder
from lora_alpaca.data.preparation import Prepared
from lora_alpaca.data.tokenization import hash_tokenizer
from lora_alpaca.distributed.world import World
from lora_alpaca.errors import DataError
from lora_alpaca.models import lora
from lora_alpaca.models.base import load_base, locate_base
from lora_alpaca.models.fingerprint import hash_base
from lora_alpaca.models.lora import LoraAdapter
from lora_alpaca.models.tokenizer import load_tokenizer
from lora_alpaca.planning import preflight
from lora_alpaca.planning.plan import Plan, fill_defaults
from lora_alpaca.prompts import fitting_template, load_template
from lora_alpaca.storage.paths import user_path
from lora_alpaca.training.job import Job
from lora_alpaca.training.progress import Progress
from lora_alpaca.training.resume import Start


def prepare(config: FinetuneConfig, rows: Rows | None, world: World, start: Start, progress: Progress) -> Job:
    """Return the job that a config describes; `rows` are those of its data, if they have been read.

    Raises ConfigError, DataError, TemplateError, ModelError and AdapterError, before anything heavy is loaded.
    """
    log = progress.log
    template = load_template(config.prompt_template_name) if config.prompt_template_name else None
    if config.init_adapter:
        adapter_folder.check_init_adapter(config)
    config, notes = fill_defaults(config, world.world_size)
    log(*notes)
    rows = rows or Rows(config.data_path, config.columns, config.skip_bad_rows)
    if not world.all_equal(rows.digest):
        raise DataError(f"--data_path {config.data_path}: the processes read different rows; is it being written?")
    validation_rows = held_out(len(rows), config.val_set_size, config.seed)

    base = locate_base(config.base_model, config.revision, config.trust_remote_code)
    size, notes = preflight.check_model(config, base, world.spec)
    log(*notes)
    config, notes = preflight.check_options(config, base)
    log(*notes)
    tokenizer = load_tokenizer(base)
    template = (start.template(template) or fitting_template(rows.formats, tokenizer)).bound(tokenizer)
    tokenizer_sha256 = hash_tokenizer(tokenizer)
    encoder = Encoder.from_options(tokenizer, template, config)
    prepared = _examples(config, rows, validation_rows, encoder, tokenizer_sha256, world, progress)
    train, validation, statistics = prepared.train, prepared.validation, prepared.statistics
    log(f"data: {config.data_path}, sha256 {rows.digest[:12]}; template {template.name}", *statistics.lines())
    if rows.ignored:
        log(f"fields that are not used: {', '.join(sorted(map(str, rows.ignored)))}")
    statistics.check(config.max_truncated, config.max_dropped, config.max_duplicates)
    if len(train) < config.batch_size:
        log(f"warning: {len(train)} rows are fewer than --batch_size {config.batch_size}: every step is an epoch")

    with world.main_process_first():  # the others find the hashes of its files in the cache
        base_sha256 = hash_base(base)
    hashes = {
        "base_sha256": base_sha256,
        "tokenizer_sha256": tokenizer_sha256,
        "data_sha256": rows.digest,
        "validation_sha256": validation.digest(),
    }
    return Job(config, base, world.spec, tokenizer, template, train, validation, statistics, size, hashes)


def _examples(
    config: FinetuneConfig,
    rows: Rows,
    validation_rows: set[int],
    encoder: Encoder,
    tokenizer_sha256: str,
    world: World,
    progress: Progress,
) -> Prepared:
    """Return the examples: from the cache, or made by the main process of each machine while the others wait."""
    folder = cache.cache_folder(config.cache_dir) if len(rows) >= cache.CACHED_FROM else None
    key = cache.cache_key(rows, encoder, validation_rows, tokenizer_sha256)
    with world.main_process_first() if folder else nullcontext():
        if found := cache.cached(folder, key):
            progress.log(f"prepared rows found in {folder}")
            return found
        with progress.counting(len(rows), "rows") as count:
            prepared = preparation.prepare(rows, encoder, validation_rows, count)
        return cache.keep(folder, key, prepared)


def load(job: Job, plan: Plan) -> tuple[LoraAdapter, list[str]]:
    """Return the adapter to train, on its base, and notes. This is the first heavy step of a run.

    The adapter is a new one, or that of --init_adapter.
    """
    config = job.config
    torch.manual_seed(config.seed)  # the adapter's first weights are the same on every rank
    model, notes = load_base(job.base, job.spec)
    if config.init_adapter:
        folder = user_path(config.init_adapter)
        model = adapter_folder.load(model, folder, trainable=True, dropout=config.lora_dropout)
    else:
        model = lora.attach(model, config, job.base)
    if plan.gradient_checkpointing:
        model.enable_input_require_grads()
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    return LoraAdapter(model), notes
