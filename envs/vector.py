"""Vector environments of Gymnasium and stable-baselines3 on one core, :class:`Episodes`.

A vector step costs one forward of the language model and one call of the reward for all environments together. An
episode that ends begins anew in the same step. The observation after the end is in ``final_obs`` (Gymnasium) or
``terminal_observation`` (stable-baselines3).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from stable_baselines3.common.vec_env import VecEnv

from ..checks import check_integer
from ..errors import ConfigurationError
from ..models.base import IntArray
from .episodes import Episodes, EpisodeState, Steps
from .observations import Observation
from .prompts import Prompt, prompt_of_options
from .rendering import Screen
from .token_decoding import TokenDecodingEnv

__all__ = ["TokenDecodingVecEnv", "TokenDecodingVectorEnv"]


class _Core:
    """``N`` environments that share one MDP and draw their prompts from generators of their own."""

    def __init__(self, num_envs: int, **kwargs: Any) -> None:
        self.count = check_integer("num_envs", num_envs)
        self.env = TokenDecodingEnv(**kwargs)  # arguments, spaces, prompts; never stepped itself
        env = self.env
        self.episodes = Episodes(env.mdp, env.observer, self.count, shaping=env.shaping, gamma=env.gamma)
        self.generators = [seeding.np_random()[0] for _ in range(self.count)]

    def seed(self, seed: Any) -> None:
        """Seed environment i with ``seed + i``, or with ``seed[i]``; None changes nothing."""
        if seed is None or isinstance(seed, (int, np.integer)):
            seeds = [None if seed is None else int(seed) + i for i in range(self.count)]
        elif isinstance(seed, Iterable):
            seeds = [int(value) if isinstance(value, np.integer) else value for value in seed]
        else:
            raise ConfigurationError(f"seed is an integer, a list with one per environment, or None; got {seed!r}")
        if len(seeds) != self.count:
            raise ConfigurationError(f"{self.count} seeds are needed, one per environment; got {len(seeds)}")
        for i, value in enumerate(seeds):
            if value is not None:  # None leaves a generator as it is
                self.generators[i] = seeding.np_random(value)[0]

    def begin(self, given: Sequence[Prompt | None]) -> Observation:
        """Start all episodes, each with the prompt given, or a random one where that is None."""
        drawn = iter(self.draw(i for i, prompt in enumerate(given) if prompt is None))
        return self.episodes.begin(range(self.count), [next(drawn) if p is None else p for p in given])

    def draw(self, which: Iterable[int]) -> list[Prompt]:
        """Return a random prompt for each of the environments ``which``; several may draw the same."""
        prompts = self.env.prompts
        return [prompts[int(self.generators[i].integers(len(prompts)))] for i in which]

    def step(self, actions: Any) -> Steps:
        """Step all; those that end begin anew. After an error, episodes and generators are as they were."""
        drawn: dict[int, Any] = {}

        def restart(ending: IntArray) -> list[Prompt]:
            drawn.update((int(i), self.generators[i].bit_generator.state) for i in ending)
            return self.draw(ending)

        try:
            return self.episodes.step(actions, restart)
        except BaseException:
            for i, state in drawn.items():
                self.generators[i].bit_generator.state = state
            raise

    def prompt_text(self, index: int) -> str:
        """Return the prompt of an environment that has begun."""
        prompt = self.episodes.prompt[index]
        return "" if prompt is None else prompt.text

    def texts(self) -> tuple[str, ...]:
        """Return each environment's prompt and text so far."""
        return tuple(
            "" if prompt is None else prompt.text + (self.env.mdp.text(int(node)) if node >= 0 else "")
            for prompt, node in zip(self.episodes.prompt, self.episodes.node, strict=True)
        )

    def images(self) -> tuple[npt.NDArray[np.uint8], ...]:
        """Return a picture of each environment, uint8 [H, W, 3]."""
        return tuple(Screen.of(self.env.mdp, self.episodes, i).as_image() for i in range(self.count))

    def terminal_observation(self) -> Observation:
        """Return the observation of one environment after its end."""
        return {key: value[0] for key, value in self.env.observer.terminal_observation(1).items()}


