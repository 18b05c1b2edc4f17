"""`--data_path` to sources: each is a file or a hub dataset, with the name by which errors call it.

A name may be a file, a folder of files, a folder that `save_to_disk` of datasets wrote, a pattern such as
`data/*.jsonl`, a dataset on the hub, or several of them with commas between.
"""

import glob
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from lora_alpaca.config.shared import DEMO
from lora_alpaca.data.readers import files
from lora_alpaca.data.readers.json_rows import NumberedRows
from lora_alpaca.errors import DataError
from lora_alpaca.storage.json_files import read_json
from lora_alpaca.storage.paths import user_path

_NAMED = 20  # files that a line names, of however many
_SPLIT = re.compile(r"(?<![a-z])(train|test|validation|valid|val|dev|eval)(?![a-z])", re.IGNORECASE)
_NO_ROWS = {"dataset_info.json", "dataset_infos.json"}  # which lie beside the rows of `datasets`
_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]*)://(.*)", re.IGNORECASE)
_ON_THE_HUB = re.compile(r"(?:huggingface\.co/|hf\.co/)?datasets/([\w.-]+/[\w.-]+).*", re.IGNORECASE)
_OTHER_KINDS = {  # suffixes that people bring, and the way on
    "a workbook of a spreadsheet; save it as CSV UTF-8": ".xlsx .xls .xlsm .xlsb .ods .numbers",
    "an archive; unpack it, and name the files or their folder": ".zip .tar .tgz .7z .rar .bz2 .xz .zst .lz4",
    "a document with markup; save its text as .txt": ".pdf .docx .doc .odt .rtf .html .htm .epub .tex",
    "a pickle, which may run code when it is loaded; write its rows as .jsonl": ".pkl .pickle .joblib .pt .pth",
    "a database; write its rows as .csv or .jsonl": ".sqlite .sqlite3 .db .duckdb .mdb",
    "arrays of numbers; rows of text are written as .jsonl": ".npy .npz .h5 .hdf5 .safetensors .bin .tfrecord",
    "no list of rows; write them as .jsonl, one object on a line": ".yaml .yml .xml .toml .ini .py .ipynb .log",
    "columns in a compressed form; write it as .parquet": ".feather .orc .avro",
}


def demo_file(name: str) -> Path:
    """Return the path of a part of the demo data: train, development, final or spare."""
    return Path(__file__).parents[2] / "demo" / "instructions" / f"{name}.json"


class Source:
    """One file, or one hub dataset, which has no path but, once it was read, a `revision`, the commit.

    `notes` are good to know of what was read last.
    """

    def __init__(self, path: Path | None, name: str):
        self.path, self.name, self.revision = path, name, ""
        self.notes: list[str] = []

    def read(self) -> NumberedRows:
        """Yield the raw rows with their numbers."""
        self.notes = []
        if self.path is None:
            return files.read_hub(self.name, lambda commit: setattr(self, "revision", commit))
        return files.read_file(self.path, lambda note: self.notes.append(f"warning: {self.name}: {note}"))


def open_sources(data_path: str) -> tuple[list[Source], list[str]]:
    """Return the sources of a --data_path, and lines on what they are. DataError for a name that is no source."""
    whole = os.path.exists(user_path(data_path)) or _matches(data_path)
    parts = [data_path] if whole else [part.strip() for part in data_path.split(",") if part.strip()]
    notes: list[str] = []
    sources = [source for part in parts for source in _sources(part, notes.append)]
    _name(sources)
    if len(sources) > 1:
        notes.insert(0, f"rows are read from {len(sources)} sources: {_listed([source.name for source in sources])}")
    return sources, notes


def _sources(name: str, note: Callable[[str], None]) -> list[Source]:
    path = demo_file("train") if name == DEMO else user_path(name)
    if address := _ADDRESS.fullmatch(name):
        raise DataError(f"--data_path {name}: {_way_from(address[1].lower(), address[2])}")
    if os.path.isdir(path):
        return _in_folder(path, name, note)
    if os.path.exists(path):
        return [_file(path, name)]
    if matches := _matches(name):
        return [source for match in matches for source in _sources(match, note)]
    if re.search(r"[*?]", name):
        raise DataError(f"--data_path {name}: no file matches this pattern")
    folder, colon, split = name.rpartition(":")
    if colon and os.path.isdir(user_path(folder)):
        return _splits(user_path(folder), name, split)
    if files.suffix(path):
        return [Source(path, path.name)]  # reading it tells why it cannot be read
    local = path.is_absolute() or name.startswith((".", "~")) or (path.suffix and "/" not in name)
    if local or not files.hub_id(name):
        raise DataError(f"--data_path {name}: no such file; {_read_from()}")
    return [Source(None, name)]


