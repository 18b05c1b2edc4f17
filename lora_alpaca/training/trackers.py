"""Figures sent to tensorboard, wandb or trackio."""

import importlib.util


def usable_tracker(name: str) -> tuple[str | None, str]:
    """Return the tracker to use, or None and a sentence about why the asked one cannot be had."""
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
