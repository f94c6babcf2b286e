"""Servers that really listen, and raw connections to them."""

import contextlib
import json
import socket
import threading
import time
from dataclasses import dataclass
from typing import Any

import uvicorn

from qstar_decoding.serve.app import create_app
from qstar_decoding.serve.listening import PatientProtocol, listening

BODY = {"model": "tiny", "prompt": "ab", "max_tokens": 4, "seed": 0}


@dataclass
class Live:
    """A server that listens on loopback.

    Attributes:
        url: Its address, without a path.
        port: Its port.
        service: What its requests share.
    """

    url: str
    port: int
    service: Any

    @property
    def engine(self):
        return self.service.tools.engine

    def settled(self):
        """Wait until nothing is worked on any more; return the LM's work that is left."""
        for _ in range(3000):
            tools = self.service.tools
            left = self.service.turnstile.total, tools.engine.live + tools.engine.waiting, tools.sampler.live
            if left == (0, 0, 0):
                return left
            time.sleep(0.01)
        return left

    def send(self, raw, seconds=20.0):
        """Send bytes as they are; return the whole answer, empty where the connection was just closed."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=seconds) as connection:
            with contextlib.suppress(ConnectionError):
                connection.sendall(raw)
            return receive_all(connection)

    def post(self, body, path="/v1/completions", headers=()):
        """Post a body, as JSON unless it is bytes; return the status and the answer's content."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        return parsed(self.send(request(raw, self.port, path, headers)))


def request(raw, port, path="/v1/completions", headers=()):
    """Return the bytes of a request; ``headers`` replace those that it has by default, None leaves one out."""
    given = {
        "Host": f"127.0.0.1:{port}",
        "Content-Type": "application/json",
        "Content-Length": str(len(raw)),
        "Connection": "close",
        **dict(headers),
    }
    lines = [f"{name}: {value}" for name, value in given.items() if value is not None]
    return "\r\n".join([f"POST {path} HTTP/1.1", *lines, "", ""]).encode() + raw


def receive_all(connection):
    parts = []
    with contextlib.suppress(ConnectionError, TimeoutError):
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


def parsed(answer):
    """Return the status and the content of an answer, as JSON where it is; 0 where there is none."""
    if not answer:
        return 0, b""
    head, _, content = answer.partition(b"\r\n\r\n")
    if b"transfer-encoding: chunked" in head.lower():
        pieces, rest = [], content
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            pieces.append(rest[: int(size, 16)])
            rest = rest[int(size, 16) + 2 :]
        content = b"".join(pieces)
    status = int(head.split()[1])
    return status, json.loads(content) if b"application/json" in head.lower() else content


@contextlib.contextmanager
def live(engine, *, silence_seconds=20.0, **options):
    """Serve an engine on loopback while the context lasts; see ``create_app`` for the options."""
    protocol = type("Protocol", (PatientProtocol,), {"silence_seconds": silence_seconds})
    app = create_app(engine, **options)
    service = app.state.service
    with listening("127.0.0.1", 0) as (listener, url):
        config = uvicorn.Config(
            app,
            http=protocol,
            log_level="critical",
            access_log=False,
            timeout_keep_alive=5,
            timeout_graceful_shutdown=1,
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            yield Live(url, listener.getsockname()[1], service)
            assert thread.is_alive()  # whatever was done to it
        finally:
            server.should_exit = True
            thread.join(20)
