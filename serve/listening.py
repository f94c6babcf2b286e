"""Listening: an address of this machine, the server that ends in order, and which pages of other sites are refused."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any, Protocol
from urllib.parse import urlsplit

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..errors import ConfigurationError

__all__ = ["LOOPBACK", "DrainingServer", "PatientProtocol", "foreign_origin", "listening", "serve"]

_ABORTING = 2.0  # seconds that requests are given to tell their clients that they were ended
LOOPBACK = ("127.0.0.1", "localhost", "::1", "[::1]")


def foreign_origin(headers: Mapping[str, str]) -> str:
    """Return why a request is refused that a page of another site may have sent; empty if it is not.

    Browsers name the sending page's site in ``Origin`` and ``Sec-Fetch-Site``. Other programs send neither.
    """
    origin = headers.get("origin")
    if origin is not None and _site(origin) != headers.get("host"):
        return f"requests from pages of {origin[:100]} are refused"
    if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        return "requests from pages of other sites are refused"
    return ""


def _site(origin: str) -> str:
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[tuple[socket.socket, str]]:
    """Listen at an address while the context lasts; yield the socket and the address as a URL.

    Requests wait from then on, so the address can be printed before the server runs.

    Raises:
        ConfigurationError: The port is taken, or the address is not one of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen(1024)
        except OSError as error:
            raise ConfigurationError(
                f"cannot listen at {host}:{port}: {error.strerror}; give another --port, or 0 for any that is free"
            ) from error
        yield listener, f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"


class Requests(Protocol):
    """The requests of an application, as the server that ends sees them."""

    total: int

    def drain(self) -> None:
        """Refuse new ones."""

    def abort(self) -> None:
        """End those that are left."""


class DrainingServer(uvicorn.Server):
    """A server that finishes what it has begun when it is told to end.

    The first SIGTERM or Ctrl-C begins to drain: new requests are refused, and the process ends when none is left. After
    ``drain_seconds`` those that are left are ended. The exit status is 0. The second signal ends it at once.
    """

    def __init__(self, config: uvicorn.Config, requests: Requests, drain_seconds: float) -> None:
        """Make a server of an application whose requests are given."""
        super().__init__(config)
        self._requests, self._drain_seconds = requests, drain_seconds
        self._deadline: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain, or end at once where that was begun before."""
        if self._deadline is not None:
            self.should_exit = self.force_exit = True
            return
        self._deadline = time.monotonic() + self._drain_seconds
        self._requests.drain()

    async def on_tick(self, counter: int) -> bool:
        """Return whether the server ends now; asked ten times a second."""
        if self._deadline is not None:
            late = time.monotonic() - self._deadline
            if late > 0:
                self._requests.abort()
            if not self._requests.total or late > _ABORTING:
                return True
        return await super().on_tick(counter)


class PatientProtocol(H11Protocol):
    """HTTP that closes connections on which no request comes to its end of headers, so that half-open ones go away."""

    silence_seconds = 20.0
    most_connections = 2048
    _seen: Any = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for requests, or close at once where there are too many connections."""
        super().connection_made(transport)
        if len(self.connections) > self.most_connections:
            transport.abort()
        else:
            self.loop.call_later(self.silence_seconds, self._close_if_silent)

    def _close_if_silent(self) -> None:
        request: Any = self.cycle
        if self.transport.is_closing():
            return
        if (request is None or request.response_complete) and request is self._seen:
            self.transport.close()
            return
        self._seen = request
        self.loop.call_later(self.silence_seconds, self._close_if_silent)


def serve(app: Any, host: str, port: int, requests: Requests, drain_seconds: float) -> None:
    """Serve an application until it is told to end; see :class:`DrainingServer`.

    Raises:
        ConfigurationError: The port is taken, or the address is not one of this machine.
    """
    with listening(host, port) as (listener, address):
        print(f"serving {address}/v1 (Ctrl-C ends it)", flush=True)
        config = uvicorn.Config(
            app, http=PatientProtocol, log_level="warning", access_log=False, server_header=False,
            timeout_keep_alive=30, timeout_graceful_shutdown=1,
        )  # fmt: skip
        DrainingServer(config, requests, drain_seconds).run(sockets=[listener])
