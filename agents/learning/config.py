"""Settings of QStar, and the state of its training as a checkpoint holds it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import gymnasium as gym
from pydantic import Field
from safetensors.numpy import load_file as load_arrays
from safetensors.torch import load_file
from stable_baselines3.common.type_aliases import Schedule
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv
from torch import Tensor

from ...checks import check_choice, check_flag, check_integer, check_keywords, check_number
from ...envs.mdp import DecodingMDP, mdp_of
from ...errors import CheckpointError, ConfigurationError
from ..search.problem import Score
from .checkpoints import EXPERIENCE, OPTIMIZER, STATE, read_json, wrap_damage
from .policies import TokenQPolicy

__all__ = [
    "RUNTIME",
    "CollectConfig",
    "QStarConfig",
    "Regression",
    "SavedTraining",
    "TrainingState",
    "check_env",
    "check_policy",
    "check_terms",
    "setting_names",
]

# Arguments of the constructor beside the settings.
RUNTIME = {"policy", "env", "config", "workers", "tensorboard_log", "verbose", "device", "_init_setup_model"}

_MOST = 2**31 - 1

Regression = Literal["expectile", "quantile"]


@dataclass(frozen=True, kw_only=True)
class CollectConfig:
    """Settings of the searches that collect experience.

    Attributes:
        tokens_per_search: LM-token budget of each search.
        width: Width of the first round of each search; see :class:`AStarPlanner`. 1 follows arg max Q to the end
            first, so that Q learns where it leads.
        margin: How far f may be below the incumbent before an edge is put off; see :class:`AStarPlanner`.
        score: ``"reward"``: the search prunes by the best return found. ``"q"``: by Q alone, as a planner without a
            reward at hand will; its texts are scored afterwards. See :class:`Decoder`.
        noise: Scale of the Gumbel noise added to Q in half of the searches, in units of J. The other half searches as
            the planner will, so that Q learns from its own mistakes.
        q_free_share: Share of the searches that follow log-prob and potential instead of Q.
        bound_share: Share of the prompts that A* on the reward's bound searches, whatever ``score`` is. With a checker
            whose bounds tell a wrong beginning (``exact_answer``, ``countdown``) it walks straight to a right answer.
            So each such prompt shows what is right, for a few LM tokens.
        bound_targets: Whether the reward's bounds of prefixes are targets, too: they lower Q and never raise it, as
            estimates do. A state then teaches all its edges instead of those that were followed.
        episode_share: Share of the prompts that get ε-greedy episodes of the same budget instead of a search.
        epsilon: ε of these episodes.
    """

    tokens_per_search: int = 96
    width: int = 1
    margin: float = 0.05
    score: Score = "reward"
    noise: float = 0.05
    q_free_share: float = 0.1
    bound_share: float = 0.0
    bound_targets: bool = False
    episode_share: float = 0.0
    epsilon: float = 0.2

    def __post_init__(self) -> None:
        check_integer("tokens_per_search", self.tokens_per_search, high=_MOST)
        check_integer("width", self.width, high=_MOST)
        check_choice("score", self.score, get_args(Score))
        if self.margin != math.inf:
            check_number("margin", self.margin, low=0)
        check_number("noise", self.noise, low=0)
        for name in ("q_free_share", "bound_share", "episode_share", "epsilon"):
            check_number(name, getattr(self, name), low=0, high=1)
        check_flag("bound_targets", self.bound_targets)


@dataclass(frozen=True, kw_only=True)
class QStarConfig(CollectConfig):
    """Settings of :class:`QStar`, which takes each as a keyword too; those of the searches are inherited.

    Attributes:
        learning_rate: Of Adam; a number, a pair (start, end) to go from one to the other linearly, or a schedule of the
            progress remaining (1 to 0).
        batch_size: Transitions per gradient step, each with all its explored edges.
        gradient_steps: Gradient steps after each round.
        searches_per_round: Prompts searched together in one tree.
        regression: ``"expectile"`` weighs squared errors, ``"quantile"`` absolute ones; see :func:`asymmetric_loss`.
        optimism: τ in (0, 1), the expectile or quantile: 0.5 weighs errors of both signs alike, 1 is the maximum.
        estimate_weight: Weight of an error by which Q exceeds the estimate where a search broke off. Estimates never
            raise Q. A larger weight teaches Q to avoid what it cannot finish: fewer steps to a good search, a more
            timid arg max.
        priority: Exponent of prioritised replay (Schaul et al. 2016): states are drawn in proportion to their last
            error to this power, 0 uniformly. No importance weights: the targets are not random. Pays where few states
            matter, for example when one answer in many is right.
        buffer_bytes: Memory for experience.
        policy_kwargs: Of the policy: ``width``, ``dropout`` (0.4 unless given: a few hundred prompts are easily learnt
            by heart), ``dueling``, and ``heads``, the size of an ensemble whose largest output counts.
        seed: Of the network, the prompts' order and the noise.
    """

    learning_rate: float | tuple[float, float] | Schedule = (1e-3, 1e-4)
    batch_size: int = 256
    gradient_steps: int = 96
    searches_per_round: int = 32
    regression: Regression = "expectile"
    optimism: float = 0.8
    estimate_weight: float = 0.2
    priority: float = 0.0
    buffer_bytes: int = 1 << 29
    policy_kwargs: dict[str, Any] | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("batch_size", "gradient_steps", "searches_per_round"):
            check_integer(name, getattr(self, name), high=_MOST)
        check_integer("buffer_bytes", self.buffer_bytes, high=2**62)
        for name, most in {"estimate_weight": math.inf, "priority": 10.0}.items():
            check_number(name, getattr(self, name), low=0, high=most)
        check_choice("regression", self.regression, get_args(Regression))
        if not 0 < check_number("optimism", self.optimism, low=0, high=1) < 1:
            raise ConfigurationError(f"optimism is above 0 and below 1, got {self.optimism!r}")
        if self.seed is not None:
            check_integer("seed", self.seed, low=0, high=2**32 - 1)
        rate: Any = self.learning_rate
        pair = isinstance(rate, list | tuple)
        if pair and len(rate) != 2:
            raise ConfigurationError(f"learning_rate is a number, a pair (start, end) or a schedule, got {rate!r}")
        for value in rate if pair else () if callable(rate) else (rate,):
            check_number("learning_rate", value, low=0)
        if not isinstance(self.policy_kwargs, dict | None):
            raise ConfigurationError(f"policy_kwargs is a dict, got {self.policy_kwargs!r}")

    @classmethod
    def of(cls, settings: Mapping[str, Any], config: Self | None = None) -> Self:
        """Return a config with settings of another one, or of the defaults, replaced.

        Raises:
            ConfigurationError: There is no such setting, or a value is out of range.
        """
        check_keywords("QStar", settings, {*setting_names(cls), *RUNTIME} - (RUNTIME & settings.keys()))
        return replace(config or cls(), **settings)

    def schedule(self) -> float | Schedule:
        """Return the learning rate as stable-baselines3 takes it."""
        if isinstance(self.learning_rate, list | tuple):
            return LinearSchedule(*self.learning_rate, end_fraction=1.0)
        return self.learning_rate

    def as_json(self) -> dict[str, Any]:
        """Return the settings as JSON values; a learning rate that is a function is left out."""
        values = {name: getattr(self, name) for name in setting_names(self)}
        return {name: value for name, value in values.items() if not callable(value)}


def setting_names(config: Any) -> set[str]:
    """Return the names of a config's fields."""
    return {f.name for f in fields(config)}


