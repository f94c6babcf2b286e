"""Learned values as the planner uses them: from nodes of the token tree to numbers, whoever learned them."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from ...envs import DecodingMDP, Observer, Prompt
from ...envs.mdp import mdp_of
from ...envs.observations import token_features
from ...errors import CheckpointError, ConfigurationError
from ..search.state import IntArray, Values

__all__ = [
    "PRETRAINED",
    "QFunction",
    "QSpec",
    "QuantileMean",
    "ValueFunction",
    "as_q_function",
    "as_value_function",
    "pretrained_names",
]

PRETRAINED = Path(__file__).parent / "pretrained"

# Root mean square by which token features, themselves of size 1, may differ. Measured on the embedded model: rounding
# its embeddings to 4 bits changes them by 0.13, so another file of the same model will do; another projection by 1.4.
_FEATURE_TOLERANCE = 0.5


@dataclass(frozen=True)
class QSpec:
    """What a learned function was trained on; it means nothing elsewhere.

    Attributes:
        model: Name of the language model; None if that is not known.
        top_k: Number of actions.
        hidden_size: Width of the hidden state.
        candidate_dims: Numbers per candidate token in the observation.
        shaped: Whether it estimates the return less φ(s).
        features: A sample of the candidate tokens' features. A model keeps its name when its weights are replaced, and
            the features rest on a stream of random numbers besides; if either changes, Q misreads every candidate.
            Empty if not known.
        hidden_layers: The layers whose states the hidden state holds beside the last one's; None if that is not known.
    """

    model: str | None
    top_k: int
    hidden_size: int
    candidate_dims: int
    shaped: bool
    features: tuple[float, ...] = ()
    hidden_layers: tuple[int, ...] | None = ()

    @classmethod
    def of(cls, mdp: DecodingMDP, candidate_dims: int, shaped: bool) -> Self:
        """Return the spec of a function learned in ``mdp``."""
        model = mdp.model
        sample = token_features(model, candidate_dims)[np.linspace(0, model.vocab_size - 1, 4).astype(int), :4]
        features = tuple(round(float(x), 3) for x in sample.ravel())
        return cls(
            model.name, mdp.top_k, model.hidden_size, candidate_dims, shaped, features, tuple(model.hidden_layers)
        )

    def check(self, mdp: DecodingMDP) -> None:
        """Compare with the MDP that the function is about to be used in, as far as both are known.

        Raises:
            CheckpointError: It has another model, k or hidden state, or gives tokens other features.
        """
        spec = QSpec.of(mdp, self.candidate_dims, self.shaped)
        trained, here = asdict(self), asdict(spec)
        differences = [
            f"{name} {trained[name]!r} (trained) against {here[name]!r} (here)"
            for name in ("model", "top_k", "hidden_size", "hidden_layers")
            if trained[name] not in (None, here[name])
        ]
        if not differences and self.features:
            distance = np.sqrt(np.mean(np.square(np.subtract(self.features, spec.features))))
            if distance > _FEATURE_TOLERANCE:
                differences.append(f"{mdp.model.name!r} with other token embeddings, or projected otherwise")
        if differences:
            raise CheckpointError(
                f"this Q-function was trained for something else: {'; '.join(differences)}. "
                "Use the env arguments it was trained with, or train one for these"
            )


@dataclass
class LearnedFunction:
    """A network with what is needed to apply it to nodes of the token tree.

    Attributes:
        network: Takes observations, a dict of tensors.
        spec: What it was trained on; None skips the check.
        shaped: Whether it estimates the return less φ(s).
        candidate_dims: Numbers per candidate token in the observation.
        description: What the checkpoint says of itself: command, seed, figures.
    """

    network: torch.nn.Module
    spec: QSpec | None
    shaped: bool
    candidate_dims: int
    description: dict[str, Any] = field(default_factory=dict)
    _observer: tuple[DecodingMDP, Observer] | None = field(default=None, repr=False)

    def check(self, mdp: DecodingMDP) -> None:
        """Compare with the MDP that it is about to be used in, as far as it is known what it was trained on.

        Raises:
            CheckpointError: The network belongs to another model, k or observation layout.
        """
        if self.spec is not None:
            self.spec.check(mdp)

    def _observe(
        self, mdp: DecodingMDP, prompts: Sequence[Prompt], nodes: IntArray
    ) -> tuple[dict[str, torch.Tensor], Values]:
        """Return what the network sees of ``n`` nodes, and what its estimates leave out: φ(s) or 0, float64 [n]."""
        if self._observer is None or self._observer[0] is not mdp:
            self.check(mdp)
            self._observer = mdp, Observer(mdp, self.candidate_dims)
        potential = mdp.potential(prompts, nodes)
        observation = self._observer[1].observe(potential, nodes)
        device = next(self.network.parameters()).device
        self.network.train(False)
        tensors = {key: torch.from_numpy(value).to(device) for key, value in observation.items()}
        return tensors, potential if self.shaped else np.zeros_like(potential)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle everything but the observer, which has this process's MDP; on the CPU, which every machine has."""
        network = self.network
        if any(parameter.device.type != "cpu" for parameter in network.parameters()):
            network = copy.deepcopy(network).cpu()
        return {**vars(self), "network": network, "_observer": None}

    def __repr__(self) -> str:
        """Name the model and the action count."""
        return f"{type(self).__name__}({self.spec})"


