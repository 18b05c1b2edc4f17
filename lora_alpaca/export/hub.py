"""Upload of a folder that an export has published to the hub: what its record lists, and nothing else in that folder.

The token is the one of the environment or of the login; it is written nowhere, and taken out of what the hub answers.
"""

import os
import re
import shlex
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_alpaca.artifacts import privacy
from lora_alpaca.errors import ConfigError, ExportError
from lora_alpaca.storage.output_folder import RECORD

REPOSITORY = re.compile(r"(?P<owner>[\w.-]+)/[\w.-]+", re.ASCII)
PUBLIC = "is there already, and everybody can read it; pass --private false if that is meant"
NEVER = re.compile(
    rf"{'|'.join(map(re.escape, privacy.FILES))}|checkpoint-\d+|\..*"
)  # names of files, and of folders on the way


def require_login(repository: str, private: bool = True) -> None:
    """Raise unless the folder of an export can be uploaded to a repository later: nothing is made or sent yet.

    Raises ConfigError for a name that is none, and for a public repository where a private one is asked for, and
    ExportError where nobody is logged in, or somebody who has no say in that place.
    """
    from huggingface_hub import HfApi

    flag = f"--push_to_hub {repository}"
    if not (match := REPOSITORY.fullmatch(repository)):
        raise ConfigError(f"{flag}: not the name of a repository; write NAME/REPOSITORY")
    with _one_line(f"{flag}: nothing was written"):
        if not _token():
            raise ExportError(f"{flag}: nobody is logged in to the hub; run hf auth login, or set HF_TOKEN")
        found = HfApi().whoami()
        owners = {found.get("name"), *(team.get("name") for team in found.get("orgs") or [])}
    if match["owner"] not in owners:
        known = ", ".join(sorted(str(owner) for owner in owners if owner))
        raise ExportError(f"{flag}: the hub knows you as {known}, and not as {match['owner']}; name your repository")
    if private and _is_public(repository):
        raise ConfigError(f"{flag}: {PUBLIC}")


def push(folder: Path, repository: str, private: bool, files: Iterable[str]) -> str:
    """Upload files of a folder, by their relative paths, and its record, in one commit, and return the page on the hub.

    Private files, checkpoints and links are left out, whoever lists them. Raises ExportError, with what to do.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    names = sorted(name for name in {*files, RECORD} if _may_go_out(folder, name))
    by_hand = shlex.join(["hf", "upload", repository, str(folder), ".", *["--private"] * private, *_included(names)])
    with _one_line(f"--push_to_hub {repository}: {folder} stands, but was not uploaded", f"; try {by_hand}"):
        api = HfApi()
        url = api.create_repo(repository, private=private, exist_ok=True)
        if private and _is_public(repository):
            raise ConfigError(f"--push_to_hub {repository}: {PUBLIC}; {folder} stands, but was not uploaded")
        additions = [CommitOperationAdd(name, folder / name) for name in names]
        api.create_commit(repository, additions, commit_message="Written by lora_alpaca")
    return str(url)


def _included(names: list[str]) -> list[str]:
    """Return the flags with which the hub's own command uploads these files of a folder, and no others."""
    patterns = sorted({re.sub(r"-\d{5}-of-\d{5}", "-*", name) for name in names})
    return [word for pattern in patterns for word in ("--include", pattern)]


def _may_go_out(folder: Path, name: str) -> bool:
    """Return whether a name is that of a plain file in a folder, on the way to which is no link and nothing private."""
    path = folder
    for part in Path(name).parts:
        path = path / part
        if NEVER.fullmatch(part) or path.is_symlink():
            return False
    return path.is_file()


def _is_public(repository: str) -> bool:
    """Return whether a repository is there and everybody can read it."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    with _one_line(f"--push_to_hub {repository}: the hub does not say who can read it"):
        try:
            return not HfApi().repo_info(repository).private
        except RepositoryNotFoundError:
            return False


def _token() -> str:
    from huggingface_hub import get_token

    return get_token() or ""


@contextmanager
def _one_line(what: str, remedy: str = "") -> Any:
    """Raise ExportError of one line, without the token, for whatever the hub or the way there answers."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # the hub's many errors have no common base
        if isinstance(error, ExportError) and not remedy:
            raise
        told = [error, *([error.__cause__] if error.__cause__ else [])]
        lines = [line.strip() for one in told for line in str(one).splitlines() if line.strip()]
        reason = " ".join(lines or [type(error).__name__])[:300].removesuffix(".")
        for secret in filter(None, (_token(), os.environ.get("HF_TOKEN", ""))):
            reason = reason.replace(secret, "***")
        raise ExportError(f"{what} ({reason}){remedy}") from None
