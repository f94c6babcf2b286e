"""Every decoder by name, with what it needs, where it comes from, and the settings that are tried when it is tuned."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ...envs import DecodingMDP
from ...errors import UnknownNameError
from ..heuristics import Heuristic, LookAheadHeuristic, ZeroHeuristic
from .astar import AStarPlanner
from .beam import BeamSearch, DiverseBeamSearch
from .decoder import Decoder
from .greedy import ARGSDecoder, GreedyDecoder
from .levin import LevinTreeSearch
from .mcts import MCTS
from .rebase import RebaseSearch
from .sampling import BlockwiseDecoder, ILQLDecoder, MajorityVote, SamplingDecoder

__all__ = ["CONTENDERS", "DECODERS", "DecoderSpec", "decoder_options", "make_decoder"]

# What a decoder may look at: the language model alone, the reward of finished texts (or of prefixes) too, Q too.
Uses = Literal["lm", "reward", "q"]

DECODERS: dict[str, type[Decoder]] = {
    "args": ARGSDecoder,
    "astar": AStarPlanner,
    "beam": BeamSearch,
    "blockwise": BlockwiseDecoder,
    "diverse-beam": DiverseBeamSearch,
    "greedy": GreedyDecoder,
    "ilql": ILQLDecoder,
    "levin": LevinTreeSearch,
    "majority": MajorityVote,
    "mcts": MCTS,
    "rebase": RebaseSearch,
    "sample": SamplingDecoder,
}

# Those that a seed changes, and those that make something of a Q-function (the others rank by likelihood, or by none).
DRAWING = {"blockwise", "ilql", "majority", "rebase", "sample"}
Q_GUIDED = {"astar", "blockwise", "ilql", "mcts", "rebase"}


def make_decoder(name: str, env: Any, **kwargs: Any) -> Decoder:
    """Return the decoder that is called ``name`` on the command line.

    Raises:
        UnknownNameError: There is none of that name.
    """
    if name not in DECODERS:
        raise UnknownNameError("decoder", name, DECODERS)
    return DECODERS[name](env, **kwargs)


def decoder_options(name: str, planner: Mapping[str, Any], heuristic: Heuristic | None, seed: int) -> dict[str, Any]:
    """Return the arguments with which a decoder of :data:`DECODERS` serves a task.

    Args:
        name: Of the decoder.
        planner: The task's own arguments of the planner.
        heuristic: For those that make something of one (:data:`Q_GUIDED`), else None.
        seed: For those that draw.
    """
    options: dict[str, Any] = {"seed": seed} if name in DRAWING else {}
    if heuristic is not None:
        options |= {"heuristic": heuristic, **_of_planner(DECODERS[name], planner)}
    return options


def _of_planner(kind: Callable[..., Decoder], planner: Mapping[str, Any]) -> dict[str, Any]:
    """Return which of a task's arguments of the planner a decoder on Q takes: A* all, the others ``score`` alone."""
    return dict(planner) if kind is AStarPlanner else {k: v for k, v in planner.items() if k == "score"}


@dataclass(frozen=True)
class DecoderSpec:
    """One decoder of a comparison.

    Attributes:
        kind: Its class.
        source: The paper that it comes from.
        uses: What it looks at. Where a task keeps its reward from the decoders, those that use it cannot take part.
        settings: What it is always given.
        grid: The settings that are tried on the dev prompts; every decoder that has any has four.
        random: Whether it draws, so that several seeds are worth running.
        budgeted: Whether it can make use of a larger budget.
    """

    kind: Callable[..., Decoder]
    source: str
    uses: Uses
    settings: Mapping[str, Any] = field(default_factory=dict)
    grid: Sequence[Mapping[str, Any]] = ()
    random: bool = False
    budgeted: bool = True

    def make(
        self, mdp: DecodingMDP, q: Heuristic | None, seed: int, planner: Mapping[str, Any], **setting: Any
    ) -> Decoder:
        """Return the decoder with one setting.

        Args:
            mdp: Where it decodes.
            q: The heuristic, for those that use one.
            seed: For those that draw.
            planner: The task's own arguments of the planner: all for A* on Q, only ``score`` for others on Q.
            setting: Of the grid.
        """
        options = {**self.settings, **setting}
        if self.random:
            options["seed"] = seed
        if self.uses == "q":
            options = {"heuristic": q, **_of_planner(self.kind, planner), **options}
        return self.kind(mdp, **options)


