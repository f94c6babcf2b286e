"""Decoding as an MDP: language models, the token tree, and the Gymnasium environment.

Names are imported when they are first used, so that importing the package stays light.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .constraints import BannedStrings, Constraint, ForcedStrings, JSONConstraint, MinTokens, RegexConstraint
    from .kv_pool import TreeEngine
    from .language_model import LanguageModel, PrefixEngine, TransformersLM, load_language_model
    from .mdp import Completion, DecodingMDP, Finish
    from .observations import Observer
    from .prompts import Prompt, load_prompts
    from .token_decoding import TokenDecodingEnv
    from .token_tree import TokenTree
    from .toy import TabularLM
    from .vector import TokenDecodingVecEnv, TokenDecodingVectorEnv

_HOMES = {
    "BannedStrings": "constraints",
    "Completion": "mdp",
    "Constraint": "constraints",
    "DecodingMDP": "mdp",
    "Finish": "mdp",
    "ForcedStrings": "constraints",
    "JSONConstraint": "constraints",
    "LanguageModel": "language_model",
    "load_language_model": "language_model",
    "load_prompts": "prompts",
    "MinTokens": "constraints",
    "Observer": "observations",
    "PrefixEngine": "language_model",
    "Prompt": "prompts",
    "RegexConstraint": "constraints",
    "TabularLM": "toy",
    "TokenDecodingEnv": "token_decoding",
    "TokenDecodingVecEnv": "vector",
    "TokenDecodingVectorEnv": "vector",
    "TokenTree": "token_tree",
    "TransformersLM": "language_model",
    "TreeEngine": "kv_pool",
}

__all__ = [
    "BannedStrings",
    "Completion",
    "Constraint",
    "DecodingMDP",
    "Finish",
    "ForcedStrings",
    "JSONConstraint",
    "LanguageModel",
    "MinTokens",
    "Observer",
    "PrefixEngine",
    "Prompt",
    "RegexConstraint",
    "TabularLM",
    "TokenDecodingEnv",
    "TokenDecodingVecEnv",
    "TokenDecodingVectorEnv",
    "TokenTree",
    "TransformersLM",
    "TreeEngine",
    "load_language_model",
    "load_prompts",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
