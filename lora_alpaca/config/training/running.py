"""The options of a run on validation, checkpoints, faults and reports."""

from typing import Annotated, Literal

from pydantic import BeforeValidator

from lora_alpaca.config.options import Finite, Names, Options, lower, option


class RunningOptions(Options):
    """What is validated, saved, resumed, reported, and borne with while a run goes on."""

    eval_steps: int | None = option(
        None,
        "progress and saving",
        "Validate every so many steps.",
        unit="steps",
        auto="200, at most a fourth of the run",
        ge=1,
    )
    save_steps: int | None = option(
        None,
        "progress and saving",
        "Write a checkpoint every so many steps.",
        unit="steps",
        auto="200",
        ge=1,
        decides="nothing",
    )
    logging_steps: int = option(
        10, "progress and saving", "Report the loss every so many steps.", unit="steps", ge=1, decides="nothing"
    )
    save_total_limit: int = option(
        3,
        "progress and saving",
        "Checkpoints kept, and the best one; the oldest go first.",
        unit="folders",
        ge=1,
        decides="nothing",
    )
    early_stopping_patience: int | None = option(
        None,
        "progress and saving",
        "Stop after so many validations without a better loss.",
        unit="validations",
        auto="never",
        ge=1,
    )
    price_per_hour: Finite | None = option(
        None,
        "progress and saving",
        "What an hour of all devices of the run costs together; what has been spent is then told.",
        auto="not told",
        gt=0,
        decides="nothing",
    )
    resume: bool = option(
        False, "progress and saving", "Go on from the newest checkpoint in --output_dir.", decides="nothing"
    )
    resume_from_checkpoint: str | None = option(
        None, "progress and saving", "Go on from this checkpoint folder.", auto="none", decides="nothing"
    )
    allow_change: Names | None = option(
        None,
        "progress and saving",
        "What may differ from the run that is resumed, by name.",
        auto="nothing",
        decides="nothing",
    )
    overwrite: bool = option(
        False, "progress and saving", "Remove what an earlier run of ours left in --output_dir.", decides="nothing"
    )
    export_dir: str = option(
        "",
        "progress and saving",
        "Folder that must not be there: the adapter merged into its base, as export_hf_checkpoint.py writes it, when "
        "training is done.",
        auto="none is written",
        decides="nothing",
    )
    on_nonfinite: Literal["stop", "skip"] = option(
        "stop",
        "progress and saving",
        "At a loss or gradient of NaN or infinity: stop, or skip the step (ten at most).",
        decides="nothing",
    )
    on_oom: Literal["stop", "shrink"] = option(
        "stop",
        "progress and saving",
        "Out of memory: stop, or go on with packs or micro-batches of half the size.",
        decides="nothing",
    )
    rank_timeout: int = option(
        1800,
        "progress and saving",
        "How long processes wait for one of them that hangs.",
        unit="seconds",
        ge=1,
        decides="nothing",
    )
    report: bool = option(
        True,
        "progress and saving",
        "Keep report.html and report.md in --output_dir: what was run, its curves, and what it changed on which rows.",
        decides="nothing",
    )
    report_rows: int | None = option(
        None,
        "progress and saving",
        "Training rows whose loss the report has, before and after.",
        unit="rows",
        auto="a hundredth of those trained on, at most 2000",
        ge=0,
        decides="nothing",
    )
    report_answers: int | None = option(
        None,
        "progress and saving",
        "Validation rows that are answered for the report, before and after; 0 turns it off.",
        unit="rows",
        auto="8, within a hundredth of the run's time",
        ge=0,
        le=256,
        decides="nothing",
    )
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = option(
        "none", "progress and saving", "Also send the figures to tensorboard, wandb or trackio.", decides="nothing"
    )
    wandb_project: str = option(
        "", "progress and saving", "Weights & Biases project; naming one turns wandb on.", decides="nothing"
    )
    wandb_run_name: str = option("", "progress and saving", "Weights & Biases run name.", decides="nothing")
    wandb_watch: Annotated[Literal["", "false", "gradients", "all"], BeforeValidator(lower)] = option(
        "", "progress and saving", "What wandb watches of the adapter: false, gradients or all.", decides="nothing"
    )
    wandb_log_model: Annotated[Literal["", "false", "true"], BeforeValidator(lower)] = option(
        "", "progress and saving", "Whether wandb keeps the finished adapter: false or true.", decides="nothing"
    )