class TokenDecodingVectorEnv(VectorEnv[Observation, Any, Any]):
    """``gym.make_vec("TokenDecoding-v0", num_envs=…)``: SAME_STEP autoreset, ``final_obs`` and ``final_info``.

    ``info["action_mask"]`` is int8 [N, k]; :meth:`action_masks` gives it as bool.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012
        "render_modes": ["ansi", "rgb_array"],
        "render_fps": 4,
        "autoreset_mode": AutoresetMode.SAME_STEP,
    }

    def __init__(self, num_envs: int = 1, *, max_episode_steps: int | None = None, **kwargs: Any) -> None:
        """Make ``num_envs`` environments of one model, tree and reward.

        Args:
            num_envs: N.
            max_episode_steps: Passed by ``make_vec``; must be None, as the horizon is part of the MDP.
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
        prompt = prompt_of_options(options)
        if seed is not None:
            self._core.seed(seed)
        observation = self._core.begin([prompt] * self.num_envs)
        everywhere = np.ones(self.num_envs, dtype=bool)
        return observation, {**self._masks(observation), **self._prompts(everywhere)}

    def step(
        self, actions: Any
    ) -> tuple[Observation, npt.NDArray[np.float64], npt.NDArray[np.bool_], npt.NDArray[np.bool_], dict[str, Any]]:
        """Step all environments; those that end begin anew.

        Raises:
            EpisodeError: Before ``reset``.
            IllegalActionError: An action is not an integer, out of range or masked; nothing has changed.
        """
        core, steps = self._core, self._core.step(actions)
        done, truncated = steps.terminated, np.zeros(self.num_envs, dtype=bool)
        texts = np.array(steps.texts, dtype=object)
        # Gymnasium's layout of vector infos: an array for each key, valid where the array ``_key`` is True.
        taken = {"token": steps.tokens, "token_text": texts, "logprob": steps.logprobs.astype(np.float64)}
        info = self._masks(steps.observation)
        if not done.any():
            return steps.observation, steps.rewards, done, truncated, info | _marked(taken, ~done)
        final_obs = np.full(self.num_envs, None, dtype=object)
        for i in steps.ended:
            final_obs[i] = core.terminal_observation()
        numbers = {"reward", "objective"}  # NaN for a completion that could not be scored
        first = next(iter(steps.ended.values()))
        last: dict[str, Any] = {
            key: np.full(self.num_envs, np.nan if key in numbers else None, dtype=float if key in numbers else object)
            for key in first
        }
        parts = {name: np.full(self.num_envs, np.nan) for name in first["rewards"]}
        for i, summary in steps.ended.items():
            for key, value in summary.items():
                last[key][i] = value
            for name, value in summary["rewards"].items():
                parts[name][i] = value
        last["rewards"] = _marked(parts, done)
        last["action_mask"] = np.ones_like(info["action_mask"])
        info |= self._prompts(done) | _marked(taken, ~done)
        info |= _marked({"final_obs": final_obs, "final_info": _marked({**taken, **last}, done)}, done)
        return steps.observation, steps.rewards, done, truncated, info

    def get_state(self) -> EpisodeState:
        """Return the state of the episodes; see :meth:`TokenDecodingEnv.get_state`."""
        return self._core.episodes.get_state()

    def set_state(self, state: EpisodeState) -> None:
        """Restore ``state``; see :meth:`TokenDecodingEnv.set_state`."""
        self._core.episodes.set_state(state)

    def action_masks(self) -> npt.NDArray[np.bool_]:
        """Return the legal actions, bool [N, k]."""
        return self._core.episodes.action_masks()

    def render(self) -> tuple[Any, ...] | None:
        """Return the texts so far (``"ansi"``), or pictures of the environments, each uint8 [H, W, 3]."""
        core = self._core
        if self.render_mode is None:
            return None
        return core.images() if self.render_mode == "rgb_array" else core.texts()

    def _masks(self, observation: Observation) -> dict[str, Any]:
        mask = observation["action_mask"]
        return {"action_mask": mask.copy(), "_action_mask": np.ones(self.num_envs, dtype=bool)}

    def _prompts(self, which: npt.NDArray[np.bool_]) -> dict[str, Any]:
        texts = np.full(self.num_envs, None, dtype=object)
        for i in np.flatnonzero(which).tolist():
            texts[i] = self._core.prompt_text(i)
        return _marked({"prompt": texts}, which)


def _marked(arrays: dict[str, Any], which: npt.NDArray[np.bool_]) -> dict[str, Any]:
    """Add to each array, under its name after an underscore, the environments in which it is valid."""
    return arrays | {f"_{key}": which.copy() for key in arrays}


