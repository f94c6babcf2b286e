"""Names of :mod:`qstar_decoding.models` that version 0.1 had here; ``qstar_decoding.envs`` still exports them."""

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