@dataclass(repr=False)
class QFunction(LearnedFunction):
    """A Q-network, observations in, Q-values [n, k] out, with what is needed to apply it."""

    @classmethod
    def from_pretrained(cls, name: str | Path, env: Any = None) -> QFunction:
        """Return a saved Q-function; nothing is unpickled.

        Args:
            name: The folder of a checkpoint, the name of a task that the package ships one for, or a repository
                ``"user/name"`` on the Hugging Face hub that holds a checkpoint's files.
            env: An environment or a :class:`DecodingMDP` that it must fit; None leaves that check to its first use.

        Raises:
            UnknownNameError: There is no such folder or task.
            CheckpointError: The checkpoint is broken, cannot be downloaded, or does not fit ``env``.
        """
        from .checkpoints import load_q_function, locate_checkpoint

        q = load_q_function(locate_checkpoint(name))
        if env is not None:
            q.check(mdp_of(env))
        return q

    def save(self, folder: str | Path, **description: Any) -> None:
        """Write it into ``folder``, atomically, as safetensors and JSON; an older checkpoint there is replaced.

        Args:
            folder: Where to; :meth:`from_pretrained` reads it, and its files make a repository on the hub.
            description: What the checkpoint should say of itself (seed, figures, …), JSON values; by default what it
                says already.

        Raises:
            ConfigurationError: The network is not that of a TokenQPolicy, it is not known what it was trained on, or
                ``folder`` holds something else than a checkpoint.
        """
        from .checkpoints import save_q_function

        save_q_function(self, Path(folder), description or self.description)

    def push_to_hub(
        self,
        repository: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        message: str = "Upload a Q-function",
        **description: Any,
    ) -> str:
        """Upload it to the Hugging Face hub, with a model card; ``from_pretrained(repository)`` has it back.

        Args:
            repository: ``"user/name"``; made if there is none.
            private: Whether a new repository is private; None is the account's own setting.
            token: Instead of the one that ``hf auth login`` has stored.
            message: Of the commit.
            description: See :meth:`save`; the card shows it.

        Returns:
            The repository's address.

        Raises:
            ConfigurationError: ``repository`` is no such name, or see :meth:`save`.
            CheckpointError: The hub cannot be reached, or does not let us.
        """
        from .hub import push_folder

        write = partial(self.save, **description)
        return push_folder(repository, write, private=private, token=token, message=message)

    def fingerprint(self) -> str:
        """Return a digest of the weights, by which one Q-function is told from another."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.network.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def values(self, mdp: DecodingMDP, prompts: Sequence[Prompt], nodes: IntArray) -> Values:
        """Return the estimated best return through each edge, φ(s) added back, float64 [n, k].

        Raises:
            CheckpointError: The network belongs to another model, k or observation layout.
        """
        observation, left_out = self._observe(mdp, prompts, nodes)
        with torch.inference_mode():
            q: Values = self.network(observation).double().cpu().numpy()
        # In float64, as J is: the observation's float32 potential would round the sum.
        return q + left_out[:, None]


@dataclass(repr=False)
class ValueFunction(LearnedFunction):
    """An actor-critic's policy (``predict_values`` and ``get_distribution``), with what is needed to apply it."""

    def values(self, mdp: DecodingMDP, prompts: Sequence[Prompt], nodes: IntArray) -> tuple[Values, Values]:
        """Return V(s), φ(s) added back, float64 [n], and log π_θ(a | s), nats, float64 [n, k], masked actions included.

        Raises:
            CheckpointError: The network belongs to another model, k or observation layout.
        """
        observation, left_out = self._observe(mdp, prompts, nodes)
        policy: Any = self.network
        with torch.inference_mode():
            v = policy.predict_values(observation).squeeze(1)
            logprobs = policy.get_distribution(observation).distribution.logits  # normalised, in torch's Categorical
        return v.double().cpu().numpy() + left_out, logprobs.double().cpu().numpy()


