"""Who chooses tokens: the planner, the baselines, and the agents that learn Q for them.

Names are imported when they are first used, so that planning does not load the learners and the reverse.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .astar import SEARCHES, AStarPlanner
    from .contenders import CONTENDERS, DECODERS, Contender, make_decoder
    from .decoders import (
        ARGSDecoder,
        BeamSearch,
        BlockwiseDecoder,
        DiverseBeamSearch,
        GreedyDecoder,
        ILQLDecoder,
        MajorityVote,
        SamplingDecoder,
    )
    from .diagnostics import Calibration, Diagnostics, calibration
    from .distributed import InProcess, Job, RayWorkers
    from .evaluation import Outcomes, evaluate, paired_bootstrap
    from .heuristics import (
        BoundHeuristic,
        CombinedHeuristic,
        Heuristic,
        LookAheadHeuristic,
        OracleHeuristic,
        QHeuristic,
        SoftValueHeuristic,
        ValueHeuristic,
        ZeroHeuristic,
        maximum,
        mean,
    )
    from .masked_dqn import MaskableDQN, MaskableQRDQN
    from .planning import Decoder, Plan, Stream
    from .policies import TokenQNetwork, TokenQPolicy, TokenQuantilePolicy
    from .q_function import QFunction, pretrained_names
    from .qstar import QStar, Searcher
    from .replay import MaskedReplayBuffer
    from .search import Budget, Search, Usage
    from .tree_search import MCTS, LevinTreeSearch, RebaseSearch

_HOMES = {
    "ARGSDecoder": "decoders",
    "AStarPlanner": "astar",
    "BeamSearch": "decoders",
    "BlockwiseDecoder": "decoders",
    "BoundHeuristic": "heuristics",
    "Budget": "search",
    "Calibration": "diagnostics",
    "calibration": "diagnostics",
    "CombinedHeuristic": "heuristics",
    "Contender": "contenders",
    "CONTENDERS": "contenders",
    "Decoder": "planning",
    "DECODERS": "contenders",
    "Diagnostics": "diagnostics",
    "DiverseBeamSearch": "decoders",
    "evaluate": "evaluation",
    "GreedyDecoder": "decoders",
    "Heuristic": "heuristics",
    "ILQLDecoder": "decoders",
    "InProcess": "distributed",
    "Job": "distributed",
    "LevinTreeSearch": "tree_search",
    "LookAheadHeuristic": "heuristics",
    "MajorityVote": "decoders",
    "make_decoder": "contenders",
    "MaskableDQN": "masked_dqn",
    "MaskableQRDQN": "masked_dqn",
    "MaskedReplayBuffer": "replay",
    "maximum": "heuristics",
    "MCTS": "tree_search",
    "mean": "heuristics",
    "OracleHeuristic": "heuristics",
    "Outcomes": "evaluation",
    "paired_bootstrap": "evaluation",
    "Plan": "planning",
    "pretrained_names": "q_function",
    "QFunction": "q_function",
    "QHeuristic": "heuristics",
    "QStar": "qstar",
    "RayWorkers": "distributed",
    "RebaseSearch": "tree_search",
    "SamplingDecoder": "decoders",
    "Search": "search",
    "Searcher": "qstar",
    "SEARCHES": "astar",
    "SoftValueHeuristic": "heuristics",
    "Stream": "planning",
    "TokenQNetwork": "policies",
    "TokenQPolicy": "policies",
    "TokenQuantilePolicy": "policies",
    "Usage": "search",
    "ValueHeuristic": "heuristics",
    "ZeroHeuristic": "heuristics",
}

__all__ = [
    "CONTENDERS",
    "DECODERS",
    "MCTS",
    "SEARCHES",
    "ARGSDecoder",
    "AStarPlanner",
    "BeamSearch",
    "BlockwiseDecoder",
    "BoundHeuristic",
    "Budget",
    "Calibration",
    "CombinedHeuristic",
    "Contender",
    "Decoder",
    "Diagnostics",
    "DiverseBeamSearch",
    "GreedyDecoder",
    "Heuristic",
    "ILQLDecoder",
    "InProcess",
    "Job",
    "LevinTreeSearch",
    "LookAheadHeuristic",
    "MajorityVote",
    "MaskableDQN",
    "MaskableQRDQN",
    "MaskedReplayBuffer",
    "OracleHeuristic",
    "Outcomes",
    "Plan",
    "QFunction",
    "QHeuristic",
    "QStar",
    "RayWorkers",
    "RebaseSearch",
    "SamplingDecoder",
    "Search",
    "Searcher",
    "SoftValueHeuristic",
    "Stream",
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
