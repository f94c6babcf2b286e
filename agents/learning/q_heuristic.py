"""Agents as heuristics: Q-networks and critics, and their export to stable-baselines3."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from ...checks import check_number
from ...envs import DecodingMDP, Prompt
from ...envs.mdp import mdp_of
from ...errors import CheckpointError, ConfigurationError
from ...rewards import Reward, WeightedSum, as_reward
from ...rewards.composition import Composition, terms_of
from ..heuristics import BoundHeuristic, Composable, Heuristic
from ..search.state import IntArray, Values
from .checkpoints import pretrained_names
from .q_function import LearnedFunction, QFunction, QSpec, as_tensors, observed_terms

__all__ = [
    "QHeuristic",
    "ValueFunction",
    "ValueHeuristic",
    "as_q_function",
    "as_value_function",
    "carried_weight",
    "export_sb3",
    "shipped_heuristic",
]

_MIN_LOGPROB = -50.0  # nats; a token that the policy finds less likely is as good as impossible


class QHeuristic(Composable):
    """h = Q(s, a), learned.

    For a Q learned with reward shaping, which estimates the return less φ(s), φ(s) is added back.
    """

    def __init__(self, q: Any) -> None:
        """Use a Q-function.

        Args:
            q: An agent (QStar, or a DQN or QR-DQN of stable-baselines3 or sb3-contrib trained on
                ``TokenDecoding-v0``, masked or not), a :class:`QFunction`, the folder of a saved one, the name of a
                task that the package ships one for, or a repository ``"user/name"`` on the Hugging Face hub.

        Raises:
            CheckpointError: A checkpoint is broken, or cannot be downloaded.
            ConfigurationError: The agent has no Q-network of this environment.
            UnknownNameError: There is no such folder or task.
        """
        self.q: QFunction = as_q_function(q)

    def __call__(self, mdp: DecodingMDP, prompts: Sequence[Prompt], nodes: IntArray) -> Values:
        """See :class:`Heuristic`.

        Raises:
            CheckpointError: Q was trained for another model, k or observation layout than ``mdp`` has.
        """
        return self.q.values(mdp, prompts, nodes)

    def check(self, mdp: DecodingMDP) -> None:
        """Check that Q fits a process.

        Raises:
            CheckpointError: It was trained for another model, k or observation layout.
        """
        self.q.check(mdp)

    def describe_weights(self, mdp: DecodingMDP) -> str:
        """Return how Q's terms are weighted for the reward of ``mdp``; empty where they are as in training."""
        trained = self.q.spec.terms if self.q.spec else {}
        here = {name: term.weight for name, term in terms_of(mdp.reward).items()} if trained else {}
        if not trained or here == trained:
            return ""
        if not here.keys() & trained.keys():
            return f"Q has heads for {', '.join(trained)}, none of which is in this reward; it keeps its own weights"
        weights = ", ".join(f"{here.get(name, 0.0):g} {name} ({w:g} in training)" for name, w in trained.items())
        others = [name for name in here if name not in trained and here[name]]
        return f"Q's heads are weighted {weights}" + (f"; it has none for {', '.join(others)}" if others else "")

    def __repr__(self) -> str:
        """Return the expression that makes it."""
        return f"QHeuristic({self.q!r})"


def shipped_heuristic(task: str, mdp: DecodingMDP) -> tuple[Heuristic, str]:
    """Return the Q-function that the package ships for a task, or the bound where there is none that fits ``mdp``.

    Returns:
        The heuristic, and why the shipped Q-function does not fit; empty if it does, or if there is none.
    """
    if task not in pretrained_names():
        return BoundHeuristic(), ""
    heuristic = QHeuristic(task)
    try:
        heuristic.q.check(mdp)
    except CheckpointError as error:
        return BoundHeuristic(), str(error)
    return heuristic, ""


