"""Guard: who may ask, how much, and how long; it stands before every endpoint."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .bodies import ApiError, busy
from .listening import foreign_origin

__all__ = ["Guard", "Limits", "Turnstile", "read_all", "until_gone"]

_OPEN = ("/health",)  # what a load balancer may ask without a key


@dataclass(frozen=True)
class Limits:
    """What one request, one key and all together may take.

    Attributes:
        body_bytes: Bytes of a body.
        body_seconds: Time that a body may take to arrive.
        send_seconds: Time that a client may take to read what was sent.
        prompt_tokens: Tokens of a prompt; None for as many as the language model takes.
        max_tokens: Tokens of a text.
        budget: LM tokens of a search.
        seconds: Deadline of a search.
        texts: Texts of one request: its prompts times its choices.
        live: Requests of one key that are worked on or wait.
        requests: Requests of all keys together.
    """

    body_bytes: int = 1_000_000
    body_seconds: float = 30.0
    send_seconds: float = 60.0
    prompt_tokens: int | None = None
    max_tokens: int = 1024
    budget: int = 10_000
    seconds: float = 600.0
    texts: int = 256
    live: int = 128
    requests: int = 256


class Turnstile:
    """Counts the requests that are worked on or wait, of each key and in all.

    Attributes:
        is_draining: Whether no more are let in.
        total: Requests that are inside.
        work: What they wait for.
    """

    def __init__(self, limits: Limits) -> None:
        """Let in what the limits allow."""
        self._limits, self._of_key = limits, Counter[str]()
        self.is_draining, self.total = False, 0
        self.work: set[asyncio.Future[None]] = set()

    def drain(self) -> None:
        """Let nobody in any more."""
        self.is_draining = True

    def abort(self) -> None:
        """End the requests that are inside."""
        for work in self.work:
            work.cancel()

    @contextlib.contextmanager
    def inside(self, key: str) -> Iterator[None]:
        """Count a request of a key while the context lasts.

        Raises:
            ApiError: There are as many as the limits allow (429), or the server is shutting down (503).
        """
        if self.is_draining:
            headers = {"Retry-After": "5", "Connection": "close"}
            raise ApiError(503, "the server is shutting down", kind="server_error", headers=headers)
        if self._of_key[key] >= self._limits.live:
            raise busy(f"{self._limits.live} requests of this key are worked on already; ask again later")
        if self.total >= self._limits.requests:
            raise busy(f"{self._limits.requests} requests are worked on already; ask again later")
        self._of_key[key] += 1
        self.total += 1
        try:
            yield
        finally:
            self.total -= 1
            self._of_key[key] -= 1
            if not self._of_key[key]:
                del self._of_key[key]


class Guard:
    """Middleware that refuses foreign hosts, foreign origins, wrong keys and bodies that are no JSON."""

    def __init__(
        self, app: ASGIApp, *, limits: Limits, keys: Sequence[str] = (), hosts: Sequence[str] = ("*",)
    ) -> None:
        """Stand before an application.

        Args:
            app: The application.
            limits: What a request may take.
            keys: API keys; without any, everybody may ask.
            hosts: Names by which the server may be called; ``"*"`` for any.
        """
        self._app, self._limits, self._hosts = app, limits, hosts
        self._keys = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":  # nothing here speaks WebSocket
            return await send({"type": "websocket.close", "code": 1008})
        try:
            scope["qstar_key"] = self._check(scope)
        except ApiError as error:
            return await error.response()(scope, receive, send)

        async def timely(message: Message) -> None:
            try:
                async with asyncio.timeout(self._limits.send_seconds):  # unlike wait_for, it loses no cancellation
                    await send(message)
            except TimeoutError:
                raise OSError("the client reads too slowly") from None

        with contextlib.suppress(OSError):
            await self._app(scope, receive, timely)
        return None

    def _check(self, scope: Scope) -> str:
        """Return a name of the key that a request came with.

        Raises:
            ApiError: It is refused.
        """
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        name = host if host.endswith("]") else host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if "*" not in self._hosts and name not in self._hosts:
            raise ApiError(403, f"this server is not called {name[:100]!r}; see --allowed-host", code="unknown_host")
        if refusal := foreign_origin(headers):
            raise ApiError(403, refusal, code="foreign_origin")
        key = self._key(headers, scope["path"])
        if scope["method"] == "POST":
            kind = headers.get("content-type", "").split(";")[0].strip().lower()
            if kind != "application/json":
                raise ApiError(415, f"send application/json, not {kind[:100] or 'nothing'}", code="wrong_content_type")
            stated = headers.get("content-length", "0")
            if stated.isdecimal() and int(stated[:20]) > self._limits.body_bytes:
                raise _too_large(self._limits)
        return key

    def _key(self, headers: Headers, path: str) -> str:
        if not self._keys or path in _OPEN:
            return ""
        kind, _, given = headers.get("authorization", "").partition(" ")
        # Headers are read as latin-1, whatever they are. Hashes have one length, and all keys are compared, so that the
        # time tells nothing.
        found = hashlib.sha256(given.strip().encode("latin-1")).digest()
        matches = [hmac.compare_digest(found, key) for key in self._keys]
        if kind.lower() != "bearer" or not any(matches):
            message = "a valid API key is needed: Authorization: Bearer KEY"
            raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        return str(matches.index(True))


def _too_large(limits: Limits) -> ApiError:
    """Return the error of a body that is too large."""
    headers = {"Connection": "close"}
    return ApiError(413, f"the body has more than {limits.body_bytes:,} bytes", code="too_large", headers=headers)


async def read_all(receive: Receive, limits: Limits) -> bytes:
    """Return the body of a request.

    Raises:
        ApiError: It is too large (413), too slow (408), or incomplete (400).
    """
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ApiError(400, "the client went away before its body was complete")
                body += message.get("body", b"")
                if len(body) > limits.body_bytes:  # the stated length may be false
                    raise _too_large(limits)
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        late = f"the body took more than {limits.body_seconds:g} seconds"
        raise ApiError(408, late, code="too_slow", headers={"Connection": "close"}) from None


async def until_gone(receive: Receive) -> None:
    """Return when the client has gone away; the body was read before."""
    while (await receive())["type"] != "http.disconnect":
        pass
