"""Heuristics from learned functions: Q-networks and critics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...checks import check_number
from ...envs import DecodingMDP, Prompt
from ...errors import CheckpointError
from ..search.state import IntArray, Values

if TYPE_CHECKING:
    from .q_function import QFunction, ValueFunction
from ..heuristics import (
    BoundHeuristic,
    Composable,
    Heuristic,
)

__all__ = ["QHeuristic", "ValueHeuristic", "shipped_heuristic"]

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
        from .q_function import as_q_function

        self.q: QFunction = as_q_function(q)

    def __call__(self, mdp: DecodingMDP, prompts: Sequence[Prompt], nodes: IntArray) -> Values:
        """See :class:`Heuristic`.

        Raises:
            CheckpointError: Q was trained for another model, k or observation layout than ``mdp`` has.
        """
        return self.q.values(mdp, prompts, nodes)

    def __repr__(self) -> str:
        """Return the expression that makes it."""
        return f"QHeuristic({self.q!r})"


def shipped_heuristic(task: str, mdp: DecodingMDP) -> tuple[Heuristic, str]:
    """Return the Q-function that the package ships for a task, or the bound where there is none that fits ``mdp``.

    Returns:
        The heuristic, and why the shipped Q-function does not fit; empty if it does, or if there is none.
    """
    from .q_function import pretrained_names

    if task not in pretrained_names():
        return BoundHeuristic(), ""
    heuristic = QHeuristic(task)
    try:
        heuristic.q.check(mdp)
    except CheckpointError as error:
        return BoundHeuristic(), str(error)
    return heuristic, ""


class ValueHeuristic(Composable):
    """h(s, a) = V(s) + β · (log π_θ(a | s) - max over a' of log π_θ(a' | s)), from an actor-critic such as PPO.

    A state-value says nothing of the edges, and asking it of every child would cost a forward of the language model
    each. Instead the evaluation is deferred: every edge gets the value of the state that it leaves (Richter & Helmert
    2009, "Preferred operators and deferred evaluation in satisficing planning"), less what the policy holds against it,
    so that the policy's favourite comes first. For the optimal policy under an entropy bonus of weight β that is exact:
    there Q(s, a) - max Q = β · (log π - max log π). PPO never gets there and normalises its advantages, so β is a
    matter of trial. Measured with PPO of 5,000 and 20,000 steps on three random tabular tasks (rewards in [0, 1],
    horizon 12, 40 prompts, budgets of 12 to 96 LM tokens): any β from 0.03 to 0.3 came within 0.02 of the best J, 0.1
    within 0.004; β = 0 fell short by up to 0.16, the more the smaller the budget.

    V is the mean return of the agent's own policy, hence *below* the best return to go, which is what h should not fall
    below: the heuristic is inadmissible, good texts may be put off or pruned, and only the search's own bound U, in
    which no learned value enters, proves anything. Train with ``gamma=1``: a discounted V is in other units than J.
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
        from .q_function import as_value_function

        self.preference = check_number("preference", preference, low=0)
        self.function: ValueFunction = as_value_function(agent)

    def __call__(self, mdp: DecodingMDP, prompts: Sequence[Prompt], nodes: IntArray) -> Values:
        """See :class:`Heuristic`; masked actions get no more than the least preferred legal one.

        Raises:
            CheckpointError: The agent was trained for another model, k or observation layout than ``mdp`` has.
        """
        v, logprobs = self.function.values(mdp, prompts, nodes)
        # The best *legal* action is preferred by 0: that is what renormalising over the mask would give.
        legal = np.where(mdp.action_mask(nodes), np.maximum(logprobs, _MIN_LOGPROB), _MIN_LOGPROB)
        against: Values = legal - legal.max(axis=1, keepdims=True)
        return v[:, None] + self.preference * against

    def __repr__(self) -> str:
        """Return the expression that makes it."""
        return f"ValueHeuristic({self.function!r}, preference={self.preference})"
