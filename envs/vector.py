"""Many environments at once: one core, :class:`Episodes`, behind the interfaces of Gymnasium and stable-baselines3.

A vector step costs one forward of the language model and one call of the reward for all environments together. An
episode that ends begins anew in the same step, and what followed the end is handed over as ``final_obs`` (Gymnasium) or
``terminal_observation`` (stable-baselines3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from stable_baselines3.common.vec_env import VecEnv

from ..errors import ConfigurationError, check_integer
from .episodes import Episodes, Steps
from .observations import Observation
from .prompts import Prompt, as_prompt
from .token_decoding import TokenDecodingEnv

__all__ = ["TokenDecodingVecEnv", "TokenDecodingVectorEnv"]


class _Core:
    """``N`` environments that share one MDP; each draws its prompts from a generator of its own."""

    def __init__(self, num_envs: int, **kwargs: Any) -> None:
        self.count = check_integer("num_envs", num_envs)
        self.env = TokenDecodingEnv(**kwargs)  # arguments, spaces, prompts; never stepped itself
        env = self.env
        self.episodes = Episodes(env.mdp, env.observer, self.count, shaping=env.shaping, gamma=env.gamma)
        self.generators = [seeding.np_random()[0] for _ in range(self.count)]

    def seed(self, seed: int | Sequence[int | None] | None) -> None:
        """Seed environment i with ``seed + i``, or with ``seed[i]``; None changes nothing."""
        if seed is None or isinstance(seed, (int, np.integer)):
            seeds = [None if seed is None else int(seed) + i for i in range(self.count)]
        else:
            seeds = list(seed)
        if len(seeds) != self.count:
            raise ConfigurationError(f"{self.count} seeds are needed, one per environment; got {len(seeds)}")
        for i, value in enumerate(seeds):
            if value is not None:  # None leaves a generator as it is
                self.generators[i] = seeding.np_random(value)[0]

    def begin(self, which: Sequence[int], prompt: Any = None) -> tuple[Observation, list[dict[str, Any]]]:
        """Start the episodes ``which``, with random prompts unless one is given."""
        prompts: list[Prompt] = self.env.prompts
        chosen = [
            as_prompt(prompt) if prompt is not None else prompts[int(self.generators[i].integers(len(prompts)))]
            for i in which
        ]
        return self.episodes.begin(which, chosen)

    def step(self, actions: Sequence[Any]) -> tuple[Steps, Observation, dict[int, dict[str, Any]]]:
        """Step all; return the steps, the observations to go on from, and the infos of the episodes just begun."""
        steps = self.episodes.step(actions)
        ended = np.flatnonzero(steps.terminated).tolist()
        if not ended:
            return steps, steps.observation, {}
        fresh, infos = self.begin(ended)
        observation = {key: value.copy() for key, value in steps.observation.items()}
        for key, value in fresh.items():
            observation[key][ended] = value
        return steps, observation, dict(zip(ended, infos, strict=True))


def _row(batch: Observation, index: int) -> Observation:
    return {key: value[index].copy() for key, value in batch.items()}


class TokenDecodingVectorEnv(VectorEnv[Observation, Any, Any]):
    """``gym.make_vec("TokenDecoding-v0", num_envs=…)``: SAME_STEP autoreset, ``final_obs`` and ``final_info``.

    ``info["action_mask"]`` is int8 [N, k]; :meth:`action_masks` gives it as bool.
    """

    metadata: dict[str, Any] = {"render_modes": ["ansi"], "autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012

    def __init__(self, num_envs: int = 1, *, max_episode_steps: int | None = None, **kwargs: Any) -> None:
        """Make ``num_envs`` environments of one model, tree and reward.

        Args:
            num_envs: N.
            max_episode_steps: Handed over by ``make_vec``; there must be none, as the horizon is part of the MDP.
            kwargs: See :class:`TokenDecodingEnv`.

        Raises:
            ConfigurationError: ``max_episode_steps`` is given, or see :class:`TokenDecodingEnv`.
        """
        if max_episode_steps is not None:
            raise ConfigurationError("use max_new_tokens, the horizon of the MDP, instead of max_episode_steps")
        self._core = _Core(num_envs, **kwargs)
        self.num_envs, env = self._core.count, self._core.env
        self.mdp, self.prompts, self.shaping, self.observer = env.mdp, env.prompts, env.shaping, env.observer
        self.render_mode = env.render_mode
        self.single_observation_space, self.single_action_space = env.observation_space, env.action_space
        self.observation_space = batch_space(env.observation_space, self.num_envs)
        self.action_space = batch_space(env.action_space, self.num_envs)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begin all episodes; ``options["prompt"]`` starts them all from one prompt.

        Raises:
            PromptError: The prompt is not one.
            ConfigurationError: There are other keys in ``options``, or too few seeds.
        """
        if unknown := set(options or {}) - {"prompt"}:
            raise ConfigurationError(f"reset's options may hold 'prompt', not {sorted(unknown)}")
        if seed is not None:
            self._core.seed(seed)
        observation, infos = self._core.begin(range(self.num_envs), (options or {}).get("prompt"))
        return observation, self._merge(infos)

    def step(
        self, actions: Any
    ) -> tuple[Observation, npt.NDArray[np.float64], npt.NDArray[np.bool_], npt.NDArray[np.bool_], dict[str, Any]]:
        """Step all environments; those that end begin anew.

        Raises:
            EpisodeError: Before ``reset``.
            IllegalActionError: An action is not an integer, out of range or masked; nothing has changed.
        """
        steps, observation, begun = self._core.step(actions)
        infos = [
            info if i not in begun else {**begun[i], "final_obs": _row(steps.observation, i), "final_info": info}
            for i, info in enumerate(steps.infos)
        ]
        truncated = np.zeros(self.num_envs, dtype=bool)
        return observation, steps.rewards, steps.terminated, truncated, self._merge(infos)

    def action_masks(self) -> npt.NDArray[np.bool_]:
        """Return which actions may be taken now, bool [N, k]."""
        return self._core.episodes.action_masks()

    def render(self) -> tuple[str, ...] | None:
        """Return the texts so far."""
        return _texts(self._core)

    def _merge(self, infos: list[dict[str, Any]]) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        for i, info in enumerate(infos):
            merged = self._add_info(merged, info, i)
        return merged


