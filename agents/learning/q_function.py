"""Learned functions applied to nodes of the token tree: Q-functions, which save themselves, and critics."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from safetensors.numpy import load_file, save_file

from ...envs import DecodingMDP, Observer, Prompt
from ...envs.mdp import mdp_of
from ...envs.observations import Observation, token_features
from ...errors import CheckpointError, ConfigurationError
from ...rewards.composition import term_weights
from ..search.state import IntArray, Values
from .checkpoints import CONFIG, WEIGHTS, locate_checkpoint, read_json, read_whole, replacing, wrap_damage
from .hub import push_folder
from .inference import NumpyScorer, ScorerConfig

if TYPE_CHECKING:
    import torch

    from .scorer import TokenScorer

__all__ = [
    "QFunction",
    "QSpec",
    "load_q_function",
]

_FORMAT = 1

# Root mean square by which token features, themselves of size 1, may differ. Measured on the embedded model: rounding
# its embeddings to 4 bits changes them by 0.13, so another file of the same model will do; another projection by 1.4.
_FEATURE_TOLERANCE = 0.5


@dataclass(frozen=True)
class QSpec:
    """Model, actions and observations that a learned function was trained on; elsewhere its values mean nothing.

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
        context_tokens: Number of last tokens in the observation.
        terms: The terms of the reward that have heads of their own, with the weights that they had in training.
        action: What an action is, ``"token"`` or ``"step"``; None if that is not known.
    """

    model: str | None
    top_k: int
    hidden_size: int
    candidate_dims: int
    shaped: bool
    features: tuple[float, ...] = ()
    hidden_layers: tuple[int, ...] | None = ()
    context_tokens: int = 0
    terms: dict[str, float] = field(default_factory=dict)
    action: str | None = "token"

    @classmethod
    def of(
        cls,
        mdp: DecodingMDP,
        candidate_dims: int,
        shaped: bool,
        context_tokens: int = 0,
        terms: Mapping[str, float] = MappingProxyType({}),
    ) -> Self:
        """Return the spec of a function learned in ``mdp``."""
        model = mdp.model.reader  # what it reads, not what proposes
        sample = token_features(model, candidate_dims)[np.linspace(0, model.vocab_size - 1, 4).astype(int), :4]
        features = tuple(round(float(x), 3) for x in sample.ravel())
        return cls(
            model.name,
            mdp.top_k,
            model.hidden_size,
            candidate_dims,
            shaped,
            features,
            tuple(model.hidden_layers),
            context_tokens,
            dict(terms),
            mdp.action,
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
            for name in ("model", "action", "top_k", "hidden_size", "hidden_layers")
            if trained[name] not in (None, here[name])
        ]
        if not differences and self.features:
            same_length = len(self.features) == len(spec.features)
            apart = np.subtract(self.features, spec.features) if same_length else np.inf
            distance = np.sqrt(np.mean(np.square(apart)))
            if not distance <= _FEATURE_TOLERANCE:
                differences.append(f"{mdp.model.name!r} with other token embeddings, or projected otherwise")
        if differences:
            raise CheckpointError(
                f"this Q-function was trained for something else: {'; '.join(differences)}. "
                "Use the env arguments it was trained with, or train one for these"
            )


@dataclass
class LearnedFunction:
    """A network that can be applied to nodes of the token tree.

    Attributes:
        network: An agent's takes observations as a dict of tensors, a loaded one as a dict of arrays.
        spec: Its origin; None skips the check.
        shaped: Whether it estimates the return less φ(s).
        candidate_dims: Numbers per candidate token in the observation.
        description: Origin and figures, as its checkpoint states them: command, seed, ….
    """

    network: torch.nn.Module | NumpyScorer
    spec: QSpec | None
    shaped: bool
    candidate_dims: int
    description: dict[str, Any] = field(default_factory=dict)
    _observer: tuple[DecodingMDP, Observer] | None = field(default=None, repr=False)

    def check(self, mdp: DecodingMDP) -> None:
        """Compare with the MDP that it is about to be used in, as far as its origin is known.

        Raises:
            CheckpointError: The network belongs to another model, k or observation layout.
        """
        if self.spec is not None:
            self.spec.check(mdp)

    def observer(self, mdp: DecodingMDP) -> Observer:
        """Return what describes the states of ``mdp`` as the network wants them; made anew for another MDP only.

        Raises:
            CheckpointError: See :meth:`check`.
        """
        if self._observer is None or self._observer[0] is not mdp:
            self.check(mdp)
            further = (self.spec.context_tokens, self.spec.terms) if self.spec else ()
            self._observer = mdp, Observer(mdp, self.candidate_dims, *further)
        return self._observer[1]

    def _observe(
        self, mdp: DecodingMDP, prompts: Sequence[Prompt], nodes: IntArray, term_potentials: Values | None = None
    ) -> tuple[Observation, Values]:
        """Return observations of ``n`` nodes, and the part that the estimates leave out: φ(s) or 0, float64 [n]."""
        observer, potential = self.observer(mdp), mdp.potential(prompts, nodes)
        if term_potentials is None:
            term_potentials = observer.term_potentials(prompts, nodes)
        observation = observer.observe(potential, nodes, term_potentials)
        return observation, potential if self.shaped else np.zeros_like(potential)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle everything but the observer, which has this process's MDP, with the network on the CPU."""
        network = self.network
        if not isinstance(network, NumpyScorer) and any(p.device.type != "cpu" for p in network.parameters()):
            network = copy.deepcopy(network).cpu()
        return {**vars(self), "network": network, "_observer": None}

    def __repr__(self) -> str:
        """Name the model and the action count."""
        return f"{type(self).__name__}({self.spec})"


