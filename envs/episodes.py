"""Episodes stepped together: the core of the single and the vector environments."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt

from ..errors import ConfigurationError, EpisodeError, IllegalActionError
from ..models.base import IntArray
from .mdp import Completion, DecodingMDP, Finish, Values
from .observations import Observation, Observer
from .prompts import Prompt

__all__ = ["EpisodeState", "Episodes", "Steps"]

P = ParamSpec("P")
T = TypeVar("T")

_NONE = -1  # the node of an episode that has not begun or has ended


def _in_turn(method: Callable[Concatenate[Episodes, P], T]) -> Callable[Concatenate[Episodes, P], T]:
    """Let threads take turns with the language model, one call at a time."""

    @functools.wraps(method)
    def call(self: Episodes, *args: P.args, **kwargs: P.kwargs) -> T:
        with self._mdp.model.lock:
            return method(self, *args, **kwargs)

    return call  # type: ignore[return-value]  # wraps() names the first argument


class Steps(NamedTuple):
    """Outcome of one step of ``N`` episodes.

    Attributes:
        observation: Arrays [N, …], the next observations; those after the end where an episode ended and none began.
        rewards: float64 [N].
        terminated: bool [N].
        tokens: int64 [N], the appended tokens; of a step its last one.
        texts: The appended texts.
        logprobs: float32 [N], nats.
        ended: By episode that ended, the entries of ``info`` about its completion.
    """

    observation: Observation
    rewards: Values
    terminated: npt.NDArray[np.bool_]
    tokens: IntArray
    texts: list[str]
    logprobs: npt.NDArray[np.float32]
    ended: dict[int, dict[str, Any]]


@dataclass(eq=False)
class EpisodeState:
    """State of ``N`` episodes; its size does not depend on the lengths of prompt and completion.

    Attributes:
        node: int64 [N], nodes of the token tree, -1 before an episode's beginning and after its end.
    """

    node: IntArray
    _mdp: DecodingMDP
    _prompt: list[Prompt | None]
    _ended: list[Completion | None]
    _potential: Values

    def __deepcopy__(self, memo: dict[int, Any]) -> EpisodeState:
        """Return a copy whose nodes are pinned, too."""
        with self._mdp.model.lock:
            state = replace(
                self,
                node=self.node.copy(),
                _prompt=self._prompt.copy(),
                _ended=self._ended.copy(),
                _potential=self._potential.copy(),
            )
            self._mdp.tree.pin(state)
        return state


class Episodes:
    """``N`` episodes of one MDP, stepped with one forward of the language model and one call of the reward.

    Attributes:
        node: int64 [N], nodes of the token tree, -1 before an episode's beginning and after its end.
        prompt: The prompt of each.
        ended: The last completion of each that has ended, else None.
    """

    def __init__(self, mdp: DecodingMDP, observer: Observer, count: int, *, shaping: bool, gamma: float) -> None:
        """Prepare ``count`` episodes that have not begun."""
        self._mdp, self._observer, self._shaping, self._gamma = mdp, observer, shaping, gamma
        self.node = np.full(count, _NONE, dtype=np.int64)
        self.prompt: list[Prompt | None] = [None] * count
        self.ended: list[Completion | None] = [None] * count
        self._potential = np.zeros(count)
        mdp.tree.pin(self)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the arguments: elsewhere there is no such tree, and the episodes have not begun."""
        make = functools.partial(type(self), shaping=self._shaping, gamma=self._gamma)
        return make, (self._mdp, self._observer, len(self.node))

    def __deepcopy__(self, memo: dict[int, Any]) -> Episodes:
        """Return episodes of the same process that are as far as these."""
        make, arguments = self.__reduce__()
        copied: Episodes = make(*arguments)
        copied.set_state(self.get_state())
        return copied

    @_in_turn
    def begin(self, which: Sequence[int], prompts: Sequence[Prompt]) -> Observation:
        """Start the episodes ``which`` [m] anew; return observations [m, …]. All of them start, or none."""
        self._mdp.evict_if_full()
        nodes = self._mdp.roots(prompts)
        self._mdp.check_can_continue(nodes)
        potential = self._mdp.potential(prompts, nodes)
        observation = self._observer.observe(potential, nodes, self._observer.term_potentials(prompts, nodes))
        for i, prompt in zip(which, prompts, strict=True):
            self.prompt[i], self.ended[i] = prompt, None
        self.node[which], self._potential[which] = nodes, potential
        return observation

    @_in_turn
    def action_masks(self) -> npt.NDArray[np.bool_]:
        """Return the legal actions, bool [N, k]; all ones where there is no episode."""
        masks = np.ones((len(self.node), self._mdp.top_k), dtype=bool)
        alive = self.node != _NONE
        if alive.any():
            masks[alive] = self._mdp.action_mask(self.node[alive])
        return masks

    @_in_turn
    def step(self, actions: Any, restart: Callable[[IntArray], Sequence[Prompt]] | None = None) -> Steps:
        """Take one action in each episode. Either all steps happen or, on any error, none does.

        Args:
            actions: ``N`` integers.
            restart: Given the indices of those that end, returns the prompts with which they begin anew in this step.

        Raises:
            EpisodeError: An episode has not begun or has ended.
            IllegalActionError: An action is not an integer, out of range, or masked.
            RewardError: The reward model failed.
            ConstraintError: A constraint leaves nothing to write after this step.
        """
        mdp = self._mdp
        mdp.evict_if_full()
        ranks, nodes, rows = self._check(actions), self.node, np.arange(len(self.node))
        terminated = mdp.finishes(nodes)[rows, ranks] != Finish.NO
        rewards = mdp.edge_returns(nodes)[rows, ranks]
        tokens = mdp.last_tokens(nodes, ranks)
        logprobs, written = mdp.logprobs(nodes)[rows, ranks].astype(np.float32), mdp.edge_texts(nodes, ranks)
        # The reward comes first: it may fail, and until then nothing has changed. An unused forward is only cached.
        ending, continuing = np.flatnonzero(terminated), np.flatnonzero(~terminated)
        completions = mdp.complete([self._prompt(i) for i in ending.tolist()], nodes[ending], ranks[ending])
        fresh = list(restart(ending)) if restart and len(ending) else []
        begun = ending[: len(fresh)]
        roots, children = mdp.grow(fresh, nodes[continuing], ranks[continuing])
        prompts = self.prompt.copy()
        for i, prompt in zip(begun, fresh, strict=True):
            prompts[i] = prompt
        after, potential = np.full(len(nodes), _NONE), np.zeros(len(nodes))
        after[begun], after[continuing] = roots, children
        alive = np.flatnonzero(after != _NONE)
        mdp.check_can_continue(after[alive])
        asked = [p for i in alive if (p := prompts[i]) is not None]
        potential[alive] = mdp.potential(asked, after[alive])
        of_terms = self._observer.term_potentials(asked, after[alive])
        observation = self._observer.observe(potential[alive], after[alive], of_terms)
        if len(alive) < len(nodes):
            whole = self._observer.terminal_observation(len(nodes))
            for key, value in observation.items():
                whole[key][alive] = value
            observation = whole
        # Nothing can fail from here on.
        parts = mdp.components([self._prompt(i) for i in ending.tolist()], completions) if len(ending) else {}
        ended = {
            int(i): _summary(completion, {name: values[row] for name, values in parts.items()})
            for row, (i, completion) in enumerate(zip(ending, completions, strict=True))
        }
        # A completion that cannot be scored earns its fluency only.
        rewards[ending] += [c.reward if np.isfinite(c.reward) else 0.0 for c in completions]
        if self._shaping:
            rewards += np.where(terminated, 0.0, self._gamma * potential) - self._potential
        for i, completion in zip(ending, completions, strict=True):
            self.ended[i] = completion if after[i] == _NONE else None
        self.node[:], self._potential, self.prompt = after, potential, prompts
        return Steps(observation, rewards, terminated, tokens, written, logprobs, ended)

    def token_info(self, steps: Steps, index: int) -> dict[str, Any]:
        """Return the entries of ``info`` about one episode's step, except the mask."""
        token, text = int(steps.tokens[index]), steps.texts[index]
        info = {"token": token, "token_text": text, "logprob": float(steps.logprobs[index])}
        return info | steps.ended.get(index, {})

    @_in_turn
    def get_state(self) -> EpisodeState:
        """Return the state of the episodes, for :meth:`set_state`."""
        return copy.deepcopy(EpisodeState(self.node, self._mdp, self.prompt, self.ended, self._potential))

    @_in_turn
    def set_state(self, state: EpisodeState) -> None:
        """Restore ``state``.

        Raises:
            ConfigurationError: It is not a state of this environment.
        """
        if not isinstance(state, EpisodeState):
            raise ConfigurationError(f"set_state takes what get_state returned, got {type(state).__name__}")
        if state._mdp is not self._mdp or len(state.node) != len(self.node):
            raise ConfigurationError("this state is one of another environment; set_state takes its own get_state's")
        self.node[:], self._potential = state.node, state._potential.copy()
        self.prompt, self.ended = state._prompt.copy(), state._ended.copy()

    # -----------------------------------------------------------------------------------------------------------------

    def _prompt(self, index: int) -> Prompt:
        prompt = self.prompt[index]
        assert prompt is not None
        return prompt

    def _check(self, actions: Any) -> IntArray:
        given: Any
        try:
            given = len(actions)
        except TypeError:  # one action, or None
            given = f"{actions!r}, which is no list"
        if given != len(self.node):
            raise IllegalActionError(f"{len(self.node)} actions are needed, one per environment; got {given}")
        idle = np.flatnonzero(self.node == _NONE)
        if len(idle):
            when = "after the end of the episode" if self.ended[idle[0]] else "before reset"
            raise EpisodeError(f"step() was called {when}; call reset() first")
        masks = self.action_masks()
        if isinstance(actions, np.ndarray) and actions.dtype.kind in "iu" and actions.ndim == 1:
            inside = (actions >= 0) & (actions < masks.shape[1])
            if inside.all() and masks[np.arange(len(masks)), actions].all():
                return actions.astype(np.int64)
        # One by one: arrays of one integer are accepted too, and an error names the action that is wrong.
        return np.array([_rank(action, mask) for action, mask in zip(actions, masks, strict=True)], dtype=np.int64)


def _rank(action: Any, mask: npt.NDArray[np.bool_]) -> int:
    legal = np.flatnonzero(mask).tolist()
    try:
        array = np.asarray(action)
    except ValueError:  # lists of different lengths
        array = np.empty(0)
    if array.size != 1 or array.dtype.kind not in "iu":
        raise IllegalActionError(f"an action is one integer, got {action!r}; legal now: {legal}")
    rank = int(array.reshape(()))
    if rank not in legal:
        is_masked = 0 <= rank < len(mask)
        why = "masked" if is_masked else f"not in 0..{len(mask) - 1}"
        advice = ". Agents that read action_mask, such as MaskableDQN, choose legal ones" if is_masked else ""
        raise IllegalActionError(f"action {rank} is {why}; legal now: {legal}{advice}")
    return rank


def _summary(completion: Completion, parts: dict[str, float]) -> dict[str, Any]:
    scored = bool(np.isfinite(completion.reward))
    return {
        "completion": completion.text,
        "stop": completion.stop,
        "reward": completion.reward if scored else None,
        "rewards": {name: float(value) if np.isfinite(value) else None for name, value in parts.items()},
        "objective": completion.objective if scored else None,
    }
