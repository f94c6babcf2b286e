"""Who chooses tokens: the planner, the baselines, and the agents that learn Q for them.

Names are imported when they are first used, so that planning does not load the learners and the reverse.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .astar import AStarPlanner
    from .decoders import DECODERS, BeamSearch, GreedyDecoder, SamplingDecoder, make_decoder
    from .diagnostics import Calibration, Diagnostics, calibration
    from .evaluation import Outcomes, evaluate, paired_bootstrap
    from .heuristics import BoundHeuristic, Heuristic, QHeuristic, ValueHeuristic, ZeroHeuristic
    from .masked_dqn import MaskableDQN, MaskableQRDQN
    from .planning import Budget, Decoder, Plan, Search, Usage
    from .policies import TokenQNetwork, TokenQPolicy, TokenQuantilePolicy
    from .q_function import QFunction, pretrained_names
    from .qstar import QStar
    from .replay import MaskedReplayBuffer

_HOMES = {
    "AStarPlanner": "astar",
    "BeamSearch": "decoders",
    "BoundHeuristic": "heuristics",
    "Budget": "planning",
    "Calibration": "diagnostics",
    "calibration": "diagnostics",
    "Decoder": "planning",
    "DECODERS": "decoders",
    "Diagnostics": "diagnostics",
    "evaluate": "evaluation",
    "GreedyDecoder": "decoders",
    "Heuristic": "heuristics",
    "make_decoder": "decoders",
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
    "Search": "planning",
    "TokenQNetwork": "policies",
    "TokenQPolicy": "policies",
    "TokenQuantilePolicy": "policies",
    "Usage": "planning",
    "ValueHeuristic": "heuristics",
    "ZeroHeuristic": "heuristics",
}

__all__ = [
    "DECODERS",
    "AStarPlanner",
    "BeamSearch",
    "BoundHeuristic",
    "Budget",
    "Calibration",
    "Decoder",
    "Diagnostics",
    "GreedyDecoder",
    "Heuristic",
    "MaskableDQN",
    "MaskableQRDQN",
    "MaskedReplayBuffer",
    "Outcomes",
    "Plan",
    "QFunction",
    "QHeuristic",
    "QStar",
    "SamplingDecoder",
    "Search",
    "TokenQNetwork",
    "TokenQPolicy",
    "TokenQuantilePolicy",
    "Usage",
    "ValueHeuristic",
    "ZeroHeuristic",
    "calibration",
    "evaluate",
    "make_decoder",
    "paired_bootstrap",
    "pretrained_names",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
