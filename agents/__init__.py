"""Who chooses tokens: the planner, the baselines, and the agents that learn Q for them.

Names are imported when they are first used, so that planning does not load the learners and the reverse.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .astar import AStarPlanner
    from .decoders import DECODERS, BeamSearch, GreedyDecoder, SamplingDecoder, make_decoder
    from .heuristics import BoundHeuristic, Heuristic, QHeuristic, ZeroHeuristic
    from .planning import Budget, Decoder, Plan, Search, Usage
    from .policies import TokenQNetwork, TokenQPolicy
    from .q_function import QFunction, pretrained_names
    from .qstar import QStar

_HOMES = {
    "AStarPlanner": "astar",
    "BeamSearch": "decoders",
    "BoundHeuristic": "heuristics",
    "Budget": "planning",
    "DECODERS": "decoders",
    "Decoder": "planning",
    "GreedyDecoder": "decoders",
    "Heuristic": "heuristics",
    "Plan": "planning",
    "QFunction": "q_function",
    "QHeuristic": "heuristics",
    "QStar": "qstar",
    "SamplingDecoder": "decoders",
    "Search": "planning",
    "TokenQNetwork": "policies",
    "TokenQPolicy": "policies",
    "Usage": "planning",
    "ZeroHeuristic": "heuristics",
    "make_decoder": "decoders",
    "pretrained_names": "q_function",
}

__all__ = [
    "DECODERS",
    "AStarPlanner",
    "BeamSearch",
    "BoundHeuristic",
    "Budget",
    "Decoder",
    "GreedyDecoder",
    "Heuristic",
    "Plan",
    "QFunction",
    "QHeuristic",
    "QStar",
    "SamplingDecoder",
    "Search",
    "TokenQNetwork",
    "TokenQPolicy",
    "Usage",
    "ZeroHeuristic",
    "make_decoder",
    "pretrained_names",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
