"""Episodes stepped together: what the single and the vector environments are faces of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import EpisodeError, IllegalActionError
from .language_model import IntArray
from .mdp import Completion, DecodingMDP, Finish, Values
from .observations import Observation, Observer
from .prompts import Prompt

__all__ = ["Episodes", "Steps"]

_NONE = -1  # the node of an episode that has not begun or has ended


class Steps(NamedTuple):
    """What one step of ``N`` episodes brought.

    Attributes:
        observation: Arrays [N, …]; where an episode ended, that after the end.
        rewards: float64 [N].
        terminated: bool [N].
        infos: ``info`` of each episode.
    """

    observation: Observation
    rewards: Values
    terminated: npt.NDArray[np.bool_]
    infos: list[dict[str, Any]]


class Episodes:
    """``N`` episodes of one MDP, stepped with one forward of the language model and one call of the reward.

    Attributes:
        node: int64 [N], where each stands in the token tree, -1 before its beginning and after its end.
        prompt: The prompt of each.
        ended: The last completion of each that has ended, else None.
    """

    def __init__(self, mdp: DecodingMDP, observer: Observer, count: int, *, shaping: bool, gamma: float) -> None:
        """Prepare ``count`` episodes, none of them begun."""
        self._mdp, self._observer, self._shaping, self._gamma = mdp, observer, shaping, gamma
        self.node = np.full(count, _NONE, dtype=np.int64)
        self.prompt: list[Prompt | None] = [None] * count
        self.ended: list[Completion | None] = [None] * count
        self._potential = np.zeros(count)

    def begin(self, which: Sequence[int], prompts: Sequence[Prompt]) -> tuple[Observation, list[dict[str, Any]]]:
        """Start the episodes ``which`` [m] anew; return observations [m, …] and infos. All of them start, or none."""
        nodes = self._mdp.roots(prompts)
        observation = self._observer.observe(prompts, nodes)
        potential = self._mdp.potential(prompts, nodes)
        for i, prompt in zip(which, prompts, strict=True):
            self.prompt[i], self.ended[i] = prompt, None
        self.node[which], self._potential[which] = nodes, potential
        masks = observation["action_mask"]
        return observation, [{"action_mask": m.copy(), "prompt": p.text} for m, p in zip(masks, prompts, strict=True)]

    def action_masks(self) -> npt.NDArray[np.bool_]:
        """Return which actions may be taken, bool [N, k]; all ones where there is no episode."""
        masks = np.ones((len(self.node), self._mdp.top_k), dtype=bool)
        alive = self.node != _NONE
        if alive.any():
            masks[alive] = self._mdp.action_mask(self.node[alive])
        return masks

    def step(self, actions: Sequence[Any]) -> Steps:
        """Take one action in each episode. Either all steps happen or, on any error, none does.

        Raises:
            EpisodeError: An episode has not begun or has ended.
            IllegalActionError: An action is not an integer, out of range, or masked.
            RewardError: The reward model failed.
        """
        mdp, nodes = self._mdp, self.node
        ranks = self._check(actions)
        rows = np.arange(len(nodes))
        going_on = mdp.finishes(nodes)[rows, ranks] == Finish.NO
        rewards = mdp.edge_returns(nodes)[rows, ranks]
        infos = self._token_infos(nodes, ranks)
        # The reward comes first: it can fail without a trace, and a forward that nobody uses is merely cached.
        ending = np.flatnonzero(~going_on)
        completions = mdp.complete(self._prompts(ending), nodes[ending], ranks[ending])
        goers = np.flatnonzero(going_on)
        after, potential = np.full(len(nodes), _NONE), np.zeros(len(nodes))
        observation = self._observer.after_the_end(len(nodes))
        if len(goers):
            after[goers] = mdp.tree.expand(nodes[goers], ranks[goers])
            for key, value in self._observer.observe(self._prompts(goers), after[goers]).items():
                observation[key][goers] = value
            potential[goers] = mdp.potential(self._prompts(goers), after[goers])
        # Nothing can fail from here on.
        for i, completion in zip(ending, completions, strict=True):
            # A completion that cannot be scored earns its fluency only.
            scored = bool(np.isfinite(completion.reward))
            rewards[i] += completion.reward if scored else 0.0
            infos[i] |= {"completion": completion.text, "stop": completion.stop}
            infos[i] |= {"reward": completion.reward if scored else None}
            infos[i] |= {"objective": completion.objective if scored else None}
            self.ended[i] = completion
        if self._shaping:
            rewards += self._gamma * potential - self._potential
        self.node, self._potential = after, potential
        for info, mask in zip(infos, observation["action_mask"], strict=True):
            info["action_mask"] = mask.copy()
        return Steps(observation, rewards, ~going_on, infos)

    # -----------------------------------------------------------------------------------------------------------------

    def _prompts(self, which: IntArray) -> list[Prompt]:
        return [prompt for i in which if (prompt := self.prompt[i]) is not None]

    def _token_infos(self, nodes: IntArray, ranks: IntArray) -> list[dict[str, Any]]:
        tree, decode = self._mdp.tree, self._mdp.model.decode
        tokens, logprobs = tree.tokens[nodes, ranks].tolist(), tree.logprobs[nodes, ranks].tolist()
        return [
            {"token": token, "token_text": decode([token]), "logprob": logprob}
            for token, logprob in zip(tokens, logprobs, strict=True)
        ]

    def _check(self, actions: Sequence[Any]) -> IntArray:
        if len(actions) != len(self.node):
            raise IllegalActionError(f"{len(self.node)} actions are needed, one per environment; got {len(actions)}")
        idle = np.flatnonzero(self.node == _NONE)
        if len(idle):
            when = "after the end of the episode" if self.ended[idle[0]] else "before reset"
            raise EpisodeError(f"step() was called {when}; call reset() first")
        masks = self.action_masks()
        return np.array([self._rank(action, mask) for action, mask in zip(actions, masks, strict=True)], dtype=np.int64)

    def _rank(self, action: Any, mask: npt.NDArray[np.bool_]) -> int:
        legal = np.flatnonzero(mask).tolist()
        try:
            array = np.asarray(action)
        except ValueError:  # lists of different lengths
            array = np.empty(0)
        if array.size != 1 or array.dtype.kind not in "iu":
            raise IllegalActionError(f"an action is one integer, got {action!r}; legal now: {legal}")
        rank = int(array.reshape(()))
        if rank not in legal:
            why = "masked" if 0 <= rank < len(mask) else f"not in 0..{len(mask) - 1}"
            raise IllegalActionError(f"action {rank} is {why}; legal now: {legal}")
        return rank
