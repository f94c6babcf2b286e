"""A server of completions for tests: a language model over HTTP, in several dialects, that misbehaves on request."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

from qstar_decoding.models import LanguageModel


class FakeServer:
    """Serves a model on loopback; every attribute may be changed while it runs.

    Attributes:
        faults: What goes wrong with the next completion requests, one each; None for nothing.
        change: Changes an answer before it is sent.
        prompts: The prompts that were answered.
        most_at_once: Largest number of requests that were at work at the same time.
    """

    def __init__(self, model: LanguageModel, *, dialect: str = "llama.cpp", limit: int | None = None) -> None:
        self.model, self.dialect, self.limit = model, dialect, limit
        self.faults: list[str | None] = []
        self.change: Callable[[dict[str, Any]], None] = lambda answer: None
        self.models: list[dict[str, Any]] = [{"id": "served", "meta": {"n_vocab": model.vocab_size}}]
        self.key: str | None = None
        self.seconds = 0.0
        self.dies_after: int | None = None
        self.prompts: list[Any] = []
        self.bodies: list[dict[str, Any]] = []
        self.most_at_once = self.at_once = 0
        self.lock = threading.Lock()
        self._server: ThreadingHTTPServer | None = None
        self.port = 0

    def start(self) -> None:
        """Listen, at the same port as before after a stop."""
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                owner.answer(self, 200, {"object": "list", "data": owner.models})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with owner.lock:
                    owner.at_once += 1
                    owner.most_at_once = max(owner.most_at_once, owner.at_once)
                try:
                    time.sleep(owner.seconds)
                    owner.post(self, body)
                finally:
                    with owner.lock:
                        owner.at_once -= 1

        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def stop(self) -> None:
        """Refuse connections from now on."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def answer(self, handler: BaseHTTPRequestHandler, status: int, value: Any, **headers: str) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        handler.send_response(status)
        handler.send_header("Content-Length", headers.pop("length", str(len(data))))
        for name, content in headers.items():
            handler.send_header(name.replace("_", "-"), content)
        handler.end_headers()
        handler.wfile.write(data)

    def post(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        with self.lock:
            fault = self.faults.pop(0) if self.faults else None
            if self.dies_after is not None:
                self.dies_after -= 1
                fault = "dead" if self.dies_after < 0 else fault
        given = (handler.headers.get("Authorization") or "").removeprefix("Bearer ")
        if self.key is not None and given != self.key:
            self.answer(handler, 401, {"error": {"message": f"wrong key {given}"}})
        elif fault is None:
            self._complete(handler, body)
        elif fault == "dead":
            handler.close_connection = True
            handler.connection.close()
        elif fault == "slow":
            time.sleep(1.0)
            self._complete(handler, body)
        elif fault == "truncated":
            handler.close_connection = True
            self.answer(handler, 200, b'{"choices": [', length="1000")
        elif fault == "no JSON":
            self.answer(handler, 200, b"<html>nginx</html>")
        elif fault == "302":
            self.answer(handler, 302, {}, Location="http://127.0.0.2:1/elsewhere")
        elif fault.isdigit():
            self.answer(handler, int(fault), {"error": {"message": f"fault {fault}"}}, Retry_After="0")
        else:
            self.answer(handler, 200, json.loads(fault))

    def _complete(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        if self.limit is not None and body["logprobs"] > self.limit:
            self.answer(handler, 400, {"error": {"message": f"at most {self.limit} logprobs"}})
            return
        if self.dialect == "strict" and set(body) - {
            "model",
            "prompt",
            "max_tokens",
            "logprobs",
            "temperature",
            "top_p",
        }:
            self.answer(handler, 400, {"error": {"message": "unknown parameter"}})
            return
        prompt = body["prompt"]
        ids = self.model.encode(prompt) if isinstance(prompt, str) else list(prompt)
        rows, written, prompt_tokens = [], [], len(ids)
        for _ in range(body["max_tokens"]):
            logprobs = self.model.forward([ids])[1][0]
            ranked = np.argsort(-logprobs, kind="stable")[: body["logprobs"]]
            rows.append([(int(token), float(logprobs[token])) for token in ranked])
            token = int(ranked[0])
            written.append(token)
            ids.append(token)
            if token in self.model.eos_token_ids:
                break
        text = self.model.decode_continuation(written)
        answer = {
            "choices": [{"text": text, "logprobs": self._write(rows, written)}],
            "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": len(written)},
        }
        self.change(answer)
        with self.lock:
            self.prompts.append(tuple(prompt))
            self.bodies.append(body)
        self.answer(handler, 200, answer)

    def _write(self, rows: list[list[tuple[int, float]]], written: list[int]) -> dict[str, Any]:
        def finite(logprob: float) -> float:  # JSON knows no infinity
            return max(logprob, float(np.finfo(np.float32).min))

        if self.dialect == "llama.cpp":
            return {
                "content": [
                    {
                        "id": token,
                        "token": self.model.decode([token]),
                        "top_logprobs": [
                            {"id": t, "token": self.model.decode([t]), "logprob": finite(p)} for t, p in row
                        ],
                    }
                    for token, row in zip(written, rows, strict=True)
                ]
            }
        name: Callable[[int], str] = (
            (lambda token: f"token_id:{token}")
            if self.dialect == "vllm"
            else lambda token: self.model.decode_continuation([token])
        )
        return {
            "tokens": [name(token) for token in written],
            "top_logprobs": [{name(t): finite(p) for t, p in row} for row in rows],
        }


@contextlib.contextmanager
def serving(model: LanguageModel, **options: Any) -> Iterator[FakeServer]:
    """Serve a model while the context lasts."""
    server = FakeServer(model, **options)
    server.start()
    try:
        yield server
    finally:
        server.stop()
