"""Application: the endpoints of OpenAI's interface, each request from its body to the last byte of its answer."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from .. import __version__
from ..agents.learning.online.learner import OnlineLearner
from ..agents.planning.engine import SearchEngine
from .bodies import ApiError, Body, ChatBody, CompletionBody, as_api_error, read_body
from .catalogue import Catalogue, Entry
from .generation import Begun, Event, Usage
from .guard import Guard, Limits, Turnstile, read_all, until_gone
from .sampling import Sampler
from .task import Task, Tools, merged

__all__ = ["Service", "create_app"]


class Service:
    """All that requests share.

    Attributes:
        tools: What requests work with.
        turnstile: Counts the requests.
        metrics: Counts for Prometheus.
    """

    def __init__(
        self, engine: SearchEngine, limits: Limits, q: Mapping[str, str], learner: OnlineLearner | None
    ) -> None:
        """Serve what an engine has; see :func:`create_app`."""
        sampler = Sampler(engine.mdp.model, engine.mdp.tree.engine)
        catalogue = Catalogue(engine, q=q, learner=learner, budget=limits.budget, seconds=limits.seconds)
        self.tools = Tools(engine, sampler, catalogue, limits)
        self.turnstile = Turnstile(limits)
        self.metrics = Metrics(self.tools, self.turnstile)

    def close(self) -> None:
        """End all work and the threads that do it."""
        self.tools.sampler.close()
        self.tools.engine.close(cancel=True)


class Metrics:
    """Counts for Prometheus."""

    def __init__(self, tools: Tools, turnstile: Turnstile) -> None:
        """Begin at zero."""
        self.registry = registry = CollectorRegistry()
        engine, sampler = tools.engine, tools.sampler
        self.requests = Counter(
            "qstar_requests", "Requests by endpoint and status.", ["endpoint", "status"], registry=registry
        )
        self.tokens = Counter(
            "qstar_tokens", "Tokens of prompts, of texts, and of searches.", ["kind"], registry=registry
        )
        self.seconds = Histogram(
            "qstar_request_seconds", "Time from a request to the end of its answer.", registry=registry
        )
        for name, text, value in (
            ("qstar_requests_inside", "Requests that are worked on or wait.", lambda: turnstile.total),
            ("qstar_searches_live", "Searches that run.", lambda: engine.live),
            ("qstar_searches_waiting", "Searches that wait.", lambda: engine.waiting),
            ("qstar_texts_live", "Texts that are drawn.", lambda: sampler.live),
            ("qstar_texts_waiting", "Texts that wait to be drawn.", lambda: sampler.waiting),
            ("qstar_kv_bytes", "Key-value memory.", lambda: engine.mdp.tree.kv_bytes),
        ):
            Gauge(name, text, registry=registry).set_function(value)
        if (learner := tools.catalogue.learner) is not None:
            Gauge("qstar_q_version", "Version of the Q that learns.", registry=registry).set_function(
                lambda: learner.version
            )
            uses = Gauge(
                "qstar_heuristic_searches", "Searches that a heuristic ordered.", ["heuristic"], registry=registry
            )
            for name in ("bound", "given", "learned"):
                uses.labels(name).set_function(functools.partial(learner.searches, name))

    def finish(self, endpoint: str, status: int | str, usage: Usage | None, started: float) -> None:
        """Count a request that is over; a client that went away has the status ``"gone"``."""
        self.requests.labels(endpoint, str(status)).inc()
        self.seconds.observe(time.perf_counter() - started)
        if usage is not None:
            self.tokens.labels("prompt").inc(usage.prompt)
            self.tokens.labels("completion").inc(usage.completion)
            self.tokens.labels("search").inc((usage.search or {}).get("lm_tokens", 0))


class Reply(Response):
    """The answer to one request; it is worked out while it is sent, and given up when the client goes away."""

    def __init__(self, service: Service, kind: type[Body], endpoint: str) -> None:
        """Prepare to answer a body of a kind."""
        self._service, self._kind, self._endpoint = service, kind, endpoint
        self._usage: Usage | None = None
        self._status, self._is_gone = 0, False
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the body, work and answer."""
        started, self._id = time.perf_counter(), f"req_{secrets.token_hex(12)}"
        try:
            with self._service.turnstile.inside(scope.get("qstar_key", "")):
                body = read_body(self._kind, await read_all(receive, self._service.tools.limits))
                await self._answer(body, receive, send)
        except Exception as error:
            await self._fail(as_api_error(error), scope, receive, send)
        finally:
            status = "gone" if self._is_gone else self._status
            self._service.metrics.finish(self._endpoint, status, self._usage, started)

    async def _fail(self, failure: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
        """Tell an error: as a response, or as the last event of a stream that has begun."""
        with contextlib.suppress(OSError):
            if self._status:
                line = f"data: {json.dumps(failure.body)}\n\n".encode()
                await send({"type": "http.response.body", "body": line, "more_body": False})
            else:
                self._status = failure.status
                response = failure.response()
                response.headers["x-request-id"] = self._id
                await response(scope, receive, send)

    async def _answer(self, body: Body, receive: Receive, send: Send) -> None:
        all_work = self._service.turnstile.work
        gone = asyncio.ensure_future(until_gone(receive))
        work = asyncio.ensure_future(self._work(body, send, gone.done))
        all_work.add(work)
        try:
            await asyncio.wait({gone, work}, return_when=asyncio.FIRST_COMPLETED)
            self._is_gone = not work.done()
        finally:
            gone.cancel()
            work.cancel()
            await asyncio.gather(gone, work, return_exceptions=True)
            all_work.discard(work)
        if work.cancelled() and not self._is_gone:
            raise ApiError(503, "the server has shut down", kind="server_error")
        if not self._is_gone:
            work.result()

    async def _work(self, body: Body, send: Send, is_gone: Callable[[], bool]) -> None:
        service = self._service
        task = await run_in_threadpool(Task, service.tools, body, is_gone)
        self._usage = task.answer.usage
        async with contextlib.aclosing(merged(task.streams())) as events:
            if body.stream:
                await self._stream(task, events, send)
                return
            async for event in events:
                if event is not None:
                    task.answer.take(event)
            answer = JSONResponse(task.answer.whole(logprobs=task.top is not None), headers={"x-request-id": self._id})
            self._status = 200
            await answer({"type": "http"}, _nothing, send)

    async def _stream(self, task: Task, events: AsyncGenerator[Event | None], send: Send) -> None:
        answer, waiting = task.answer, len(task.prompts)
        with_logprobs = task.top is not None

        async def say(line: str, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": f"{line}\n\n".encode(), "more_body": more})

        async def tell(chunk: dict[str, Any]) -> None:
            await say(f"data: {json.dumps(chunk, allow_nan=False, ensure_ascii=False)}")

        early: list[Event] = []
        async for event in events:
            if event is None:
                if self._status:
                    await say(": still here")
                continue
            waiting -= isinstance(event, Begun)
            early.append(event)
            if waiting:  # an error of the others still has a status of its own
                continue
            if not self._status:
                await self._open(send)
            for chunk in (chunk for one in early for chunk in answer.chunks(one, logprobs=with_logprobs)):
                await tell(chunk)
            early.clear()
        for chunk in answer.closing():
            await tell(chunk)
        await say("data: [DONE]", more=False)

    async def _open(self, send: Send) -> None:
        self._status = 200
        headers = {
            "content-type": "text/event-stream; charset=utf-8",
            "cache-control": "no-store",
            "x-accel-buffering": "no",  # proxies pass events on at once
            "x-request-id": self._id,
        }
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": raw})


def create_app(
    engine: SearchEngine,
    *,
    limits: Limits | None = None,
    keys: Sequence[str] = (),
    hosts: Sequence[str] = ("*",),
    q: Mapping[str, str] | None = None,
    learner: OnlineLearner | None = None,
) -> FastAPI:
    """Return the application; its ``state.service`` is the :class:`Service`.

    Args:
        engine: Runs the searches; its process has the settings of requests that name none.
        limits: What a request may take.
        keys: API keys; without any, everybody may ask.
        hosts: Names by which the server may be called; ``"*"`` for any. A page of another site whose name was made to
            point to this machine is refused (DNS rebinding).
        q: Q-functions of the operator's, by name.
        learner: Learns from the searches of the model ``qstar-learned``; its environment has the language model, the
            reward and the settings of the engine's own process.

    Raises:
        QStarError: A Q-function cannot be loaded, or belongs to another language model.
    """
    limits = limits or Limits()
    service = Service(engine, limits, q or {}, learner)
    app = FastAPI(title="qstar-decoding", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.service = service
    app.add_middleware(Guard, limits=limits, keys=keys, hosts=hosts)

    async def chat(request: HttpRequest) -> Response:
        return Reply(service, ChatBody, "chat")

    async def completions(request: HttpRequest) -> Response:
        return Reply(service, CompletionBody, "completions")

    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_shown(service, entry) for entry in service.tools.catalogue.entries]}

    async def model(name: str) -> dict[str, Any]:
        return _shown(service, service.tools.catalogue.find(name))

    async def health() -> Response:
        draining = service.turnstile.is_draining
        return JSONResponse({"status": "draining" if draining else "ok"}, 503 if draining else 200)

    async def metrics() -> Response:
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def failed(request: HttpRequest, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            message = f"{request.method} {request.url.path[:200]}: {error.detail}"
            error = ApiError(error.status_code, message, headers=dict(error.headers or {}))
        return as_api_error(error).response()

    for kind in (ApiError, HTTPException, Exception):
        app.add_exception_handler(kind, failed)
    app.add_api_route("/v1/chat/completions", chat, methods=["POST"], response_model=None)
    app.add_api_route("/v1/completions", completions, methods=["POST"], response_model=None)
    app.add_api_route("/v1/models", models, methods=["GET"], response_model=None)
    app.add_api_route("/v1/models/{name:path}", model, methods=["GET"], response_model=None)
    app.add_api_route("/health", health, methods=["GET"], response_model=None)
    app.add_api_route("/metrics", metrics, methods=["GET"], response_model=None)
    return app


def _shown(service: Service, entry: Entry) -> dict[str, Any]:
    shown = {
        "id": entry.id,
        "object": "model",
        "created": service.tools.catalogue.created,
        "owned_by": "qstar-decoding",
    }
    return {**shown, "description": entry.description}


async def _nothing() -> dict[str, Any]:
    return {"type": "http.disconnect"}
