"""A learned Q as the planner uses it: from nodes of the token tree to values, whoever learned it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..envs import DecodingMDP, Observer, Prompt
from ..errors import CheckpointError, ConfigurationError, UnknownNameError
from .planning import IntArray, Values

__all__ = ["QFunction", "QSpec", "as_q_function", "pretrained_names"]

_PRETRAINED = Path(__file__).parent / "pretrained"


@dataclass(frozen=True)
class QSpec:
    """What a Q-function was trained on; it means nothing elsewhere.

    Attributes:
        model: Name of the language model.
        top_k: Number of actions.
        hidden_size: Width of the hidden state.
        candidate_dims: Numbers per candidate token in the observation.
        shaped: Whether Q estimates the return less φ(s).
    """

    model: str
    top_k: int
    hidden_size: int
    candidate_dims: int
    shaped: bool

    @classmethod
    def of(cls, mdp: DecodingMDP, candidate_dims: int, shaped: bool) -> QSpec:
        """Return the spec of a Q-function for ``mdp``."""
        return cls(mdp.model.name, mdp.top_k, mdp.model.hidden_size, candidate_dims, shaped)

    def check(self, mdp: DecodingMDP) -> None:
        """Compare with the MDP that Q is about to be used in.

        Raises:
            CheckpointError: It has another model, k or hidden size.
        """
        here = QSpec.of(mdp, self.candidate_dims, self.shaped)
        differences = [
            f"{name} {value!r} (trained) against {asdict(here)[name]!r} (here)"
            for name, value in asdict(self).items()
            if asdict(here)[name] != value
        ]
        if differences:
            raise CheckpointError(
                f"this Q-function was trained for something else: {'; '.join(differences)}. "
                "Use the env arguments it was trained with, or train one for these"
            )


@dataclass
class QFunction:
    """A Q-network with what is needed to apply it.

    Attributes:
        network: Observations (dict of tensors) in, Q-values [n, k] out.
        spec: What it was trained on; None skips the check.
        shaped: Whether Q estimates the return less φ(s).
        candidate_dims: Numbers per candidate token in the observation.
        description: What the checkpoint says of itself: command, seed, figures.
    """

    network: torch.nn.Module
    spec: QSpec | None
    shaped: bool
    candidate_dims: int
    description: dict[str, Any] = field(default_factory=dict)
    _observer: tuple[DecodingMDP, Observer] | None = None

    def check(self, mdp: DecodingMDP) -> None:
        """Compare with the MDP that Q is about to be used in, as far as it is known what it was trained on.

        Raises:
            CheckpointError: The network belongs to another model, k or observation layout.
        """
        if self.spec is not None:
            self.spec.check(mdp)

    def values(self, mdp: DecodingMDP, prompts: Sequence[Prompt], nodes: IntArray) -> Values:
        """Return the estimated best return through each edge, φ(s) added back, float64 [n, k].

        Raises:
            CheckpointError: The network belongs to another model, k or observation layout.
        """
        if self._observer is None or self._observer[0] is not mdp:
            self.check(mdp)
            self._observer = mdp, Observer(mdp, self.candidate_dims)
        potential = mdp.potential(prompts, nodes)
        observation = self._observer[1].observe(potential, nodes)
        device = next(self.network.parameters()).device
        self.network.train(False)
        with torch.inference_mode():
            q = self.network({key: torch.from_numpy(value).to(device) for key, value in observation.items()})
        values: Values = q.double().cpu().numpy()
        # In float64, as J is: the observation's float32 potential would round the sum.
        return values + potential[:, None] if self.shaped else values

    def __repr__(self) -> str:
        """Name the model and the action count."""
        return f"QFunction({self.spec})"


class _QuantileMean(torch.nn.Module):
    """Mean over a quantile network's quantiles [n, quantiles, k]."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, observation: dict[str, torch.Tensor]) -> torch.Tensor:
        mean: torch.Tensor = self.network(observation).mean(dim=1)
        return mean


def pretrained_names() -> list[str]:
    """Return the tasks that the package ships a Q-function for."""
    return sorted(path.name for path in _PRETRAINED.glob("*") if (path / "config.json").is_file())


def as_q_function(q: Any) -> QFunction:
    """Return ``q`` as a :class:`QFunction`.

    Args:
        q: A :class:`QFunction`, an agent with a Q-network, the folder of a checkpoint, or the name of a shipped one.

    Raises:
        CheckpointError: The checkpoint is broken.
        UnknownNameError: There is no such folder or name.
        ConfigurationError: ``q`` is none of these.
    """
    from .checkpoints import load_q_function

    if isinstance(q, QFunction):
        return q
    if isinstance(q, (str, Path)):
        # `qstar train --out RUN` leaves RUN/q, and RUN/checkpoint while it is still training.
        for folder in (_PRETRAINED / str(q), Path(q), Path(q) / "q", Path(q) / "checkpoint"):
            if (folder / "config.json").is_file():
                return load_q_function(folder)
        raise UnknownNameError("checkpoint", str(q), pretrained_names(), "The folder of a saved one works too.")
    if callable(own := getattr(q, "q_function", None)):
        made = own()
        assert isinstance(made, QFunction)
        return made
    return _of_sb3_agent(q)


def _of_sb3_agent(agent: Any) -> QFunction:
    """Take the Q-network out of a DQN or QR-DQN, and the rest out of the environment it was trained on."""
    network = getattr(agent, "q_net", None)
    if network is None and (quantiles := getattr(agent, "quantile_net", None)) is not None:
        network = _QuantileMean(quantiles)
    spaces = getattr(getattr(agent, "observation_space", None), "spaces", {})
    if network is None or "candidates" not in spaces:
        raise ConfigurationError(
            "a Q-heuristic needs an agent with a Q-network trained on TokenDecoding-v0 (DQN, QR-DQN, QStar), "
            f"a QFunction or a checkpoint; got {type(agent).__name__}"
        )
    env = agent.get_env()
    # An agent loaded without its environment was, by default, trained with shaping.
    shaped = True if env is None else bool(env.get_attr("shaping")[0])
    dims = int(spaces["candidates"].shape[0]) // int(agent.action_space.n)
    spec = None if env is None else QSpec.of(env.get_attr("mdp")[0], dims, shaped)
    return QFunction(network, spec, shaped, dims)