def _matches(pattern: str) -> list[str]:
    """Return the files that a pattern such as `data/**/*.txt` matches, or else the folders; sorted, no hidden ones."""
    found = sorted(glob.glob(str(user_path(pattern)), recursive=True)) if glob.has_magic(pattern) else []
    return [name for name in found if not os.path.isdir(name)] or found


def _file(path: Path, name: str) -> Source:
    if not files.suffix(path):
        raise DataError(f"--data_path {name}: {_other_kind(path)}")
    return Source(path, path.name)


def _other_kind(path: Path) -> str:
    for what, suffixes in _OTHER_KINDS.items():
        if path.suffix.lower() in suffixes.split():
            return what
    return f"a file of another kind; {_read_from()}"


def _read_from() -> str:
    return f"data is read from {', '.join(files.SUFFIXES)}, each also .gz, from folders of them, or from a hub id"


def _way_from(scheme: str, rest: str) -> str:
    """Return why an address is not read, and the way on."""
    if scheme == "file":
        return f"an address; say the path alone, {rest}"
    if hub := _ON_THE_HUB.fullmatch(rest):
        return f"an address; a dataset of the hub is named by its id, --data_path {hub[1]}"
    return "an address, and nothing is fetched from addresses; download it, and name the file"


# ---------------------------------------------------------------------------------------------------------- folders


def _in_folder(folder: Path, name: str, note: Callable[[str], None]) -> list[Source]:
    """Return the files of a folder that can be read, by name; hidden ones, and links that leave it, are left out."""
    saved = (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    if saved or (folder / "dataset_dict.json").is_file():
        return _splits(folder, name, "")
    taken: list[Path] = []
    left_out: list[str] = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
            left_out.append(f"{path.name} (a link out of it)")
        elif path.is_dir():
            left_out.append(f"{path.name} (a folder)")
        elif path.is_file() and files.suffix(path) and path.name not in _NO_ROWS:
            taken.append(path)
        else:
            left_out.append(path.name)
    without = f"left out: {_listed(left_out)}" if left_out else ""
    if not taken:
        raise DataError(f"--data_path {name}: a folder without a file that can be read{without and f' ({without})'}")
    _refuse_mixed(taken, name)
    if left_out:
        note(f"warning: {name}: {without}")
    return [Source(path, path.name) for path in taken]


def _refuse_mixed(paths: Sequence[Path], name: str) -> None:
    """Raise DataError for a folder that also holds what is not meant to be learned, as far as the names tell."""
    documents = [path.name for path in paths if files.suffix(path) in files.DOCUMENTS]
    rows = [path.name for path in paths if files.suffix(path) not in files.DOCUMENTS]
    if documents and rows:
        raise DataError(
            f"--data_path {name}: a folder with both rows ({rows[0]}) and documents ({documents[0]}); "
            f"name the files, or a pattern such as '{name.rstrip('/')}/*{Path(rows[0]).suffix}'"
        )
    splits = {match[1].lower(): path.name for path in paths if (match := _SPLIT.search(path.name))}
    if "train" in splits and len(splits) > 1:
        raise DataError(
            f"--data_path {name}: a folder with several splits ({', '.join(splits.values())}); "
            f"name the files, or a pattern such as '{name.rstrip('/')}/*train*'"
        )


def _splits(folder: Path, name: str, split: str) -> list[Source]:
    """Return the files of a folder that `save_to_disk` of datasets wrote: of the train split, or the one named."""
    given = read_json(folder / "dataset_dict.json").get("splits")
    if isinstance(given, list):
        if (split or "train") not in given or os.path.basename(split) != split:
            known = ", ".join(map(str, given))
            raise DataError(f"--data_path {name}: the folder has the splits {known}; say {folder}:SPLIT")
        folder = folder / (split or "train")
    elif split:
        raise DataError(f"--data_path {name}: the folder {folder} has no splits; say its name alone")
    entries = read_json(folder / "state.json").get("_data_files")
    found = [entry.get("filename") if isinstance(entry, dict) else None for entry in entries or []]
    if not entries or not all(isinstance(file, str) and file == os.path.basename(file) for file in found):
        raise DataError(f"--data_path {name}: {folder / 'state.json'} names no files of rows; save the dataset anew")
    return [Source(folder / str(file), str(file)) for file in found]


# ------------------------------------------------------------------------------------------------------------ names


def _name(sources: Sequence[Source]) -> None:
    """Name files by as many of their last folders as tells them apart."""
    paths = [source.path for source in sources if source.path is not None]
    length = 1
    while len({path.parts[-length:] for path in paths}) < len(set(paths)):
        length += 1
    for source in sources:
        if source.path is not None:
            source.name = "/".join(source.path.parts[-length:])


def _listed(names: Sequence[str]) -> str:
    more = f", and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
