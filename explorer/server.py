"""The page's server: begins runs, tells their events, hands out trees; loopback unless told otherwise."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi import Request as HttpRequest
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from pydantic import ValidationError

from ..errors import ConfigurationError, QStarError
from .runs import LIMITS, Request, Run, Runs, examples

__all__ = ["create_app", "serve"]

_BODY = 1_000_000  # bytes of a request; the prompt's own limit is far lower, and says so
# Everything on the page comes from this server, and nothing may be asked of any other.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"


def create_app() -> FastAPI:
    """Return the application; each has runs of its own."""
    app, runs = FastAPI(title="qstar explore", docs_url=None, redoc_url=None, openapi_url=None), Runs()

    def known(number: int) -> Run:
        try:
            return runs[number]
        except KeyError:
            raise HTTPException(404, f"there is no run {number}; it may have been forgotten") from None

    def page() -> HTMLResponse:
        html = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
        return HTMLResponse(html, headers={"Content-Security-Policy": _POLICY})

    async def begin(request: HttpRequest) -> JSONResponse:
        if int(request.headers.get("content-length") or 0) > _BODY:
            message = f"that is more than a megabyte; a prompt has at most {LIMITS['prompt']:,} characters"
            return JSONResponse({"message": message}, 413)
        if request.headers.get("content-type", "").split(";")[0] != "application/json":
            # A form of another site could send text/plain to this address without asking; it cannot send this.
            return JSONResponse({"message": "send application/json"}, 415)
        try:
            asked = Request.model_validate_json(await request.body())
            run = await run_in_threadpool(runs.begin, asked)
        except ValidationError as error:
            first = error.errors()[0]
            return JSONResponse({"message": f"{'.'.join(map(str, first['loc']))}: {first['msg']}"}, 422)
        except QStarError as error:
            return JSONResponse({"message": str(error)}, 422)
        return JSONResponse({"run": run.number, "prompt": run.prompt.text})

    def events(number: int) -> StreamingResponse:
        run = known(number)

        def lines() -> Iterator[str]:
            for event in run.listen():
                yield ": still here\n\n" if event is None else f"data: {json.dumps(event)}\n\n"

        return StreamingResponse(lines(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    def stop(number: int) -> dict[str, Any]:
        known(number).stop()
        return {}

    def tree(number: int) -> Response:
        plan = known(number).plan
        if plan is None or plan.tree is None:
            raise HTTPException(404, f"run {number} has no tree yet")
        return Response(plan.tree.to_json(), media_type="application/json")

    def export(number: int) -> Response:
        plan = known(number).plan
        if plan is None or plan.tree is None:
            raise HTTPException(404, f"run {number} has no tree yet")
        headers = {"Content-Disposition": f'attachment; filename="search-{number}.html"'}
        return Response(plan.tree.to_html(), media_type="text/html", headers=headers)

    app.add_api_route("/", page, methods=["GET"], include_in_schema=False, response_model=None)
    app.add_api_route("/api/options", _options, methods=["GET"], response_model=None)
    app.add_api_route("/api/runs", begin, methods=["POST"], response_model=None)
    app.add_api_route("/api/runs/{number}/events", events, methods=["GET"], response_model=None)
    app.add_api_route("/api/runs/{number}/stop", stop, methods=["POST"], response_model=None)
    app.add_api_route("/api/runs/{number}/tree", tree, methods=["GET"], response_model=None)
    app.add_api_route("/api/runs/{number}/export", export, methods=["GET"], response_model=None)
    return app


def serve(host: str = "127.0.0.1", port: int = 8321) -> None:
    """Serve the page until interrupted.

    Raises:
        ConfigurationError: The port is taken or not to be had.
    """
    app = create_app()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise ConfigurationError(
                f"cannot listen at {host}:{port}: {error.strerror}; give another --port, or 0 for any that is free"
            ) from error
        address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
        print(f"open {address} (Ctrl-C ends it)", flush=True)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
        server.run(sockets=[listener])


def _options() -> dict[str, Any]:
    """Return what the page offers."""
    from ..agents import pretrained_names
    from ..agents.contenders import DECODERS
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
    return {"tasks": tasks, "rewards": rewards, "decoders": list(DECODERS), "limits": LIMITS}
