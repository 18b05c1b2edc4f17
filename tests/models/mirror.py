"""A mirror of the hub on this machine: the files of one folder under one name, as its address has them."""

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Mirror:
    """What a mirror was asked for, and how it behaves: `status` for all, and `cuts`, the files of which the first
    answer ends halfway.
    """

    def __init__(self, folder: Path, status: int, cuts: set[str]):
        self.folder, self.status, self.cuts = folder, status, cuts
        self.asked: list[tuple[str, str, str]] = []  # method, file, range
        self.address = ""


@contextmanager
def mirror(folder: Path, status: int = 200, cuts: tuple[str, ...] = ()) -> Iterator[Mirror]:
    """Serve a folder as `someone/tiny`, at `address`, until the context ends."""
    found = Mirror(folder, status, set(cuts))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(sends=False)

        def do_GET(self) -> None:
            self.answer(sends=True)

        def answer(self, sends: bool) -> None:
            name, wanted = self.path.partition("?")[0].rpartition("/")[2], self.headers.get("Range", "")
            found.asked.append((self.command, name, wanted))
            path = found.folder / name
            if found.status != 200 or "/resolve/" not in self.path or not path.is_file():
                self.refuse(found.status if found.status != 200 else 404)
                return
            data = path.read_bytes()
            begin = int(wanted.removeprefix("bytes=").partition("-")[0] or 0) if wanted else 0
            self.send_response(206 if begin else 200)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.send_header("Accept-Ranges", "bytes")
            if begin:
                self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
            self.send_header("Content-Length", str(len(data) - begin))
            self.end_headers()
            if sends and name in found.cuts:
                found.cuts.remove(name)
                self.wfile.write(data[: len(data) // 2])
                self.close_connection = True
            elif sends:
                self.wfile.write(data[begin:])

        def refuse(self, status: int) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", {404: "EntryNotFound", 401: "GatedRepo"}.get(status, ""))
            self.send_header("Content-Length", "0")
            self.end_headers()

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        found.address = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield found
        finally:
            server.shutdown()
            thread.join()
