"""Names of :mod:`qstar_decoding.models` that version 0.1 had here; ``qstar_decoding.envs`` still exports them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .. import models

if TYPE_CHECKING:
    from ..models import (
        LanguageModel,
        PrefixEngine,
        TabularLM,
        TransformersLM,
        TreeEngine,
        check_language_model,
        load_language_model,
    )

__all__ = [
    "LanguageModel",
    "PrefixEngine",
    "TabularLM",
    "TransformersLM",
    "TreeEngine",
    "check_language_model",
    "load_language_model",
]


def __getattr__(name: str) -> Any:
    """Return a name when it is first used: some of them need torch."""
    if name in __all__:
        return getattr(models, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