def carried_weight(trained: Any, reward: Any) -> float:
    """Return the weight w >= 0 with which a reward holds the one that a Q was trained for: reward = w · trained + rest.

    With w > 0 that Q says something about the new reward: its part of it, while φ(s) and bounds are the new reward's.
    It is enough that most of the trained reward is there, by the weights of its terms; w is then the least weight of
    these. A reward that is clipped or normalised counts as itself: docs/experiments.md shows that Q helps then, too.

    Args:
        trained: The reward that Q was trained for; see :func:`~qstar_decoding.rewards.as_reward`.
        reward: The new one.
    """
    old, new = (_weights(as_reward(each)) for each in (trained, reward))
    shares = {name: new.get(name, 0.0) / weight for name, weight in old.items() if weight}
    held = [name for name, share in shares.items() if share > 0]
    most = sum(abs(old[name]) for name in held) > sum(abs(old[name]) for name in shares) / 2
    return min(shares[name] for name in held) if most else 0.0


def _weights(reward: Reward) -> dict[str, float]:
    """Return the weights of a reward's terms by name, those inside of clip and normalise included."""
    weights: dict[str, float] = {}
    for weight, term in reward.terms if isinstance(reward, WeightedSum) else [(1.0, reward)]:
        inner = _weights(term.parts[0]) if isinstance(term, Composition) and len(term.parts) == 1 else {term.name: 1.0}
        for name, share in inner.items():
            weights[name] = weights.get(name, 0.0) + weight * share
    return weights


class ValueHeuristic(Composable):
    """h(s, a) = V(s) + β · (log π_θ(a | s) - max over a' of log π_θ(a' | s)), from an actor-critic such as PPO.

    A state-value does not tell edges apart, and the values of all children would cost a forward of the language model
    each. The evaluation is deferred instead: every edge gets the value of the state that it leaves (Richter & Helmert
    2009, "Preferred operators and deferred evaluation in satisficing planning"). The policy's preference is added, so
    that its favourite comes first. For the optimal policy under an entropy bonus of weight β this is exact:
    Q(s, a) - max Q = β · (log π - max log π). PPO normalises its advantages and does not reach that policy, so β is
    chosen by measurement. PPO of 5,000 and 20,000 steps was tried on three random tabular tasks (rewards in [0, 1],
    horizon 12, 40 prompts, budgets of 12 to 96 LM tokens). Any β from 0.03 to 0.3 came within 0.02 of the best J, 0.1
    within 0.004. β = 0 fell short by up to 0.16, most at the smallest budget.

    V is the mean return of the agent's own policy, hence *below* the best return to go: the heuristic is inadmissible.
    Good texts may be put off or pruned. Only the search's own bound U proves anything; no learned value enters it.
    Train with ``gamma=1``: a discounted V is in other units than J.
    """

    def __init__(self, agent: Any, *, preference: float = 0.1) -> None:
        """Use an agent's critic and policy.

        Args:
            agent: PPO, A2C or MaskablePPO trained on ``TokenDecoding-v0``, with any policy that has
                ``predict_values`` and ``get_distribution``.
            preference: β, in units of J per nat; 0 leaves the edges of a node in the language model's order.

        Raises:
            ConfigurationError: The agent has no such policy, or was trained on something else; β is not a number >= 0.
        """
        self.preference = check_number("preference", preference, low=0)
        self.function: ValueFunction = as_value_function(agent)

    def __call__(self, mdp: DecodingMDP, prompts: Sequence[Prompt], nodes: IntArray) -> Values:
        """See :class:`Heuristic`; masked actions get no more than the least preferred legal one.

        Raises:
            CheckpointError: The agent was trained for another model, k or observation layout than ``mdp`` has.
        """
        v, logprobs = self.function.values(mdp, prompts, nodes)
        # The best *legal* action has preference 0, as after renormalising over the mask.
        legal = np.where(mdp.action_mask(nodes), np.maximum(logprobs, _MIN_LOGPROB), _MIN_LOGPROB)
        against: Values = legal - legal.max(axis=1, keepdims=True)
        return v[:, None] + self.preference * against

    def check(self, mdp: DecodingMDP) -> None:
        """See :meth:`QHeuristic.check`."""
        self.function.check(mdp)

    def __repr__(self) -> str:
        """Return the expression that makes it."""
        return f"ValueHeuristic({self.function!r}, preference={self.preference})"