class TokenDecodingVecEnv(VecEnv):
    """``N`` environments as a native ``VecEnv`` of stable-baselines3."""

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
        """Begin all episodes, with the seeds of :meth:`seed` and the options of ``set_options``.

        The infos are in ``reset_infos``.

        Raises:
            PromptError: A prompt in the options is not one.
            ConfigurationError: There are other keys in the options, or too few of them.
        """
        if len(self._options) != self.num_envs:
            raise ConfigurationError(
                f"{self.num_envs} options are needed, one per environment; got {len(self._options)} of set_options"
            )
        prompts = [prompt_of_options(options) for options in self._options]
        if any(seed is not None for seed in self._seeds):
            self._core.seed(self._seeds)
        observation = self._core.begin(prompts)
        for i, mask in enumerate(observation["action_mask"]):
            self.reset_infos[i] = {"action_mask": mask.copy(), "prompt": self._core.prompt_text(i)}
        self._reset_seeds()
        self._reset_options()
        self._episode_returns[:], self._episode_lengths[:] = 0, 0
        return observation

    def step_async(self, actions: npt.NDArray[Any]) -> None:
        """Take the actions for :meth:`step_wait`."""
        self._actions = actions

    def step_wait(self) -> tuple[Observation, npt.NDArray[np.float32], npt.NDArray[np.bool_], list[dict[str, Any]]]:
        """Step all environments; those that end begin anew."""
        core, steps = self._core, self._core.step(self._actions)
        self._episode_returns += steps.rewards
        self._episode_lengths += 1
        masks = steps.observation["action_mask"].copy()
        infos = [core.episodes.token_info(steps, i) | {"action_mask": mask} for i, mask in enumerate(masks)]
        for i in steps.ended:
            self.reset_infos[i] = {"action_mask": masks[i], "prompt": core.prompt_text(i)}
            last = core.terminal_observation()
            infos[i] |= {"action_mask": last["action_mask"].copy(), "terminal_observation": last}
            infos[i]["TimeLimit.truncated"] = False
            # The entry that stable-baselines3's Monitor would add; its logs of returns read it.
            length = int(self._episode_lengths[i])
            infos[i]["episode"] = {"r": float(self._episode_returns[i]), "l": length, "t": 0.0}
            self._episode_returns[i], self._episode_lengths[i] = 0, 0
        return steps.observation, steps.rewards.astype(np.float32), steps.terminated, infos

    def action_masks(self) -> npt.NDArray[np.bool_]:
        """Return the legal actions, bool [N, k]."""
        return self._core.episodes.action_masks()

    def get_state(self) -> EpisodeState:
        """Return the state of the episodes; see :meth:`TokenDecodingEnv.get_state`."""
        return self._core.episodes.get_state()

    def set_state(self, state: EpisodeState) -> None:
        """Restore ``state``; see :meth:`TokenDecodingEnv.set_state`.

        The returns and lengths in ``info["episode"]`` are not restored.
        """
        self._core.episodes.set_state(state)

    def close(self) -> None:
        """Do nothing; the model is shared and stays."""

    def get_images(self) -> Sequence[npt.NDArray[np.uint8] | None]:
        """Return pictures of the environments, each uint8 [H, W, 3]; None without ``render_mode="rgb_array"``."""
        return self._core.images() if self.render_mode == "rgb_array" else [None] * self.num_envs

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """Return an attribute of each environment."""
        which = list(self._get_indices(indices))
        if attr_name in self._attributes:
            return [self._attributes[attr_name][i] for i in which]
        return [getattr(self._core.env, attr_name)] * len(which)

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """Store an attribute for some environments; attributes that define the process cannot be changed.

        Raises:
            ConfigurationError: The attribute is shared by all environments.
        """
        if hasattr(self._core.env, attr_name):
            raise ConfigurationError(f"{attr_name!r} is shared by all environments; make a new TokenDecodingVecEnv")
        values = self._attributes.setdefault(attr_name, [None] * self.num_envs)
        for i in self._get_indices(indices):
            values[i] = value

    def env_method(self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any) -> list[Any]:
        """Call a method of each environment; ``action_masks`` is one vectorised call, and ``render`` shows each.

        Raises:
            ConfigurationError: The method steps an episode or reads its state; the episodes are stepped together.
        """
        which = list(self._get_indices(indices))
        if method_name == "action_masks":
            return list(self.action_masks()[which])
        if method_name == "render" and (mode := self.render_mode) is not None:
            # Not of the environment that holds the arguments: its own episode never begins.
            return [Screen.of(self.mdp, self._core.episodes, i).show(mode) for i in which]
        if method_name in ("reset", "step", "get_state", "set_state"):
            raise ConfigurationError(f"the episodes are stepped together: call {method_name} on TokenDecodingVecEnv")
        method = getattr(self._core.env, method_name)
        return [method(*method_args, **method_kwargs) for _ in which]

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper[Any, Any, Any, Any]], indices: Any = None) -> list[bool]:
        """Return False for each wrapper except ``Monitor``, whose work is done here."""
        from stable_baselines3.common.monitor import Monitor

        return [issubclass(wrapper_class, Monitor)] * len(list(self._get_indices(indices)))
