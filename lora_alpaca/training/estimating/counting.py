"""How many tokens a run computes: of the rows themselves, or of a number of rows with a mean length."""

from dataclasses import dataclass
from functools import lru_cache

import torch

from lora_alpaca.config import FinetuneConfig
from lora_alpaca.config.estimating import EstimateConfig
from lora_alpaca.data import cache, held_out, preparation
from lora_alpaca.data.encoding import Encoder
from lora_alpaca.data.examples import Builder, Example, Examples
from lora_alpaca.data.preparation import Prepared
from lora_alpaca.data.sampler import Sampler
from lora_alpaca.data.tokenization import hash_tokenizer
from lora_alpaca.engine.batches import micro_batches
from lora_alpaca.engine.packing import length_multiple, pack, packs
from lora_alpaca.errors import ConfigError, DataError, ModelError
from lora_alpaca.models.base import Base
from lora_alpaca.models.device import DeviceSpec
from lora_alpaca.models.tokenizer import load_tokenizer
from lora_alpaca.planning.plan import Plan
from lora_alpaca.prompts import fitting_template, load_template
from lora_alpaca.training.reading import read_rows

SAMPLED_STEPS = 4
BY_HAND = "say --rows N --mean_tokens M"


@dataclass(frozen=True)
class Counted:
    """Rows of a run: those to train on and to validate on, how they are known, and whether they are the run's own."""

    train: Examples
    validation: Examples
    words: str

    @property
    def tokens(self) -> int:
        """Return the tokens of the rows that are trained on."""
        return len(self.train.ids)


def count(config: EstimateConfig, run: FinetuneConfig, base: Base) -> Counted:
    """Return the rows of a run, or as many of their mean length, where data or tokenizer are not at hand.

    Raises ConfigError that names the flags which say it by hand, where nothing is known of the rows.
    """
    if config.rows is not None:
        return _assumed(config.rows, config.mean_tokens or run.cutoff_len, run, base)
    if config.mean_tokens is not None:
        raise ConfigError(f"--mean_tokens {config.mean_tokens:g} is for so many rows: say --rows N too")
    try:
        rows = read_rows(run)
    except DataError as error:
        if config.is_set("data_path"):
            raise
        raise ConfigError(f"{error}; {BY_HAND}, and the rows are not needed") from None
    number = sum(map(len, rows.parts))
    try:
        tokenizer, _ = load_tokenizer(base)
    except ModelError:
        found = _assumed(number, run.cutoff_len, run, base)
        return Counted(found.train, found.validation, f"{found.words}, for the base has no tokenizer; {BY_HAND}")
    named = load_template(run.prompt_template_name) if run.prompt_template_name else None
    template = (named or fitting_template(rows.train.formats, tokenizer)).bound(tokenizer)
    encoder = Encoder.from_options(tokenizer, template, run, base.vocabulary)
    of_train = held_out(len(rows.train), 0 if rows.validation is not None else run.val_set_size, run.seed)
    folder, _ = cache.cache_folder(run.cache_dir) if number >= cache.CACHED_FROM else (None, [])
    key = cache.cache_key(rows.train, encoder, of_train, hash_tokenizer(tokenizer), rows.validation)
    prepared: Prepared | None = cache.cached(folder, key)
    if prepared is None:
        prepared = cache.keep(
            folder, key, preparation.prepare(rows.train, encoder, of_train, lambda _: None, rows.validation)
        )
    tokens = prepared.statistics.tokens
    words = f"{len(prepared.train):,} rows, {tokens:,} tokens, counted"
    return Counted(prepared.train, prepared.validation, words)


def _assumed(rows: int, mean: float, run: FinetuneConfig, base: Base) -> Counted:
    """Return so many rows of random tokens, of two lengths whose mean is as asked; the second half of each is learned.

    Random rows share no beginnings, so real ones take no more.
    """
    mean = min(mean, run.cutoff_len)
    held = len(held_out(rows, 0 if run.val_data_path else run.val_set_size, run.seed))
    train, validation = (_random_rows(number, mean, base.vocabulary) for number in (rows - held, held))
    return Counted(train, validation, f"{rows - held:,} rows of {mean:g} tokens, assumed")


@lru_cache(maxsize=2)
def _random_rows(number: int, mean: float, vocabulary: int) -> Examples:
    low, draw = int(mean), torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (4 * low + 4,), generator=draw, dtype=torch.int32).numpy()
    builder, longer = Builder(), round(number * (mean - low))
    for row in range(number):
        length = low + (row < longer)
        start = row % (len(tokens) - length)
        builder.add(Example(tokens[start : start + length], [(length // 2, length)]), row)
    return builder.build()


@dataclass(frozen=True)
class Computed:
    """What a rank computes in an average step, and the rows of its largest batch, to be measured with."""

    tokens: float
    predictions: float
    batches: float
    largest: list[Example]


def compute(counted: Counted, run: FinetuneConfig, plan: Plan, spec: DeviceSpec, devices: int) -> Computed:
    """Return what the first steps of a run compute, by the plan; rows that begin alike are packed as they will be."""
    sampler = Sampler(counted.train.lengths, run.batch_size, run.seed, run.group_by_length)
    steps = min(SAMPLED_STEPS, plan.total_steps)
    tokens = predictions = 0
    largest: list[tuple[int, list[Example]]] = []
    for step in range(steps):
        rows = [counted.train[row] for row in sampler.rows(step)]
        if plan.engine == "padded":
            shares = micro_batches(range(len(rows)), plan.micro_batch_size, 0, 1)
        else:
            shares = packs(rows, plan.token_budget, plan.share_prefix)
        for share in shares:
            chosen = [rows[row] for row in share]
            if plan.engine == "padded":
                size = len(chosen) * max(len(row.ids) for row in chosen)
                predictions += sum(row.num_labels() for row in chosen)
            else:
                made = pack(chosen, plan.share_prefix, multiple=length_multiple(spec.device, spec.dtype))
                size = made.input_ids.numel()
                predictions += len(made.labels)
            tokens += size
            largest.append((size, chosen))
    batches = len(largest) / steps
    most = max(largest, key=lambda one: one[0])[1]
    return Computed(tokens / steps / devices, predictions / steps / devices, batches / devices, most)