def check_policy(policy: Any, policy_kwargs: Mapping[str, Any]) -> None:
    """Check the class of a policy, and the names of its arguments.

    Raises:
        ConfigurationError: One is wrong.
    """
    if policy == "TokenQPolicy":
        policy = TokenQPolicy
    if not (isinstance(policy, type) and issubclass(policy, TokenQPolicy)):
        got = repr(policy) if isinstance(policy, str | type) else f"a {type(policy).__name__}"
        raise ConfigurationError(f"QStar's policy is TokenQPolicy or a subclass, got {got}; write QStar(env=env, …)")
    makers = [vars(cls)["__init__"] for cls in policy.__mro__ if "__init__" in vars(cls)]
    known = {name for make in makers for name in inspect.signature(make).parameters}
    given = {"self", "args", "kwargs", "observation_space", "action_space", "lr_schedule"}
    check_keywords("policy_kwargs", policy_kwargs, known - given)


def check_env(env: Any) -> None:
    """Refuse other things than environments, other environments, and wrappers that change J.

    Raises:
        ConfigurationError: ``env`` is one of these.
    """
    if not isinstance(env, gym.Env | VecEnv | str):
        got = "none" if env is None else f"a {type(env).__name__}"
        raise ConfigurationError(
            f"QStar needs TokenDecoding-v0 as made by gym.make, a VecEnv of stable-baselines3, or a name; got {got}: "
            "give env=…"
        )
    if isinstance(env, VecEnv) and isinstance(env.unwrapped, SubprocVecEnv):
        raise ConfigurationError(
            "QStar searches in this process, and a SubprocVecEnv has its environments in others; give "
            "TokenDecodingVecEnv or DummyVecEnv, and workers=… to search in other processes"
        )
    if not isinstance(env, str):
        mdp_of(env)


