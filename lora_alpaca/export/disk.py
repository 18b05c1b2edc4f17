"""Whether a disk has room for a model."""

import shutil
from pathlib import Path

from lora_alpaca.errors import FolderError
from lora_alpaca.models.memory import gigabytes


def require_space(where: str, path: Path, what: str, needed: int) -> None:
    """Raise FolderError, which begins with `where`, if the disk of a new path has fewer than `needed` bytes left."""
    above = next(parent for parent in path.resolve().parents if parent.exists())
    if needed > (free := shutil.disk_usage(above).free):
        raise FolderError(
            f"{where}: {what} takes {gigabytes(needed)}, and {gigabytes(free)} are free on that disk; name a folder on "
            "another one"
        )