class TokenDecodingVecEnv(VecEnv):
    """The same as a native ``VecEnv`` of stable-baselines3."""

    def __init__(self, num_envs: int = 1, **kwargs: Any) -> None:
        """Make ``num_envs`` environments of one model, tree and reward; ``kwargs`` as for :class:`TokenDecodingEnv`."""
        self._core = _Core(num_envs, **kwargs)
        env = self._core.env
        self.mdp, self.prompts, self.shaping, self.observer = env.mdp, env.prompts, env.shaping, env.observer
        self._actions: Any = ()
        self._attributes: dict[str, list[Any]] = {}
        self._episode_returns = np.zeros(self._core.count)
        self._episode_lengths = np.zeros(self._core.count, dtype=np.int64)
        self.render_mode = env.render_mode  # set before: the base class asks for it
        super().__init__(self._core.count, env.observation_space, env.action_space)

    def reset(self) -> Observation:
        """Begin all episodes, with the seeds given to :meth:`seed`; infos are in ``reset_infos``."""
        if any(seed is not None for seed in self._seeds):
            self._core.seed(self._seeds)
        prompts = {i: (options or {}).get("prompt") for i, options in enumerate(self._options)}
        chosen = {id(p): p for p in prompts.values()}
        if len(chosen) == 1:
            observation, self.reset_infos = self._core.begin(range(self.num_envs), next(iter(chosen.values())))
        else:
            parts = [self._core.begin([i], prompt) for i, prompt in prompts.items()]
            observation = {key: np.concatenate([part[0][key] for part in parts]) for key in parts[0][0]}
            self.reset_infos = [part[1][0] for part in parts]
        self._reset_seeds()
        self._reset_options()
        self._episode_returns[:], self._episode_lengths[:] = 0, 0
        return observation

    def step_async(self, actions: npt.NDArray[Any]) -> None:
        """Take the actions for :meth:`step_wait`."""
        self._actions = actions

    def step_wait(self) -> tuple[Observation, npt.NDArray[np.float32], npt.NDArray[np.bool_], list[dict[str, Any]]]:
        """Step all environments; those that end begin anew."""
        steps, observation, begun = self._core.step(self._actions)
        self._episode_returns += steps.rewards
        self._episode_lengths += 1
        for i, info in begun.items():
            self.reset_infos[i] = info
            # What stable-baselines3's Monitor would add; its logs of returns rest on it.
            steps.infos[i]["episode"] = {
                "r": float(self._episode_returns[i]),
                "l": int(self._episode_lengths[i]),
                "t": 0.0,
            }
            steps.infos[i]["terminal_observation"] = _row(steps.observation, i)
            steps.infos[i]["TimeLimit.truncated"] = False
            self._episode_returns[i], self._episode_lengths[i] = 0, 0
        return observation, steps.rewards.astype(np.float32), steps.terminated, steps.infos

    def action_masks(self) -> npt.NDArray[np.bool_]:
        """Return which actions may be taken now, bool [N, k]."""
        return self._core.episodes.action_masks()

    def close(self) -> None:
        """Do nothing; the model is shared and stays."""

    def get_images(self) -> Sequence[npt.NDArray[np.uint8] | None]:
        """Return no images: texts have none."""
        return [None] * self.num_envs

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """Return an attribute of each environment."""
        which = list(self._get_indices(indices))
        if attr_name in self._attributes:
            return [self._attributes[attr_name][i] for i in which]
        return [getattr(self._core.env, attr_name)] * len(which)

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Note an attribute for some environments; those that define the process cannot be changed.

        Raises:
            ConfigurationError: The attribute is shared by all environments.
        """
        if hasattr(self._core.env, attr_name):
            raise ConfigurationError(f"{attr_name!r} is shared by all environments; make a new TokenDecodingVecEnv")
        values = self._attributes.setdefault(attr_name, [None] * self.num_envs)
        for i in self._get_indices(indices):
            values[i] = value

    def env_method(self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any) -> list[Any]:
        """Call a method of each environment; ``action_masks`` is one vectorised call."""
        which = list(self._get_indices(indices))
        if method_name == "action_masks":
            return list(self.action_masks()[which])
        method = getattr(self._core.env, method_name)
        return [method(*method_args, **method_kwargs) for _ in which]

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper[Any, Any, Any, Any]], indices: Any = None) -> list[bool]:
        """Return False for each, but for ``Monitor``, whose part is done here."""
        from stable_baselines3.common.monitor import Monitor

        return [issubclass(wrapper_class, Monitor)] * len(list(self._get_indices(indices)))


def _texts(core: _Core) -> tuple[str, ...] | None:
    if core.env.render_mode is None:
        return None
    return tuple(
        "" if prompt is None else prompt.text + (core.env.mdp.text(int(node)) if node >= 0 else "")
        for prompt, node in zip(core.episodes.prompt, core.episodes.node, strict=True)
    )