def check_terms(config: QStarConfig, terms: Mapping[str, float]) -> None:
    """Check the settings that depend on whether an environment observes the terms of its reward.

    Raises:
        ConfigurationError: One contradicts it.
    """
    if terms and config.bound_targets:
        raise ConfigurationError(
            "bound_targets bounds the reward as a whole and says nothing of its terms; leave it out, or make the "
            "environment without components=True"
        )


def objective_of(mdp: DecodingMDP) -> dict[str, Any]:
    """Return what the values that Q learns in ``mdp`` are made of, as a checkpoint's description states it."""
    return {"reward": mdp.reward.name, "logprob_weight": mdp.logprob_weight}


def check_objective(folder: Path, description: Mapping[str, Any], mdp: DecodingMDP, advice: str) -> None:
    """Compare the objective of a checkpoint's description, where it states one, with that of ``mdp``.

    Raises:
        CheckpointError: Q learned from values of another objective there.
    """
    there = description.get("objective")
    known = there if isinstance(there, Mapping) else {}  # an older one, or of Q alone
    different = [
        f"{name} {known[name]!r} (learned) against {value!r} (here)"
        for name, value in objective_of(mdp).items()
        if known.get(name, value) != value
    ]
    if different:
        raise CheckpointError(f"{folder} learned another objective: {', '.join(different)}. {advice}")


_Count = Annotated[int, Field(ge=0, lt=2**62)]


@dataclass(frozen=True)
class TrainingState:
    """The content of ``training_state.json``."""

    arguments: QStarConfig
    num_timesteps: _Count
    total_timesteps: _Count
    n_updates: _Count
    episodes: _Count
    position: _Count
    queue: list[_Count]
    optimizer_steps: dict[str, Annotated[float, Field(ge=1, lt=2**62)]]
    numpy_rng: dict[str, int | str | dict[str, int]]
    torch_rng: list[Annotated[int, Field(ge=0, le=255)]]


@dataclass(frozen=True)
class SavedTraining:
    """Training state, experience and optimiser of a checkpoint."""

    state: TrainingState
    experience: dict[str, Any]
    optimizer: dict[str, Tensor]

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Return them; None where only Q was saved."""
        if not (folder / STATE).is_file():
            return None
        state = read_json(folder / STATE, TrainingState)
        with wrap_damage(folder):
            return cls(state, load_arrays(folder / EXPERIENCE), load_file(folder / OPTIMIZER))