def _grid(name: str, *values: Any) -> list[dict[str, Any]]:
    return [{name: value} for value in values]


CONTENDERS: dict[str, DecoderSpec] = {
    "greedy": DecoderSpec(GreedyDecoder, "the language model's favourite token", "lm", budgeted=False),
    "sample": DecoderSpec(
        SamplingDecoder,
        "ancestral sampling",
        "lm",
        {"n": 1},
        _grid("temperature", 1.0, 0.7, 0.5, 0.3),
        random=True,
        budgeted=False,
    ),
    "top-p": DecoderSpec(
        SamplingDecoder,
        "Holtzman et al. 2020",
        "lm",
        {"n": 1},
        _grid("top_p", 0.95, 0.9, 0.8, 0.6),
        random=True,
        budgeted=False,
    ),
    "majority": DecoderSpec(
        MajorityVote, "Wang et al. 2023", "lm", {}, _grid("temperature", 1.0, 0.7, 0.5, 0.3), random=True
    ),
    "beam": DecoderSpec(BeamSearch, "the likeliest text", "lm", {"rerank": False}),
    "beam reranked": DecoderSpec(BeamSearch, "beam search, the best J of the beam", "reward"),
    "diverse beam": DecoderSpec(
        DiverseBeamSearch, "Vijayakumar et al. 2018", "reward", {}, _grid("diversity", 0.01, 0.03, 0.1, 0.3)
    ),
    "best-of-n": DecoderSpec(
        SamplingDecoder, "Stiennon et al. 2020", "reward", {}, _grid("temperature", 1.3, 1.0, 0.7, 0.5), random=True
    ),
    "best-first h=0": DecoderSpec(
        AStarPlanner, "Dijkstra 1959", "reward", {"search": "qstar", "heuristic": ZeroHeuristic()}
    ),
    "best-first h=bound": DecoderSpec(AStarPlanner, "Hart et al. 1968", "reward", {"search": "qstar"}),
    "look-ahead": DecoderSpec(
        AStarPlanner,
        "Lu et al. 2022",
        "reward",
        {"margin": 0.5},
        [{"heuristic": LookAheadHeuristic(length, width=width)} for length, width in ((1, 3), (2, 2), (4, 1), (4, 3))],
    ),
    "A* without Q": DecoderSpec(AStarPlanner, "ours, h = bound", "reward", {}, _grid("taper", 0.0, 1.0, 2.0, 3.0)),
    "Levin": DecoderSpec(LevinTreeSearch, "Orseau et al. 2018", "reward"),
    "ARGS": DecoderSpec(
        ARGSDecoder, "Khanov et al. 2024", "reward", {}, _grid("reward_weight", 1.0, 3.0, 10.0, 30.0), budgeted=False
    ),
    "arg max Q": DecoderSpec(GreedyDecoder, "Q-learning alone", "q", budgeted=False),
    "VAS": DecoderSpec(
        SamplingDecoder,
        "Han et al. 2024; Mudgal et al. 2024",
        "q",
        {},
        _grid("beta", 0.02, 0.05, 0.1, 0.2),
        random=True,
    ),
    "ILQL": DecoderSpec(
        ILQLDecoder,
        "Snell et al. 2023",
        "q",
        {},
        [{"beta": b, "temperature": t} for b, t in ((0.05, 1.0), (0.05, 0.5), (0.1, 0.5), (0.2, 0.3))],
        random=True,
    ),
    "beam on g + Q": DecoderSpec(BeamSearch, "beam search, f = g + Q", "q"),
    "blockwise": DecoderSpec(BlockwiseDecoder, "Mudgal et al. 2024", "q", {}, _grid("block", 2, 4, 8, 12), random=True),
    "MCTS": DecoderSpec(
        MCTS, "Silver et al. 2017; Feng et al. 2023", "q", {}, _grid("exploration", 0.1, 0.3, 1.0, 3.0)
    ),
    "REBASE": DecoderSpec(RebaseSearch, "Wu et al. 2024", "q", {}, _grid("balance", 0.02, 0.05, 0.1, 0.3), random=True),
    "Q*": DecoderSpec(AStarPlanner, "ours", "q", {}, _grid("taper", 2.0, 0.0, 1.0, 3.0)),
}
