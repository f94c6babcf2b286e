"""Server of the page: begins and stops runs, reports their events, and returns trees; on loopback by default."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from fastapi import Depends, FastAPI, Header, HTTPException
from fastapi import Request as HttpRequest
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from pydantic import ValidationError
from starlette.middleware.trustedhost import TrustedHostMiddleware

from ..agents.search.snapshot import SearchTree
from ..checks import describe_invalid
from ..errors import QStarError
from ..serve.listening import LOOPBACK, foreign_origin, listening
from .runs import LIMITS, Request, Run, Runs, examples

__all__ = ["create_app", "serve"]

_BODY = 4_000_000  # bytes of a request; the prompt's own limit is far lower, and says so
# Everything on the page comes from this server, and nothing may be asked of any other.
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def create_app(hosts: Sequence[str] = LOOPBACK) -> FastAPI:
    """Return the application; each has runs of its own.

    Args:
        hosts: Names by which it may be called; ``["*"]`` allows any. A page of another site whose name was made to
            point to this machine is refused (DNS rebinding).
    """
    app, runs = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, dependencies=[Depends(_check_origin)]), Runs()
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))

    def known(number: int) -> Run:
        try:
            return runs[number]
        except KeyError:
            raise HTTPException(404, f"there is no run {number}; it may have been forgotten") from None

    def grown(number: int) -> SearchTree:
        tree = known(number).tree
        if tree is None:
            raise HTTPException(404, f"run {number} has no tree yet")
        return tree

    async def page() -> HTMLResponse:
        html = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
        return HTMLResponse(html, headers={"Content-Security-Policy": _POLICY})

    async def begin(request: HttpRequest) -> JSONResponse:
        body = bytearray()
        async for chunk in request.stream():  # the stated length may be false
            body += chunk
            if len(body) > _BODY:
                message = f"that is more than {_BODY:,} bytes; a prompt has at most {LIMITS['prompt']:,} characters"
                return JSONResponse({"message": message}, 413, headers={"Connection": "close"})
        try:
            asked = Request.model_validate_json(bytes(body))
            run = await run_in_threadpool(runs.begin, asked)
        except ValidationError as error:
            return JSONResponse({"message": describe_invalid(error)}, 422)
        except QStarError as error:
            return JSONResponse({"message": str(error)}, 422)
        return JSONResponse({"run": run.number, "prompt": run.prompt.text})

    async def events(number: int, last_event_id: Annotated[int, Header()] = -1) -> StreamingResponse:
        run = known(number)

        async def lines() -> AsyncIterator[str]:
            index = last_event_id + 1  # a browser that lost the connection has the earlier ones
            async for event in run.listen(index):
                if event is None:
                    yield ": still here\n\n"
                    continue
                yield f"id: {index}\ndata: {json.dumps(event)}\n\n"
                index += 1

        return StreamingResponse(lines(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    async def stop(number: int) -> dict[str, Any]:
        known(number).stop()
        return {}

    def node(number: int, node: int) -> dict[str, Any]:
        tree = grown(number)
        if not 0 <= node <= tree.child.max(initial=0):
            raise HTTPException(404, f"run {number} has no node {node}")
        return {"tokens": [tree.token_text[edge] for edge in tree.path(node)], "candidates": tree.candidates(node)}

    def export(number: int) -> Response:
        headers = {"Content-Disposition": f'attachment; filename="search-{number}.html"'}
        return HTMLResponse(grown(number).to_html(facts=known(number).facts), headers=headers)

    app.add_api_route("/", page, methods=["GET"], include_in_schema=False, response_model=None)
    app.add_api_route("/api/options", _options, methods=["GET"], response_model=None)
    app.add_api_route("/api/runs", begin, methods=["POST"], response_model=None)
    app.add_api_route("/api/runs/{number}/events", events, methods=["GET"], response_model=None)
    app.add_api_route("/api/runs/{number}/stop", stop, methods=["POST"], response_model=None)
    app.add_api_route("/api/runs/{number}/nodes/{node}", node, methods=["GET"], response_model=None)
    app.add_api_route("/api/runs/{number}/export", export, methods=["GET"], response_model=None)
    return app


def _check_origin(request: HttpRequest) -> None:
    """Refuse requests that change something and that a page of another site could send.

    Older browsers may not name the sending page's site, but none lets another site send JSON without asking this server
    first.
    """
    if request.method in ("GET", "HEAD", "OPTIONS"):
        return
    if refusal := foreign_origin(request.headers):
        raise HTTPException(403, f"{refusal}; use the page of this server")
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "send application/json")


def serve(host: str = "127.0.0.1", port: int = 8321) -> None:
    """Serve the page until interrupted.

    Raises:
        ConfigurationError: The port is taken, or the address is not one of this machine.
    """
    app = create_app(LOOPBACK if host in LOOPBACK else ["*"])
    with listening(host, port) as (listener, address):
        print(f"open {address} (Ctrl-C ends it)", flush=True)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
        server.run(sockets=[listener])


def _options() -> dict[str, Any]:
    """Return what the page offers."""
    from ..agents import pretrained_names
    from ..agents.planning.registry import DECODERS, by_command
    from ..rewards import registry, reward_names
    from ..tasks import load_task, task_names

    tasks: list[dict[str, Any]] = []
    for name in task_names():
        try:
            task = load_task(name)
        except QStarError:
            continue  # a library that its prompts come from is not installed
        shown = ("reward", "top_k", "max_new_tokens", "logprob_weight")
        env: dict[str, Any] = {key: task.env[key] for key in shown if key in task.env}
        texts = list(examples(name))[:20]
        shipped = name in pretrained_names()
        tasks.append({"name": name, "description": task.description, "examples": texts, "shipped_q": shipped, **env})
    rewards = [name for name in reward_names() if name not in registry.WITH_ARGUMENTS]
    guided = [name for name in DECODERS if by_command(name).uses == "q"]
    return {"tasks": tasks, "rewards": rewards, "limits": LIMITS, "decoders": [*DECODERS], "guided": guided}
