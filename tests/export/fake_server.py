"""An OpenAI-compatible server over a tiny model, with a switch for every fault that `verify` names."""

import json
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import torch


@dataclass
class Server:
    """What is served, and how; `requests` are those that came, `headers` theirs."""

    model: Any
    tokenizer: Any
    chat_template: str | None
    stop_ids: list[int]
    temperature: float = 0.0  # whatever a request asks for
    logprobs: bool = True
    completions: bool = True
    chat: bool = True
    ids: bool = True
    bos_twice: bool = False
    echo: bool = False
    stop_word: str = ""
    refuses: tuple[str, ...] = ()  # keys of a request
    key: str = ""
    names: tuple[str, ...] = ("served",)
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Return status and content of the response to a request."""
        self.requests.append({"path": path} | body)
        if path == "/v1/models":
            return 200, {"object": "list", "data": [{"id": name, "object": "model"} for name in self.names]}
        chat = path == "/v1/chat/completions"
        if not (self.chat if chat else self.completions and path == "/v1/completions"):
            return 404, {"detail": "Not Found"}
        if unknown := [key for key in self.refuses if key in body]:
            return 422, {"detail": f"Unexpected fields in the request: {unknown}"}
        if chat:
            prompt = self.tokenizer.apply_chat_template(
                body["messages"], chat_template=self.chat_template, add_generation_prompt=True, return_dict=False
            )
        elif isinstance(body["prompt"], str):
            prompt = self.tokenizer(body["prompt"])["input_ids"]
            prompt = [prompt[0], *prompt] if self.bos_twice else prompt
        elif self.ids:
            prompt = body["prompt"]
        else:
            return 400, {"error": {"message": "prompt must be a string."}}
        return 200, self.generate(prompt, body, chat)

    @torch.inference_mode()
    def generate(self, prompt: list[int], body: dict[str, Any], chat: bool) -> dict[str, Any]:
        ids: list[int] = []
        tokens: list[tuple[str, float, list[tuple[str, float]]]] = []
        finish, cache, fed = "length", None, prompt
        draw = torch.Generator().manual_seed(body.get("seed", 0))
        while len(ids) < body["max_tokens"]:
            output = self.model(input_ids=torch.tensor([fed]), past_key_values=cache, use_cache=True)
            cache, logits = output.past_key_values, output.logits[0, -1].float()
            likely = (logits / self.temperature).softmax(-1) if self.temperature else None
            token = int(logits.argmax() if likely is None else torch.multinomial(likely, 1, generator=draw))
            ids.append(token)
            values, top = logits.log_softmax(-1).topk(5)
            likeliest = [
                (self.tokenizer.decode([one]), value) for one, value in zip(top.tolist(), values.tolist(), strict=True)
            ]
            tokens.append((self.tokenizer.decode([token]), float(logits.log_softmax(-1)[token]), likeliest))
            if token in self.stop_ids or (self.stop_word and self.stop_word in self.tokenizer.decode(ids)):
                finish = "stop"
                break
            fed = [token]
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        text = text.partition(self.stop_word)[0] if self.stop_word else text
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish}
        if chat:
            choice["message"] = {"role": "assistant", "content": text}
        else:
            choice["text"] = body["prompt"] + text if self.echo else text
        if self.logprobs and body.get("logprobs"):
            content = [
                {"token": token, "logprob": value, "top_logprobs": [{"token": a, "logprob": b} for a, b in top]}
                for token, value, top in tokens
            ]
            old = {
                "tokens": [token for token, _, _ in tokens],
                "token_logprobs": [value for _, value, _ in tokens],
                "top_logprobs": [dict(top) for _, _, top in tokens],
            }
            choice["logprobs"] = {"content": content} if chat else old
        return {
            "choices": [choice],
            "usage": {"prompt_tokens": len(prompt), "completion_tokens": len(ids)},
        }


@contextmanager
def running(server: Server):
    """Yield the address of a server that listens on a free port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        def respond(self, body: dict[str, Any]) -> None:
            server.headers.append({name.lower(): value for name, value in self.headers.items()})
            if server.key and self.headers.get("Authorization") != f"Bearer {server.key}":
                status, content = 401, {"error": {"message": "no such key"}}
            else:
                status, content = server.answer(self.path, body)
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            self.respond({})

        def do_POST(self) -> None:
            self.respond(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def log_message(self, *words: object) -> None:
            pass

    listening = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.server_port}"
    finally:
        listening.shutdown()
        listening.server_close()
        thread.join()
