"""A hub on this machine, which speaks as much of the protocol of huggingface_hub as an upload needs."""

import base64
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_secret0123456789"


class Hub:
    """What the hub has and was told: `repositories` is name -> whether it is private, `files` what was committed.

    `fails` is a path and the answer to whoever asks for one that begins so.
    """

    def __init__(self):
        self.repositories, self.files, self.large, self.requests = {}, {}, {}, []
        self.fails = ("nothing", 0, "")
        self.endpoint = ""

    def answer(self, method, path, token, body):
        """Return status and JSON of the answer to a request."""
        beginning, status, text = self.fails
        if path.startswith(beginning):
            return status, {"error": text}
        if path.startswith("/upload/"):  # on a hub this is another machine, which is sent no token
            self.large[path.rpartition("/")[2]] = body
            return 200, {}
        if token != TOKEN:
            return 401, {"error": f"Invalid token {token}"}
        if path == "/api/whoami-v2":
            return 200, {"type": "user", "name": "me", "orgs": [{"name": "team"}], "auth": {"type": "access_token"}}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if name in self.repositories:
                return 409, {"error": "You already created this model repo", "url": f"{self.endpoint}/{name}"}
            self.repositories[name] = asked.get("visibility") == "private" or asked.get("private", False)
            return 200, {"url": f"{self.endpoint}/{name}"}
        name = "/".join(path.removeprefix("/api/models/").strip("/").split("/")[:2]).removesuffix(".git")
        if name not in self.repositories:
            return 404, {"error": "Repository not found"}
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            mode = {file["path"]: "lfs" if file["path"].endswith(".safetensors") else "regular" for file in files}
            return 200, {"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in mode.items()]}
        if path.endswith("/info/lfs/objects/batch"):
            asked = json.loads(body)["objects"]
            return 200, {
                "transfer": "basic",
                "objects": [
                    one | {"actions": {"upload": {"href": f"{self.endpoint}/upload/{one['oid']}"}}} for one in asked
                ],
            }
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.files[value["path"]] = self.large[value["oid"]]
            return 200, {"commitUrl": f"{self.endpoint}/{name}/commit/1", "commitOid": "1" * 40}
        return 200, {"id": name, "private": self.repositories[name], "sha": "0" * 40, "siblings": []}


@contextmanager
def running():
    """Give a hub that answers at its `endpoint` within this context."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do(self):
            path = self.path.partition("?")[0]
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            hub.requests.append((self.command, path, token))
            status, content = hub.answer(self.command, path, token, body)
            data = json.dumps(content).encode()
            self.send_response(status)
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_HEAD = do

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
