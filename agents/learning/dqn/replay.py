"""A replay buffer for masked Q-learning: sized in bytes, observations stored once, n-step returns for all spaces."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import psutil
import torch
from gymnasium import spaces
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.preprocessing import get_obs_shape
from stable_baselines3.common.vec_env import VecNormalize
from torch import Tensor

from ....checks import check_integer, check_number
from ....errors import ConfigurationError

__all__ = ["MaskedReplayBuffer", "MaskedReplaySamples", "as_action_masks"]

Array = npt.NDArray[Any]
BoolArray = npt.NDArray[np.bool_]
Observations = Array | dict[str, Array]


class MaskedReplaySamples(NamedTuple):
    """A batch of ``B`` transitions of up to n steps each; the first fields are those of stable-baselines3.

    Attributes:
        observations: Tensor or dict of tensors [B, …], the first states.
        actions: int64 [B, 1], taken there.
        next_observations: As ``observations``, the states reached; without meaning where ``dones`` is 1.
        dones: float32 [B, 1], 1 after a termination: no bootstrapping.
        rewards: float32 [B, 1], the sum of the discounted rewards on the way.
        discounts: float32 [B, 1], γ to the number of steps taken: the weight of the bootstrapped value.
        next_action_masks: bool [B, k], the legal actions in ``next_observations``; all where ``dones`` is 1.
    """

    observations: Tensor | dict[str, Tensor]
    actions: Tensor
    next_observations: Tensor | dict[str, Tensor]
    dones: Tensor
    rewards: Tensor
    discounts: Tensor
    next_action_masks: Tensor


def as_action_masks(masks: Sequence[Any] | Array, n_actions: int) -> BoolArray:
    """Return action masks as one array, bool [N, k].

    Args:
        masks: One mask per environment, ``n_actions`` truth values each; True = the action is legal.
        n_actions: k.

    Raises:
        ConfigurationError: A mask has another shape, or allows nothing.
    """
    for i, mask in enumerate(masks):
        found = np.asarray(mask)
        if found.shape != (n_actions,) or found.dtype.kind not in "biuf":
            raise ConfigurationError(
                f"the action mask of environment {i} has shape {found.shape} and dtype {found.dtype}; "
                f"action_masks() must return {n_actions} truth values, one per action"
            )
        if not found.any():
            raise ConfigurationError(
                f"environment {i} masks all of its {n_actions} actions; "
                "a state in which nothing may be done must end its episode (terminated=True)"
            )
    return np.asarray(masks, dtype=bool).reshape(len(masks), n_actions)


class MaskedReplayBuffer(ReplayBuffer):
    """A ring of steps [T, N], a column per environment, in which the next observation is the next row of the column.

    Each observation is stored once; stable-baselines3 stores it twice. The last observation of a truncated episode
    takes a row of its own, for bootstrapping. So does that of an episode cut off by a reset between two calls of
    ``learn``. After a termination nothing is kept. All this lies within the given bytes.

    Returns over n steps (Sutton 1988) are summed when sampled, for any observation space. They stop early at the end of
    an episode, or of its recorded part; ``discounts`` has the number of steps.

    The mask of a next state is taken from ``infos``, under Gymnasium's key ``"action_mask"``. Without it all actions
    are legal. :class:`MaskableDQN` puts it there.

    The buffer works as ``replay_buffer_class`` of stable-baselines3's algorithms with discrete actions, and pickles.

    Attributes:
        buffer_size: T, rows.
        pos: int64 [N], the row that each environment writes next.
        full: Whether a column has been filled once.
        nbytes: Bytes of all the arrays.
    """

    pos: npt.NDArray[np.int64]  # type: ignore[assignment]

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space[Any],
        action_space: spaces.Space[Any],
        device: torch.device | str = "auto",
        n_envs: int = 1,
        optimize_memory_usage: bool = False,
        handle_timeout_termination: bool = True,
        *,
        n_steps: int = 1,
        gamma: float = 0.99,
        buffer_bytes: int | None = None,
    ) -> None:
        """Allocate the ring.

        Args:
            buffer_size: Steps of all environments together; ignored where ``buffer_bytes`` is given.
            observation_space: Any that stable-baselines3 takes; observations keep its dtype.
            action_space: ``Discrete``.
            device: Of the samples.
            n_envs: N.
            optimize_memory_usage: False; stable-baselines3's own way of storing observations once.
            handle_timeout_termination: Bootstrap from the last state of a truncated episode
                (``info["TimeLimit.truncated"]``); False treats a truncation as a termination.
            n_steps: n.
            gamma: γ.
            buffer_bytes: Memory, instead of ``buffer_size``.

        Raises:
            ConfigurationError: An argument is out of range, or n steps do not fit.
        """
        super(ReplayBuffer, self).__init__(buffer_size, observation_space, action_space, device, n_envs=n_envs)
        if not isinstance(action_space, spaces.Discrete):
            raise ConfigurationError(f"{type(self).__name__} is for discrete actions, got {action_space}")
        if optimize_memory_usage:
            raise ConfigurationError(f"{type(self).__name__} stores observations once as it is; leave out the option")
        self.handle_timeout_termination = handle_timeout_termination
        self.optimize_memory_usage = False
        self.n_steps = check_integer("n_steps", n_steps)
        self.gamma = check_number("gamma", gamma, low=0.0, high=1.0)
        k = int(action_space.n)
        fields = observation_space.spaces if isinstance(observation_space, spaces.Dict) else {"": observation_space}
        shapes: dict[str, Any] = {name: get_obs_shape(space) for name, space in fields.items()}
        layout = {name: (shapes[name], np.dtype(space.dtype)) for name, space in fields.items()}
        step_bytes = sum(math.prod(shape) * dtype.itemsize for shape, dtype in layout.values())
        step_bytes += 8 + 4 + k + 3  # action, reward, mask, three flags
        # One row more than there are steps, for the newest step's next observation.
        rows = check_integer("buffer_size", buffer_size) // n_envs + 1
        if buffer_bytes is not None:
            rows = check_integer("buffer_bytes", buffer_bytes) // (step_bytes * n_envs)
            if rows <= self.n_steps:
                raise ConfigurationError(
                    f"buffer_bytes={buffer_bytes} holds {rows} rows of {n_envs} environments, {step_bytes} bytes each; "
                    f"n_steps={n_steps} needs {(n_steps + 1) * step_bytes * n_envs} bytes at the least"
                )
        self.buffer_size = max(rows, 2)
        if self.buffer_size * n_envs * step_bytes > (available := psutil.virtual_memory().available):
            warnings.warn(
                f"the replay buffer may grow to {self.buffer_size * n_envs * step_bytes / 1e9:.1f} GB, of which "
                f"{available / 1e9:.1f} GB are there; give buffer_bytes, or a smaller buffer_size",
                stacklevel=2,
            )
        ring = self.buffer_size, n_envs
        self._observations = {name: np.zeros((*ring, *shape), dtype) for name, (shape, dtype) in layout.items()}
        self.action_masks = np.ones((*ring, k), dtype=bool)
        self.actions = np.zeros(ring, dtype=np.int64)
        self.rewards = np.zeros(ring, dtype=np.float32)
        self.terminated = np.zeros(ring, dtype=bool)  # no state follows
        self.last = np.zeros(ring, dtype=bool)  # the next row is not a step of the same episode
        self.valid = np.zeros(ring, dtype=bool)  # the row is a step: it has an action
        self.reset()

    def reset(self) -> None:
        """Empty the buffer."""
        self.full = False
        self.pos = np.zeros(self.n_envs, dtype=np.int64)
        self.valid[:] = False
        self._reached = np.zeros(self.n_envs, dtype=bool)  # the row at ``pos`` has the newest step's next state …
        self._going_on = np.zeros(self.n_envs, dtype=bool)  # … and its episode goes on from there

    def size(self) -> int:
        """Return the number of steps that can be sampled, divided by the number of environments."""
        return int(self.valid.sum()) // self.n_envs

    @property
    def nbytes(self) -> int:
        """Bytes of all the arrays."""
        steps = (self.action_masks, self.actions, self.rewards, self.terminated, self.last, self.valid)
        return sum(array.nbytes for array in (*self._observations.values(), *steps))

    def add(
        self,
        obs: Observations,
        next_obs: Observations,
        action: Array,
        reward: Array,
        done: Array,
        infos: list[dict[str, Any]],
    ) -> None:
        """Store one step of each environment.

        Args:
            obs: [N, …], the states.
            next_obs: [N, …], the next states; at the end of an episode, its last observation.
            action: int [N] or [N, 1].
            reward: float [N].
            done: bool [N], terminated or truncated.
            infos: One per environment; ``"TimeLimit.truncated"`` and ``"action_mask"`` (of ``next_obs``) are read.

        Raises:
            ConfigurationError: A mask has the wrong shape, or allows nothing where the episode has not terminated;
                nothing was stored.
        """
        columns, here, there = np.arange(self.n_envs), self._rows(obs), self._rows(next_obs)
        done = np.asarray(done, dtype=bool)
        truncated = np.array([bool(info.get("TimeLimit.truncated", False)) for info in infos])
        terminated = done & ~truncated if self.handle_timeout_termination else done
        anything = np.ones(self.action_masks.shape[-1], dtype=bool)
        # After a termination there may be no legal action, and the mask is not used.
        masks = [info.get("action_mask", anything) for info in infos]
        masks = [anything if end else mask for end, mask in zip(terminated, masks, strict=True)]
        next_masks = as_action_masks(masks, len(anything))

        # An episode that was reset from outside begins in another state than the last step's next one: that is kept.
        goes_on = self._going_on.copy()
        for name, values in here.items():
            same = self._observations[name][self.pos, columns] == values
            goes_on &= same.reshape(self.n_envs, -1).all(axis=1)
        self.last[self.pos[goes_on] - 1, columns[goes_on]] = False
        row = (self.pos + (self._reached & ~goes_on)) % self.buffer_size
        for name, values in here.items():
            self._observations[name][row, columns] = values
        self.actions[row, columns] = np.asarray(action).reshape(self.n_envs)
        self.rewards[row, columns] = reward
        self.terminated[row, columns] = terminated
        self.valid[row, columns] = self.last[row, columns] = True  # the last one, as far as is known

        following = (row + 1) % self.buffer_size
        kept = ~terminated
        at = following[kept], columns[kept]
        for name, values in there.items():
            self._observations[name][at] = values[kept]
        self.action_masks[at] = next_masks[kept]
        self.valid[at] = False
        self.full |= bool((following < self.pos).any())
        self.pos, self._reached, self._going_on = following, kept, ~done

    def sample(self, batch_size: int, env: VecNormalize | None = None) -> MaskedReplaySamples:  # type: ignore[override]
        """Return ``batch_size`` transitions, drawn uniformly from all steps stored, with torch's generator.

        Args:
            batch_size: B.
            env: Normalises observations and rewards.

        Raises:
            ConfigurationError: Nothing has been stored yet.
        """
        used = (self.buffer_size if self.full else int(self.pos.max())) * self.n_envs
        if not used:
            raise ConfigurationError("the replay buffer is empty; collect steps before training (learning_starts)")
        drawn = torch.randint(used, (batch_size,)).numpy()
        # Rows that only end an episode are drawn again; at the very most every other row is one.
        while len(wrong := np.flatnonzero(~self.valid.reshape(-1)[drawn])):
            drawn[wrong] = torch.randint(used, (len(wrong),)).numpy()
        return self._get_samples(drawn, env)

    def _get_samples(  # type: ignore[override]
        self, batch_inds: Array, env: VecNormalize | None = None
    ) -> MaskedReplaySamples:
        """Return the transitions that begin at ``row · N + column``, int64 [B]."""
        rows, columns = np.divmod(batch_inds, self.n_envs)
        steps = np.arange(self.n_steps)
        window = (rows[:, None] + steps) % self.buffer_size, columns[:, None]  # [B, n]
        taken = np.ones((len(rows), self.n_steps), dtype=bool)
        taken[:, 1:] = ~np.logical_or.accumulate(self.last[window], axis=1)[:, :-1]
        rewards = self._normalize_reward(self.rewards[window], env)
        returns = np.where(taken, rewards * self.gamma**steps, 0.0).sum(axis=1)
        count = taken.sum(axis=1)
        done = self.terminated[(rows + count - 1) % self.buffer_size, columns]
        following = (rows + count) % self.buffer_size
        column = {"dones": done, "rewards": returns, "discounts": self.gamma**count}
        return MaskedReplaySamples(
            observations=self._observed(rows, columns, env),
            actions=self.to_torch(self.actions[rows, columns, None], copy=False),
            next_observations=self._observed(following, columns, env),
            next_action_masks=self.to_torch(self.action_masks[following, columns] | done[:, None], copy=False),
            **{name: self.to_torch(value.astype(np.float32)[:, None], copy=False) for name, value in column.items()},
        )

    def _rows(self, observation: Observations) -> dict[str, Array]:
        """Return an observation as it is stored, each part [N, …] in the space's dtype."""
        parts = observation if isinstance(observation, dict) else {"": observation}
        return {
            name: np.asarray(parts[name], dtype=ring.dtype).reshape(self.n_envs, *ring.shape[2:])
            for name, ring in self._observations.items()
        }

    def _observed(self, rows: Array, columns: Array, env: VecNormalize | None) -> Tensor | dict[str, Tensor]:
        parts = {name: ring[rows, columns] for name, ring in self._observations.items()}
        observed = self._normalize_obs(parts if isinstance(self.observation_space, spaces.Dict) else parts[""], env)
        if isinstance(observed, dict):
            return {name: self.to_torch(value, copy=False) for name, value in observed.items()}
        return self.to_torch(observed, copy=False)
