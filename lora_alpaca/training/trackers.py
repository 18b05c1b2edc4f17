"""The figures of a run, sent to tensorboard, wandb or trackio, on Accelerate's trackers.

A tracker that is missing or fails is reported in a sentence, and never ends a run: training is worth more than curves.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from lora_alpaca.config import FinetuneConfig


class Tracker:
    """Where the main process sends the figures of a run; nowhere, if none was asked for or none can be used.

    `log` prints what is wrong with a tracker. With the `tracker_id` of a resumed run, wandb continues its curves.
    """

    def __init__(self, config: FinetuneConfig, is_main: bool, log: Callable[[str], None]):
        self._config, self._tracker, self._log = config, None, log
        self._name, problem = usable_tracker("wandb" if config.wandb_project else config.report_to)
        if problem:
            log(problem)
        if not is_main:
            self._name = None

    def start(self, model: Any, tracker_id: str = "") -> None:
        """Begin to send figures."""
        if self._name is None:
            return
        config, name = self._config, self._name
        options = {
            key: value if isinstance(value, (int, float, str, bool)) else str(value)
            for key, value in config.model_dump().items()
        }
        arguments = {"name": config.wandb_run_name} if config.wandb_run_name else {}
        if tracker_id and name == "wandb":
            arguments |= {"id": tracker_id, "resume": "allow"}
        kind: Any = LOGGER_TYPE_TO_CLASS[name]
        project = config.wandb_project or Path(config.output_dir).name
        if kind.requires_logging_directory and (Path(config.output_dir) / project).is_symlink():
            where = Path(config.output_dir) / project
            self._log(f"warning: --report_to {name}: {where} is a symbolic link; going on without it")
            return
        try:
            tracker = (
                kind(project, config.output_dir) if kind.requires_logging_directory else kind(project, **arguments)
            )
            tracker.start()
            tracker.store_init_configuration(options)
            if name == "wandb" and config.wandb_watch in ("gradients", "all"):
                tracker.tracker.watch(model, log=config.wandb_watch)
        except Exception as error:  # of any library
            self._log(f"warning: --report_to {name}: {error}; going on without it".replace("\n", " "))
            return
        self._tracker = tracker

    @property
    def id(self) -> str:
        """Return the id that wandb gave to this run; empty for other trackers."""
        return str(self._tracker.tracker.id) if self._tracker is not None and self._name == "wandb" else ""

    def track(self, figures: dict[str, float], step: int) -> None:
        """Send the figures of a step."""
        if self._tracker is not None:
            self._tracker.log(figures, step=step)

    def finish(self, adapter_folder: Path) -> None:
        """End the run at the tracker, which gets the adapter if --wandb_log_model asks for that."""
        if self._tracker is None:
            return
        if self._name == "wandb" and self._config.wandb_log_model == "true":
            self._tracker.tracker.log_artifact(str(adapter_folder), name=adapter_folder.name, type="model")
        self._tracker.finish()


def usable_tracker(name: str) -> tuple[str | None, str]:
    """Return the tracker to use, or None and a sentence on why it cannot be used."""
    if name == "none":
        return None, ""
    if importlib.util.find_spec(name) is None:
        return None, f"warning: --report_to {name}: not installed (pip install {name}); going on without it"
    if name == "wandb":
        import wandb

        offline = wandb.setup().settings.mode in ("offline", "disabled", "dryrun")
        if not offline and not wandb.login(prompt=False):
            return None, "warning: --report_to wandb: not logged in (wandb login); going on without it"
    return name, ""
