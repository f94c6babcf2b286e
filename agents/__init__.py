"""Who chooses tokens: the planner, the baselines, and the agents that learn Q for them.

Names are imported when they are first used, so that planning does not load the learners and the reverse.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .astar import SEARCHES, AStarPlanner
    from .decoders import DECODERS, BeamSearch, GreedyDecoder, SamplingDecoder, make_decoder
    from .diagnostics import Calibration, Diagnostics, calibration
    from .evaluation import Outcomes, evaluate, paired_bootstrap
    from .heuristics import (
        BoundHeuristic,
        CombinedHeuristic,
        Heuristic,
        OracleHeuristic,
        QHeuristic,
        SoftValueHeuristic,
        ValueHeuristic,
        ZeroHeuristic,
        maximum,
        mean,
    )
    from .masked_dqn import MaskableDQN, MaskableQRDQN
    from .planning import Decoder, Plan
    from .policies import TokenQNetwork, TokenQPolicy, TokenQuantilePolicy
    from .q_function import QFunction, pretrained_names
    from .qstar import QStar
    from .replay import MaskedReplayBuffer
    from .search import Budget, Search, Usage

_HOMES = {
    "AStarPlanner": "astar",
    "BeamSearch": "decoders",
    "BoundHeuristic": "heuristics",
    "Budget": "search",
    "Calibration": "diagnostics",
    "calibration": "diagnostics",
    "CombinedHeuristic": "heuristics",
    "Decoder": "planning",
    "DECODERS": "decoders",
    "Diagnostics": "diagnostics",
    "evaluate": "evaluation",
    "GreedyDecoder": "decoders",
    "Heuristic": "heuristics",
    "make_decoder": "decoders",
    "maximum": "heuristics",
    "mean": "heuristics",
    "OracleHeuristic": "heuristics",
    "SEARCHES": "astar",
    "SoftValueHeuristic": "heuristics",
    "MaskableDQN": "masked_dqn",
    "MaskableQRDQN": "masked_dqn",
    "MaskedReplayBuffer": "replay",
    "Outcomes": "evaluation",
    "paired_bootstrap": "evaluation",
    "Plan": "planning",
    "pretrained_names": "q_function",
    "QFunction": "q_function",
    "QHeuristic": "heuristics",
    "QStar": "qstar",
    "SamplingDecoder": "decoders",
    "Search": "search",
    "TokenQNetwork": "policies",
    "TokenQPolicy": "policies",
    "TokenQuantilePolicy": "policies",
    "Usage": "search",
    "ValueHeuristic": "heuristics",
    "ZeroHeuristic": "heuristics",
}

__all__ = [
    "DECODERS",
    "SEARCHES",
    "AStarPlanner",
    "BeamSearch",
    "BoundHeuristic",
    "Budget",
    "Calibration",
    "CombinedHeuristic",
    "Decoder",
    "Diagnostics",
    "GreedyDecoder",
    "Heuristic",
    "MaskableDQN",
    "MaskableQRDQN",
    "MaskedReplayBuffer",
    "OracleHeuristic",
    "Outcomes",
    "Plan",
    "QFunction",
    "QHeuristic",
    "QStar",
    "SamplingDecoder",
    "Search",
    "SoftValueHeuristic",
    "TokenQNetwork",
    "TokenQPolicy",
    "TokenQuantilePolicy",
    "Usage",
    "ValueHeuristic",
    "ZeroHeuristic",
    "calibration",
    "evaluate",
    "make_decoder",
    "maximum",
    "mean",
    "paired_bootstrap",
    "pretrained_names",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
