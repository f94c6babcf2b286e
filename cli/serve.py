"""Commands that serve: ``qstar serve``, OpenAI's interface, and ``qstar explore``, a page."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import ConfigurationError
from .console import quiet, status
from .options import complete, known_models, known_rewards

if TYPE_CHECKING:
    from ..agents import OnlineLearner, SearchEngine

__all__ = ["explore", "serve"]

_KEY_VARIABLE = "QSTAR_API_KEY"
# Seconds; lessons in between stand in the journal. A save of 250 MB took 0.3 to 0.5 s on 2026-11-28. Copying what it
# writes, so that a thread could, took 0.3 s: hence the engine's thread writes.
_SAVE_EVERY = 600.0


def serve(
    model: Annotated[
        str,
        typer.Option(help="Language model: a known name, a hub id or a folder.", autocompletion=complete(known_models)),
    ] = "smollm2-135m-instruct",
    host: Annotated[str, typer.Option(help="Address to listen at. Any but loopback needs API keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes any that is free.")] = 8000,
    reward: Annotated[
        str, typer.Option(help="Reward of searches that name none.", autocompletion=complete(known_rewards))
    ] = "sentiment",
    q: Annotated[
        list[str] | None,
        typer.Option("--q", metavar="NAME=FOLDER", help="A Q-function of yours, served as the model qstar-NAME."),
    ] = None,
    learn: Annotated[
        Path | None,
        typer.Option(help="Folder of a Q that learns from the searches of the model qstar-learned; made if new."),
    ] = None,
    learn_share: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="With --learn: the largest share of the time that learning takes.")
    ] = 0.25,
    api_key_file: Annotated[
        Path | None,
        typer.Option(help=f"File with API keys, one a line. The variable {_KEY_VARIABLE} may hold one key instead."),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(help="Name by which the server may be called; by default, away from loopback, any."),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="The most tokens of a text.")] = 1024,
    max_prompt_tokens: Annotated[int | None, typer.Option(min=1, help="The most tokens of a prompt.")] = None,
    max_budget: Annotated[int, typer.Option(min=1, help="The most LM tokens of a search.")] = 10_000,
    max_body: Annotated[int, typer.Option(min=1, help="The most bytes of a request.")] = 1_000_000,
    max_live: Annotated[int, typer.Option(min=1, help="Searches, and texts, that advance together.")] = 32,
    max_requests: Annotated[int, typer.Option(min=1, help="Requests that run or wait; others get 429.")] = 256,
    max_per_key: Annotated[int, typer.Option(min=1, help="The same for one API key.")] = 128,
    drain_seconds: Annotated[float, typer.Option(min=0, help="Time that SIGTERM leaves to finish.")] = 30.0,
) -> None:
    """Serve the language model and its searches behind OpenAI's interface."""
    try:
        from ..agents.planning.engine import SearchEngine
        from ..models.devices import one_compute_thread
        from ..serve.app import create_app
        from ..serve.guard import Limits
        from ..serve.listening import LOOPBACK
        from ..serve.listening import serve as listen
    except ImportError as error:
        raise ConfigurationError(
            f"the server needs FastAPI, uvicorn and prometheus-client ({error}): "
            "run pip install 'qstar-decoding[serve]'"
        ) from error
    keys = _keys(api_key_file)
    if host not in LOOPBACK and not keys:
        raise ConfigurationError(
            f"--host {host} lets other machines ask, and there is no API key: give --api-key-file, or set "
            f"{_KEY_VARIABLE}"
        )
    limits = Limits(
        body_bytes=max_body,
        prompt_tokens=max_prompt_tokens,
        max_tokens=max_tokens,
        budget=max_budget,
        live=max_per_key,
        requests=max_requests,
    )
    hosts = allowed_host or (LOOPBACK if host in LOOPBACK else ["*"])
    quiet()
    # Made when it is first asked for: a learner's folder is looked at before the language model is loaded.
    engine = functools.cache(functools.partial(SearchEngine, model, reward=reward, max_live=max_live))
    with contextlib.ExitStack() as stack:
        with status(f"loading {model}"), one_compute_thread():
            learner = None if learn is None else stack.enter_context(_learning(learn, engine, learn_share))
            app = create_app(
                engine(), limits=limits, keys=keys, hosts=hosts, q=dict(map(_named, q or [])), learner=learner
            )
        service = app.state.service
        stack.callback(service.close)
        listen(app, host, port, service.turnstile, drain_seconds)


def explore(
    host: Annotated[
        str, typer.Option(help="Address to listen at. With any but loopback, others can decode here.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes any that is free.")] = 8321,
) -> None:
    """Serve a page to watch searches, compare decoders, look into trees, and go on from nodes."""
    try:
        from ..explorer.server import serve
    except ImportError as error:
        raise ConfigurationError(
            f"the explorer needs FastAPI and uvicorn ({error}): run pip install fastapi uvicorn"
        ) from error
    quiet()
    serve(host, port)


@contextlib.contextmanager
def _learning(folder: Path, engine: Callable[[], SearchEngine], share: float) -> Iterator[OnlineLearner]:
    """Let a Q learn in a folder from an engine's searches; the engine is asked for once the folder is found free."""
    from ..agents import OnlineLearner, QStar
    from ..agents.learning import environment_like

    def agent(saved: Path | None) -> QStar:
        env = environment_like(engine().mdp)
        return QStar(env=env, seed=0) if saved is None else QStar.load(saved, env)

    with OnlineLearner.open(folder, agent, share=share, save_every=_SAVE_EVERY) as learner:
        yield learner


def _named(option: str) -> tuple[str, str]:
    name, equals, folder = option.partition("=")
    if not equals or not name.isidentifier() or not folder:
        raise ConfigurationError(f"--q is NAME=FOLDER, such as mine=runs/my-q, got {option!r}")
    return name, folder


def _keys(path: Path | None) -> list[str]:
    """Return the API keys of a file and of the environment; they never stand on the command line."""
    keys = [os.environ.get(_KEY_VARIABLE, "").strip()]
    if path is not None:
        try:
            keys += [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"--api-key-file: {path} cannot be read: {error}") from error
        if not any(keys):
            raise ConfigurationError(f"--api-key-file: {path} has no key in it; write one a line")
    return [key for key in keys if key]