@dataclass(repr=False)
class QFunction(LearnedFunction):
    """A Q-network, observations in, Q-values [n, k] out, that can be applied to nodes, saved and loaded."""

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
        q = load_q_function(locate_checkpoint(name))
        if env is not None:
            q.check(mdp_of(env))
        return q

    def save(self, folder: str | Path, **description: Any) -> None:
        """Write it into ``folder``, atomically, as safetensors and JSON; an older checkpoint there is replaced.

        Args:
            folder: The folder; :meth:`from_pretrained` reads it, and its files make a repository on the hub.
            description: Origin and figures (seed, …), JSON values; by default those that it has already.

        Raises:
            ConfigurationError: The network is not that of a TokenQPolicy, its origin is not known, or ``folder`` holds
                something else than a checkpoint.
        """
        with replacing(Path(folder)) as new:
            self.write(new, description or self.description)

    def write(self, folder: Path, description: Mapping[str, Any]) -> None:
        """Write weights and ``config.json`` into an empty folder; see :meth:`save`."""
        config = self.config(description)
        weights = self.inference_scorer().weights
        save_file({name: np.ascontiguousarray(array) for name, array in weights.items()}, folder / WEIGHTS)
        (folder / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def config(self, description: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the content of ``config.json``, with another description if one is given.

        Raises:
            ConfigurationError: The network is not that of a TokenQPolicy, or its origin is not known.
        """
        scorer = self.inference_scorer()
        if self.spec is None or self.spec.model is None:
            raise ConfigurationError(
                "a checkpoint states its model, and that of this Q-function is not known; "
                "load the agent with its environment: DQN.load(path, env)"
            )
        description = dict(self.description if description is None else description)
        trained_on, network = asdict(self.spec), asdict(scorer.config)
        for settings in (trained_on, network):  # so that earlier versions can read it
            for name in ("context_tokens", "terms"):
                if not settings.get(name, True):
                    del settings[name]
        if self.spec.action == "token":
            del trained_on["action"]
        return {
            "format": _FORMAT,
            "trained_on": trained_on,
            "network": network,
            "description": description,
        }

    @property
    def scorer(self) -> TokenScorer:
        """The scorer inside the agent's network, a module of torch; a new one with the weights of a loaded Q-function.

        Raises:
            ConfigurationError: The network is another one.
        """
        from .scorer import QuantileMean, TokenScorer

        if isinstance(self.network, NumpyScorer):
            return TokenScorer.of(self.network)
        network: Any = self.network.network if isinstance(self.network, QuantileMean) else self.network
        scorer = getattr(network, "scorer", network)
        if not isinstance(scorer, TokenScorer):
            raise ConfigurationError(
                f"only the network of a TokenQPolicy can be written, not {type(scorer).__name__}; train with "
                "TokenQPolicy, or use the save() of stable-baselines3"
            )
        return scorer

    def inference_scorer(self) -> NumpyScorer:
        """Return the scorer in numpy, with the weights that it has now.

        Raises:
            ConfigurationError: The network is not that of a TokenQPolicy.
        """
        return self.network if isinstance(self.network, NumpyScorer) else self.scorer.to_numpy()

    def check_env(self, env: Any) -> None:
        """Compare with an agent's environment, its observations included.

        Raises:
            CheckpointError: The Q-function was trained for something else.
        """
        mdp = mdp_of(env)
        self.check(mdp)
        dims = env.observation_space["candidates"].shape[0] // mdp.top_k
        context = env.observation_space.spaces.get("context")
        here: dict[str, Any] = {"candidate_dims": dims, "context_tokens": context.shape[0] // dims if context else 0}
        here["terms"] = [*observed_terms(env)]
        trained: dict[str, Any] = {"candidate_dims": self.candidate_dims}
        trained["context_tokens"] = self.inference_scorer().config.context_tokens
        trained["terms"] = [*self.spec.terms] if self.spec else here["terms"]
        for name, value in here.items():
            if value != trained[name]:
                raise CheckpointError(
                    f"this Q-function was trained with {name}={trained[name]}, the environment has {value}; "
                    "use the env arguments it was trained with"
                )

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
        write = partial(self.save, **description)
        return push_folder(repository, write, private=private, token=token, message=message)

    def fingerprint(self) -> str:
        """Return a digest of the weights."""
        digest = hashlib.sha256()
        network = self.network
        if isinstance(network, NumpyScorer):
            weights = network.weights
        else:
            weights = {name: tensor.cpu().numpy() for name, tensor in network.state_dict().items()}
        for name, array in sorted(weights.items()):
            digest.update(name.encode())
            digest.update(array.tobytes())
        return digest.hexdigest()[:16]

    def values(self, mdp: DecodingMDP, prompts: Sequence[Prompt], nodes: IntArray) -> Values:
        """Return the estimated best return through each edge, φ(s) added back, float64 [n, k].

        Raises:
            CheckpointError: The network belongs to another model, k or observation layout.
        """
        observation, left_out = self._observe(mdp, prompts, nodes)
        if isinstance(self.network, NumpyScorer):
            q: Values = self.network(observation).astype(np.float64)
        else:
            import torch

            with torch.inference_mode():
                q = self.network(as_tensors(observation, self.network)).double().cpu().numpy()
        # In float64, as J is: the observation's float32 potential would round the sum.
        return q + left_out[:, None]

    def returns(
        self, mdp: DecodingMDP, prompts: Sequence[Prompt], nodes: IntArray, term_potentials: Values | None = None
    ) -> Values:
        """Return the estimates that :meth:`values` weighs, float64 [n, k, 1+r], where the terms have heads.

        They are the log-probability to come, nats, and each term's value in the end, unweighted.

        Args:
            mdp: The process.
            prompts: The prompt of each node.
            nodes: int64 [n].
            term_potentials: float64 [n, r], as :meth:`Observer.term_potentials` gives it; None to compute it.

        Raises:
            CheckpointError: See :meth:`values`.
        """
        if term_potentials is None:
            term_potentials = self.observer(mdp).term_potentials(prompts, nodes)
        observation, _ = self._observe(mdp, prompts, nodes, term_potentials)
        outputs: Values = self.inference_scorer().head_outputs(observation).astype(np.float64)
        if self.shaped:
            outputs[..., 1:] += term_potentials[:, None]
        return outputs


def observed_terms(env: Any) -> dict[str, float]:
    """Return the terms of the reward that an environment observes one by one, with their weights; empty for none."""
    if "term_potentials" not in env.observation_space.spaces:
        return {}
    return term_weights(mdp_of(env).reward)


def as_tensors(observation: Observation, network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return observations on the device of a network, which is put into evaluation mode."""
    import torch

    device = next(network.parameters()).device
    network.train(False)
    return {key: torch.from_numpy(value).to(device) for key, value in observation.items()}


@dataclass(frozen=True)
class _Format:
    format: Any = None


@dataclass(frozen=True)
class _Config:
    """The content of ``config.json``."""

    trained_on: QSpec
    network: ScorerConfig
    description: dict[str, Any] = field(default_factory=dict)


def load_q_function(folder: str | Path) -> QFunction:
    """Read a Q-function, without torch.

    Raises:
        CheckpointError: The folder is not a checkpoint, is damaged, or was written by another version.
    """
    return read_whole(Path(folder), read_q_function)


def read_q_function(folder: Path) -> QFunction:
    """Read a Q-function from a folder that no other process is replacing; see :func:`load_q_function`."""
    found = read_json(folder / CONFIG, _Format).format
    if found != _FORMAT:
        raise CheckpointError(
            f"{folder} has checkpoint format {found!r}, this version reads {_FORMAT}; "
            "train it again, or use the version that wrote it"
        )
    config = read_json(folder / CONFIG, _Config)
    spec, network = config.trained_on, config.network
    with wrap_damage(folder):
        if any(getattr(spec, n) != getattr(network, n) for n in ("hidden_size", "candidate_dims", "context_tokens")):
            raise CheckpointError(f"{folder / CONFIG} is damaged: the sizes of trained_on and network differ")
        if len(spec.terms) != network.terms:
            raise CheckpointError(f"{folder / CONFIG} is damaged: the terms of trained_on and network differ")
        scorer = NumpyScorer(network, load_file(folder / WEIGHTS))
    return QFunction(scorer, spec, spec.shaped, spec.candidate_dims, config.description)