class QuantileMean(torch.nn.Module):
    """Q-values [n, k] out of a quantile network: the means of its quantiles [n, quantiles, k]."""

    def __init__(self, network: torch.nn.Module) -> None:
        """Wrap ``network``."""
        super().__init__()
        self.network = network

    def forward(self, observation: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return Q-values, float [n, k]."""
        mean: torch.Tensor = self.network(observation).mean(dim=1)
        return mean


def pretrained_names() -> list[str]:
    """Return the tasks that the package ships a Q-function for."""
    return sorted(path.name for path in PRETRAINED.glob("*") if (path / "config.json").is_file())


def as_q_function(q: Any) -> QFunction:
    """Return ``q`` as a :class:`QFunction`.

    Args:
        q: A :class:`QFunction`, an agent with a Q-network, or what :meth:`QFunction.from_pretrained` takes: the folder
            of a checkpoint, the name of a shipped one, or a repository on the Hugging Face hub.

    Raises:
        CheckpointError: The checkpoint is broken, or cannot be downloaded.
        UnknownNameError: There is no such folder or name.
        ConfigurationError: ``q`` is none of these.
    """
    if isinstance(q, QFunction):
        return q
    if isinstance(q, (str, Path)):
        return QFunction.from_pretrained(q)
    if callable(own := getattr(q, "q_function", None)):
        made = own()
        assert isinstance(made, QFunction)
        return made
    network = getattr(q, "q_net", None)
    if network is None and (quantiles := getattr(q, "quantile_net", None)) is not None:
        network = QuantileMean(quantiles)
    if network is None or not _sees_tokens(q):
        raise ConfigurationError(
            "a Q-heuristic needs an agent with a Q-network trained on TokenDecoding-v0 (DQN, QR-DQN, QStar), "
            f"a QFunction or a checkpoint; got {type(q).__name__}"
        )
    spec = _trained_on(q)
    return QFunction(network, spec, spec.shaped, spec.candidate_dims)


def as_value_function(agent: Any) -> ValueFunction:
    """Return the critic and the policy of an actor-critic agent, ready to be applied.

    Raises:
        ConfigurationError: The agent has no state-value, needs a memory of earlier states, or was not trained on
            ``TokenDecoding-v0`` or only on a normalised copy of it.
    """
    policy: Any = getattr(agent, "policy", None)
    is_critic = all(callable(getattr(policy, name, None)) for name in ("predict_values", "get_distribution"))
    if not is_critic or hasattr(policy, "lstm_actor") or not _sees_tokens(agent):
        raise ConfigurationError(
            "a value heuristic needs an actor-critic agent without recurrence, trained on TokenDecoding-v0 "
            f"(PPO, A2C, MaskablePPO); got {type(agent).__name__}"
        )
    spec = _trained_on(agent)
    return ValueFunction(policy, spec, spec.shaped, spec.candidate_dims)


def _sees_tokens(agent: Any) -> bool:
    return "candidates" in getattr(getattr(agent, "observation_space", None), "spaces", {})


def _trained_on(agent: Any) -> QSpec:
    """Return what an agent of stable-baselines3 was trained on, as far as it and its environment tell."""
    if agent.get_vec_normalize_env() is not None:
        raise ConfigurationError(
            "the agent was trained behind VecNormalize: its values are in other units than J, and it knows other "
            "observations; train it without (observations and rewards of TokenDecoding-v0 are of order 1 already)"
        )
    spaces, k = agent.observation_space.spaces, int(agent.action_space.n)
    dims = int(spaces["candidates"].shape[0]) // k
    env = agent.get_env()
    if env is None:
        # Loaded without its environment. By default that has shaping.
        return QSpec(None, k, int(spaces["hidden"].shape[0]), dims, shaped=True, hidden_layers=None)
    return QSpec.of(env.get_attr("mdp")[0], dims, bool(env.get_attr("shaping")[0]))
