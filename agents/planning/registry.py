"""The one table of decoders: their names, classes, sources, and the settings that are tried when they are tuned."""

from __future__ import annotations

import inspect
import itertools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ...envs import DecodingMDP
from ...errors import UnknownNameError
from ..heuristics import Heuristic, LookAheadHeuristic, ZeroHeuristic
from .astar import AStarPlanner
from .beam import BeamSearch, DiverseBeamSearch, LevelSearch
from .decoder import Decoder
from .greedy import ARGSDecoder, GreedyDecoder
from .levin import LevinTreeSearch
from .mcts import MCTS
from .particles import ParticleFilter, RebaseSearch
from .sampling import AdaptiveVote, BlockwiseDecoder, ILQLDecoder, MajorityVote, SamplingDecoder, UniqueSampler

__all__ = [
    "CONTENDERS",
    "DECODERS",
    "PLANNER_SETTINGS",
    "DecoderSpec",
    "by_command",
    "decoder_options",
    "make_decoder",
]

# What a task may set of A*; its environment, its heuristic and its learner come from elsewhere.
PLANNER_SETTINGS = inspect.signature(AStarPlanner).parameters.keys() - {"env", "heuristic", "learn"}

# A decoder looks at the language model alone, at the reward of finished texts, at that of unfinished ones, or at Q.
Uses = Literal["lm", "reward", "potential", "q"]