@dataclass(repr=False)
class ValueFunction(LearnedFunction):
    """An actor-critic's policy (``predict_values`` and ``get_distribution``) that can be applied to nodes."""

    def values(self, mdp: DecodingMDP, prompts: Sequence[Prompt], nodes: IntArray) -> tuple[Values, Values]:
        """Return V(s), φ(s) added back, float64 [n], and log π_θ(a | s), nats, float64 [n, k], masked actions included.

        Raises:
            CheckpointError: The network belongs to another model, k or observation layout.
        """
        import torch

        states, left_out = self._observe(mdp, prompts, nodes)
        policy: Any = self.network
        observation = as_tensors(states, policy)
        with torch.inference_mode():
            v = policy.predict_values(observation).squeeze(1)
            logprobs = policy.get_distribution(observation).distribution.logits  # normalised, in torch's Categorical
        return v.double().cpu().numpy() + left_out, logprobs.double().cpu().numpy()


def as_q_function(q: Any) -> QFunction:
    """Return ``q`` as a :class:`QFunction`.

    Args:
        q: A :class:`QFunction`, an agent with a Q-network, or an argument of :meth:`QFunction.from_pretrained`: the
            folder of a checkpoint, the name of a shipped one, or a repository on the Hugging Face hub.

    Raises:
        CheckpointError: The checkpoint is broken, or cannot be downloaded.
        UnknownNameError: There is no such folder or name.
        ConfigurationError: ``q`` is none of these.
    """
    if isinstance(q, QFunction):
        return q
    if isinstance(q, (str, Path)):
        return QFunction.from_pretrained(q)
    if callable(own := getattr(q, "q_function", None)) and isinstance(made := own(), QFunction):
        return made
    network = getattr(q, "q_net", None)
    if network is None and (quantiles := getattr(q, "quantile_net", None)) is not None:
        from .scorer import QuantileMean

        network = QuantileMean(quantiles)
    if network is None or not _sees_tokens(q):
        advice = ""
        if network is not None:
            advice = ", trained on another environment"
        elif _is_critic(q):
            advice = ", an actor-critic: ValueHeuristic(agent) takes it"
        raise ConfigurationError(
            "a Q-heuristic needs an agent with a Q-network trained on TokenDecoding-v0 (DQN, QR-DQN, QStar), "
            f"a QFunction or a checkpoint; got {type(q).__name__}{advice}"
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
    if not _is_critic(agent) or hasattr(policy, "lstm_actor") or not _sees_tokens(agent):
        has_q = any(hasattr(agent, name) for name in ("q_net", "quantile_net"))
        raise ConfigurationError(
            "a value heuristic needs an actor-critic agent without recurrence, trained on TokenDecoding-v0 "
            f"(PPO, A2C, MaskablePPO); got {type(agent).__name__}{', which QHeuristic(agent) takes' if has_q else ''}"
        )
    spec = _trained_on(agent)
    return ValueFunction(policy, spec, spec.shaped, spec.candidate_dims)


def _is_critic(agent: Any) -> bool:
    policy = getattr(agent, "policy", None)
    return all(callable(getattr(policy, name, None)) for name in ("predict_values", "get_distribution"))


def _sees_tokens(agent: Any) -> bool:
    return "candidates" in getattr(getattr(agent, "observation_space", None), "spaces", {})


def _trained_on(agent: Any) -> QSpec:
    """Return the origin of an agent of stable-baselines3, as far as it and its environment show it.

    Raises:
        ConfigurationError: Its values are in other units than J, or its observations are others.
    """
    if agent.get_vec_normalize_env() is not None or _saw_normalised(agent):
        raise ConfigurationError(
            "the agent was trained behind VecNormalize: its values are in other units than J, and it knows other "
            "observations; train it without (observations and rewards of TokenDecoding-v0 are of order 1 already)"
        )
    spaces, k = agent.observation_space.spaces, int(agent.action_space.n)
    dims = int(spaces["candidates"].shape[0]) // k
    context = int(spaces["context"].shape[0]) // dims if "context" in spaces else 0
    env = agent.get_env()
    changing = (gym.RewardWrapper, gym.wrappers.NormalizeReward, gym.wrappers.NormalizeObservation)
    if env is not None and any(wrapped for cls in changing for wrapped in env.env_is_wrapped(cls)):
        raise ConfigurationError(
            "a wrapper changes the rewards or observations of the agent's environment, so its values are in other "
            "units than J, or mean other states; train it without, and change the reward model instead"
        )
    from stable_baselines3.common.vec_env import SubprocVecEnv

    # An MDP cannot be fetched from another process.
    elsewhere = env is not None and isinstance(env.unwrapped, SubprocVecEnv)
    mdp = None if env is None or elsewhere else mdp_of(env)
    if agent.gamma != 1 and (mdp is None or mdp.max_new_tokens > 1):
        warnings.warn(
            f"the agent discounts with gamma={agent.gamma:g} and J does not, so that its values differ from returns of "
            f"J; train it with gamma=1: {type(agent).__name__}(…, gamma=1.0)",
            UserWarning,
            stacklevel=4,
        )
    # Loaded without its environment, it is taken for shaped, as environments are by default.
    shaped = True if env is None else bool(env.get_attr("shaping")[0])
    if mdp is None:
        return QSpec(
            None,
            k,
            int(spaces["hidden"].shape[0]),
            dims,
            shaped=shaped,
            hidden_layers=None,
            context_tokens=context,
            action=None,
        )
    return QSpec.of(mdp, dims, shaped, context, observed_terms(env))


def _saw_normalised(agent: Any) -> bool:
    """Return whether an agent, loaded without its environment, shows that it was trained behind VecNormalize.

    Neither VecNormalize nor a flag is in the file. Its traces are the last observation and the last unnormalised one.
    """
    last, original = getattr(agent, "_last_obs", None), getattr(agent, "_last_original_obs", None)
    if not isinstance(last, dict) or not isinstance(original, dict):
        return False
    from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

    if not isinstance(agent, OffPolicyAlgorithm):
        return True  # without VecNormalize, on-policy agents have no unnormalised observation
    rows = [{key: value[i] for key, value in last.items()} for i in range(len(last["remaining"]))]
    if not all(agent.observation_space.contains(row) for row in rows):
        return True
    # Without VecNormalize, off-policy agents keep the observation of the step before instead, which has more tokens
    # left, unless the episode has ended after a single token.
    if not all(np.array_equal(last[key], original[key]) for key in ("remaining", "action_mask")):
        return False
    lengths = [episode["l"] for episode in list(agent.ep_info_buffer or ())[-len(rows) :]]
    if (last["remaining"] < 1).any() or max(lengths, default=1) > 1:
        return True
    if all(np.array_equal(last[key], original[key]) for key in last):
        warnings.warn(
            "the file does not show whether this agent was trained behind VecNormalize, which would change its units; "
            "load it with its environment: load(path, env)",
            UserWarning,
            stacklevel=5,
        )
    return False


def export_sb3(q: Any, path: str | Path, env: Any) -> Path:
    """Write a Q-function as the zip file of stable-baselines3's own ``DQN``, for programs that know only that.

    ``DQN.load(path)`` gives an agent with :class:`TokenQPolicy` that takes the same greedy actions. That file is a
    pickle, which this package never reads. Read one only if you trust its author.

    Args:
        q: A :class:`QStar`, or anything else that :func:`as_q_function` takes whose network is a TokenQPolicy's.
        path: The file; ``.zip`` is added where there is no suffix.
        env: The environment whose spaces the agent gets, with the arguments that Q was trained with.

    Returns:
        The file's path.

    Raises:
        ConfigurationError: Q has another network, or is quantiles.
        CheckpointError: Q was trained for another model, k or observation layout than ``env`` has.
    """
    from stable_baselines3 import DQN

    from .policies import TokenQPolicy

    q = as_q_function(q)
    scorer = q.scorer
    if scorer.n_quantiles is not None:
        raise ConfigurationError("DQN has no quantiles; export the agent that learned them by its own save()")
    # A buffer that fits into memory, for further training.
    agent = DQN(TokenQPolicy, env, gamma=1.0, buffer_size=10_000, policy_kwargs=scorer.config.policy_kwargs())
    q.check_env(agent.env)
    for network in (agent.q_net, agent.q_net_target):
        network.scorer.load_state_dict(scorer.state_dict())  # type: ignore[union-attr]
    path = Path(path)
    path = path if path.suffix else path.with_suffix(".zip")
    agent.save(path)
    return path
