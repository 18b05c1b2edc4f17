"""Every operation on the files below a folder, seen just before it happens: to count it, note it, fail it or die of it.

Python's own functions are replaced, in this process, so that the standard library's callers (shutil, pathlib) are seen
as well. What libraries in other languages write is seen when it is flushed, and it is always flushed before it counts.
"""

import builtins
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Kind, path, and what more there is: the bytes of a write, the new path of a rename, whether an open empties the file.
Before = Callable[[str, Path, Any], Any]


class Watch:
    """The functions put in place of Python's own; `before(kind, path, more)` is called first, for paths in `folder`.

    Kinds: open (to write), write, fsync, replace, unlink, rmdir, mkdir, chmod. What `before` returns for a write is
    how many bytes of it are written: all of them if that is None.
    """

    def __init__(self, folder: Path, before: Before):
        self.folder, self.before = os.path.realpath(folder), before
        self.open_files: dict[int, str] = {}
        self.own = {name: getattr(os, name) for name in ("open", "close", "write", "fsync", "replace", "rename",
                                                         "unlink", "remove", "rmdir", "mkdir", "chmod",
                                                         "fchmod")}  # fmt: skip
        self.own_open = builtins.open

    def path(self, path: Any, dir_fd: int | None = None) -> str:
        """Return the path that is meant, whole; folders that are open have been noted."""
        above = self.open_files.get(dir_fd, "") if dir_fd is not None else ""
        return os.path.normpath(os.path.join(os.getcwd(), above, os.fspath(path)))

    def tell(self, kind: str, path: str, more: Any = None) -> Any:
        """Call `before`, if this concerns the folder."""
        ours = path == self.folder or path.startswith(self.folder + os.sep)
        return self.before(kind, Path(path), more) if ours else None

    # ------------------------------------------------------------------------------------------ the replacements

    def open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        named = self.path(path, dir_fd)
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            self.tell("open", named, bool(flags & os.O_TRUNC))
        descriptor: int = self.own["open"](path, flags, mode, dir_fd=dir_fd)
        self.open_files[descriptor] = named
        return descriptor

    def close(self, descriptor: int) -> None:
        self.open_files.pop(descriptor, None)
        self.own["close"](descriptor)

    def write(self, descriptor: int, data: Any) -> int:
        named = self.open_files.get(descriptor)
        most = self.tell("write", named, bytes(data)) if named else None
        written: int = self.own["write"](descriptor, data if most is None else data[:most])
        return written

    def fsync(self, descriptor: int) -> None:
        if named := self.open_files.get(descriptor):
            self.tell("fsync", named)
        self.own["fsync"](descriptor)

    def replace(self, path: Any, to: Any, *, dst_dir_fd: int | None = None) -> None:
        self.tell("replace", self.path(path), Path(self.path(to, dst_dir_fd)))
        self.own["replace"](path, to, dst_dir_fd=dst_dir_fd)

    def fchmod(self, descriptor: int, mode: int) -> None:
        if named := self.open_files.get(descriptor):
            self.tell("chmod", named)
        self.own["fchmod"](descriptor, mode)

    def on(self, name: str, kind: str) -> Callable[..., None]:
        """Return the replacement of a function that takes one path."""

        def call(path: Any, *more: Any, dir_fd: int | None = None, **options: Any) -> None:
            self.tell(kind, self.path(path, dir_fd))
            if dir_fd is not None:
                options["dir_fd"] = dir_fd
            self.own[name](path, *more, **options)

        return call

    def python_open(self, file: Any, mode: str = "r", *more: Any, **options: Any) -> Any:
        if not isinstance(file, int) and set(mode) & set("wax+"):
            self.tell("open", self.path(file), "w" in mode)
        return self.own_open(file, mode, *more, **options)

    def begin(self) -> None:
        """Put the replacements in place."""
        for name in ("open", "close", "write", "fsync", "replace", "fchmod"):
            setattr(os, name, getattr(self, name))
        os.rename = self.replace
        for name, kind in (("unlink", "unlink"), ("remove", "unlink"), ("rmdir", "rmdir"), ("mkdir", "mkdir"),
                           ("chmod", "chmod")):  # fmt: skip
            setattr(os, name, self.on(name, kind))
        builtins.open = io.open = self.python_open  # type: ignore[assignment]

    def end(self) -> None:
        """Put Python's own back."""
        for name, function in self.own.items():
            setattr(os, name, function)
        builtins.open = io.open = self.own_open


@contextmanager
def watched(folder: Path, before: Before) -> Iterator[Watch]:
    """See every operation below a folder within this context."""
    watch = Watch(folder, before)
    watch.begin()
    try:
        yield watch
    finally:
        watch.end()


def dies_before(number: int, halfway: bool = False) -> Before:
    """Return what ends this process before the n-th operation, counted from 1; of a write, after half of its bytes."""
    seen = 0

    def before(kind: str, path: Path, more: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == number:
            if halfway and kind == "write":
                with io.FileIO(path, "ab") as file:
                    file.write(more[: len(more) // 2])
            os._exit(9)

    return before