@dataclass(frozen=True)
class DecoderSpec:
    """One decoder of a comparison.

    Attributes:
        kind: The class.
        source: The paper that it comes from.
        uses: The best informed thing that it looks at. A task with ``score="q"`` excludes those that use the reward.
        settings: Arguments that it always gets.
        grid: Settings that are tried on the dev prompts. Every decoder that has any has :data:`TRIALS`.
        random: Whether it draws, so that several seeds are worth running.
        budgeted: Whether it can make use of a larger budget.
        command: Name of the class on the command line; empty where another row of the table has it.
    """

    kind: type[Decoder]
    source: str
    uses: Uses
    settings: Mapping[str, Any] = field(default_factory=dict)
    grid: Sequence[Mapping[str, Any]] = ()
    random: bool = False
    budgeted: bool = True
    command: str = ""

    def make(
        self, mdp: DecodingMDP, q: Heuristic | None, seed: int, planner: Mapping[str, Any], **setting: Any
    ) -> Decoder:
        """Return the decoder with one setting.

        Args:
            mdp: The process that it decodes in.
            q: The heuristic, for decoders on Q.
            seed: The seed, for decoders that draw.
            planner: The task's arguments of the planner.
            setting: A setting of the grid.
        """
        options = self.options(q if self.uses == "q" else None, seed, planner)
        return self.kind(mdp, **{**options, **self.settings, **setting})

    def options(self, heuristic: Heuristic | None, seed: int, planner: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments with which the class serves a task.

        Args:
            heuristic: The heuristic; None for decoders that use none.
            seed: The seed, for decoders that draw.
            planner: The task's arguments of the planner. A* takes them all, a beam those of level-synchronous search,
                other decoders on Q ``score`` alone.

        Raises:
            UnknownNameError: ``planner`` has an argument that the planner does not know.
        """
        options: dict[str, Any] = {"seed": seed} if self.random else {}
        if heuristic is not None:
            for key in planner:
                if key not in PLANNER_SETTINGS:
                    raise UnknownNameError("argument of planner", str(key), PLANNER_SETTINGS)
            shared = {"score"} | (_LEVEL_SETTINGS if issubclass(self.kind, LevelSearch) else set())
            taken = planner if self.kind is AStarPlanner else {k: v for k, v in planner.items() if k in shared}
            options |= {"heuristic": heuristic, **taken}
        return options


TRIALS = 8  # settings of every decoder that has any


def _grid(**values: Sequence[Any]) -> list[dict[str, Any]]:
    """Return all combinations of the values, :data:`TRIALS` in all."""
    return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]


# What a task may set for every search that is level-synchronous. Width and rounds are part of what is compared.
_LEVEL_SETTINGS = {"taper", "prior", "pathmax", "all_endings"}
_LEVELS = {"taper": (2.0, 0.0, 1.0, 3.0), "prior": (0.0, 0.1)}


# By name in a comparison.
CONTENDERS: dict[str, DecoderSpec] = {
    "greedy": DecoderSpec(
        GreedyDecoder, "the language model's favourite token", "lm", budgeted=False, command="greedy"
    ),
    "sample": DecoderSpec(
        SamplingDecoder,
        "ancestral sampling",
        "lm",
        {"n": 1},
        _grid(temperature=(1.0, 0.7, 0.5, 0.3), top_p=(1.0, 0.95)),
        random=True,
        budgeted=False,
    ),
    "top-p": DecoderSpec(
        SamplingDecoder,
        "Holtzman et al. 2020",
        "lm",
        {"n": 1},
        _grid(top_p=(0.95, 0.9, 0.8, 0.6), temperature=(1.0, 0.7)),
        random=True,
        budgeted=False,
    ),
    "majority": DecoderSpec(
        MajorityVote,
        "Wang et al. 2023",
        "lm",
        {},
        _grid(temperature=(1.0, 0.7, 0.5, 0.3), top_p=(1.0, 0.9)),
        random=True,
        command="majority",
    ),
    "adaptive vote": DecoderSpec(
        AdaptiveVote,
        "Aggarwal et al. 2023",
        "lm",
        {},
        _grid(temperature=(1.0, 0.7, 0.5, 0.3), top_p=(1.0, 0.9)),
        random=True,
        command="adaptive-vote",
    ),
    "beam": DecoderSpec(
        BeamSearch,
        "the likeliest text",
        "lm",
        {"rerank": False},
        _grid(taper=(0.0, 1.0, 2.0, 3.0), all_endings=(False, True)),
    ),
    "beam reranked": DecoderSpec(
        BeamSearch,
        "beam search, the best J of the beam",
        "reward",
        {},
        _grid(taper=(0.0, 1.0, 2.0, 3.0), all_endings=(False, True)),
        command="beam",
    ),
    "diverse beam": DecoderSpec(
        DiverseBeamSearch,
        "Vijayakumar et al. 2018",
        "reward",
        {},
        _grid(diversity=(0.01, 0.03, 0.1, 0.3), groups=(4, 2)),
        command="diverse-beam",
    ),
    "best-of-n": DecoderSpec(
        SamplingDecoder,
        "Stiennon et al. 2020",
        "reward",
        {},
        _grid(temperature=(1.3, 1.0, 0.7, 0.5), top_p=(1.0, 0.9)),
        random=True,
        command="sample",
    ),
    "without replacement": DecoderSpec(
        UniqueSampler,
        "Kool et al. 2019; Shi et al. 2020",
        "reward",
        {},
        _grid(temperature=(1.3, 1.0, 0.7, 0.5), top_p=(1.0, 0.9)),
        random=True,
        command="unique",
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
        _grid(
            heuristic=[LookAheadHeuristic(length, width=width) for length, width in ((1, 3), (2, 2), (4, 1), (4, 3))],
            taper=(2.0, 0.0),
        ),
    ),
    "A* without Q": DecoderSpec(AStarPlanner, "ours, h = bound", "reward", {}, _grid(**_LEVELS)),
    "Levin": DecoderSpec(LevinTreeSearch, "Orseau et al. 2018", "reward", command="levin"),
    "ARGS": DecoderSpec(
        ARGSDecoder,
        "Khanov et al. 2024",
        "potential",
        {},
        _grid(reward_weight=(0.3, 1.0, 2.0, 3.0, 6.0, 10.0, 30.0, 100.0)),
        budgeted=False,
        command="args",
    ),
    "SMC on prefixes": DecoderSpec(
        ParticleFilter,
        "Lew et al. 2023; Puri et al. 2025",
        "potential",
        {"twist": "potential"},
        _grid(beta=(0.02, 0.05, 0.1, 0.3), threshold=(0.5, 1.0)),
        random=True,
    ),
    "arg max Q": DecoderSpec(GreedyDecoder, "Q-learning alone", "q", budgeted=False),
    "VAS": DecoderSpec(
        SamplingDecoder,
        "Han et al. 2024; Mudgal et al. 2024",
        "q",
        {},
        _grid(beta=(0.02, 0.05, 0.1, 0.2), temperature=(1.0, 0.5)),
        random=True,
    ),
    "ILQL": DecoderSpec(
        ILQLDecoder,
        "Snell et al. 2023",
        "q",
        {},
        _grid(beta=(0.02, 0.05, 0.1, 0.2), temperature=(1.0, 0.5)),
        random=True,
        command="ilql",
    ),
    "beam on g + Q": DecoderSpec(BeamSearch, "beam search, f = g + Q", "q", {}, _grid(**_LEVELS)),
    "blockwise": DecoderSpec(
        BlockwiseDecoder,
        "Mudgal et al. 2024",
        "q",
        {},
        _grid(block=(2, 4, 8, 12), temperature=(1.0, 0.7)),
        random=True,
        command="blockwise",
    ),
    "MCTS": DecoderSpec(
        MCTS,
        "Silver et al. 2017; Feng et al. 2023",
        "q",
        {},
        _grid(exploration=(0.1, 0.3, 1.0, 3.0), temperature=(1.0, 2.0)),
        command="mcts",
    ),
    "REBASE": DecoderSpec(
        RebaseSearch,
        "Wu et al. 2024",
        "q",
        {},
        _grid(balance=(0.02, 0.05, 0.1, 0.3), temperature=(1.0, 0.7)),
        random=True,
        command="rebase",
    ),
    "SMC on Q": DecoderSpec(
        ParticleFilter,
        "Zhao et al. 2024",
        "q",
        {},
        _grid(beta=(0.02, 0.05, 0.1, 0.3), threshold=(0.5, 1.0)),
        random=True,
        command="smc",
    ),
    "Q*": DecoderSpec(AStarPlanner, "ours", "q", {}, _grid(**_LEVELS), command="astar"),
}

_BY_COMMAND = {spec.command: spec for spec in CONTENDERS.values() if spec.command}

# By name on the command line.
DECODERS: dict[str, type[Decoder]] = {name: spec.kind for name, spec in sorted(_BY_COMMAND.items())}


def by_command(name: str) -> DecoderSpec:
    """Return the decoder of a name of the command line.

    Raises:
        UnknownNameError: There is none of that name.
    """
    if name not in _BY_COMMAND:
        raise UnknownNameError("decoder", name, DECODERS)
    return _BY_COMMAND[name]


def make_decoder(name: str, env: Any, **kwargs: Any) -> Decoder:
    """Return the decoder of a name of the command line, made with ``kwargs``.

    Raises:
        UnknownNameError: There is none of that name.
    """
    return by_command(name).kind(env, **kwargs)


def decoder_options(name: str, planner: Mapping[str, Any], heuristic: Heuristic | None, seed: int) -> dict[str, Any]:
    """Return the arguments with which a decoder serves a task; see :meth:`DecoderSpec.options`."""
    return by_command(name).options(heuristic, seed, planner)


def __getattr__(name: str) -> Any:
    if name == "Contender":
        warnings.warn("Contender is called DecoderSpec; the old name goes in 0.3", DeprecationWarning, stacklevel=2)
        return DecoderSpec
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
