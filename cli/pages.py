"""Commands that serve a page: ``qstar explore``."""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import ConfigurationError
from .console import quiet

__all__ = ["explore"]


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
