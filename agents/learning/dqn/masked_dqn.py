"""DQN and QR-DQN for environments with invalid actions."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from gymnasium import spaces
from sb3_contrib import QRDQN
from sb3_contrib.common.maskable.utils import is_masking_supported
from sb3_contrib.common.utils import quantile_huber_loss
from stable_baselines3 import DQN
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, PyTorchObs
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor
from torch.nn import functional

from ....errors import ConfigurationError, TrainingDivergedError
from ..policies import TokenQPolicy, TokenQuantilePolicy
from .replay import Array, BoolArray, MaskedReplayBuffer, MaskedReplaySamples, Observations, as_action_masks

__all__ = ["MaskableDQN", "MaskableQRDQN"]

State = tuple[Array, ...] | None


class _Maskable(OffPolicyAlgorithm):
    """Masking for Q-learning with discrete actions, shared by both algorithms.

    Subclasses give the outputs of the two networks as quantiles [B, q, k] (q = 1 for plain values), and the loss
    between quantiles [B, q].
    """

    action_space: spaces.Discrete
    exploration_rate: float
    max_grad_norm: float | None

    def __init__(
        self,
        policy: str | type[BasePolicy],
        env: GymEnv | str | None,
        *args: Any,
        buffer_bytes: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Set up the agent.

        Args:
            policy: As for the parent class; :class:`TokenQPolicy` too.
            env: With ``action_masks()``, bool [k], True = the action is legal (sb3-contrib's convention).
            args: The parent class's.
            buffer_bytes: Memory of the replay buffer, instead of ``buffer_size``.
            kwargs: The parent class's. ``n_steps`` works with every observation space. ``optimize_memory_usage``
                changes nothing, as observations are stored once anyway.

        Raises:
            ConfigurationError: The environment has no ``action_masks()``, or an argument is out of range.
        """
        self.buffer_bytes = buffer_bytes
        self._last_masks: BoolArray | None = None  # of the states in ``_last_obs``; None: still to be asked for
        super().__init__(policy, env, *args, **kwargs)  # type: ignore[arg-type]

    def _online(self, observations: PyTorchObs) -> Tensor:
        raise NotImplementedError

    def _target(self, observations: PyTorchObs) -> Tensor:
        raise NotImplementedError

    def _loss(self, current: Tensor, target: Tensor) -> Tensor:
        raise NotImplementedError

    # -- setting up ---------------------------------------------------------------------------------------------------

    def _setup_model(self) -> None:
        if self.env is not None:
            _check_masking(self.env)
        self.replay_buffer_class = self.replay_buffer_class or MaskedReplayBuffer
        if not issubclass(self.replay_buffer_class, MaskedReplayBuffer):
            raise ConfigurationError(
                f"{type(self).__name__} needs the masks of next states, which {self.replay_buffer_class.__name__} does "
                "not store; use MaskedReplayBuffer (the default) or a subclass of it"
            )
        if self.replay_buffer is None:
            options = {"n_steps": self.n_steps, "gamma": self.gamma, "buffer_bytes": self.buffer_bytes}
            self.replay_buffer = self.replay_buffer_class(
                self.buffer_size,
                self.observation_space,
                self.action_space,
                device=self.device,
                n_envs=self.n_envs,
                **{**options, **self.replay_buffer_kwargs},
            )
        # The buffer above does both. stable-baselines3 would warn of a custom buffer with n_steps > 1. With
        # optimize_memory_usage it would mark the last stored step as terminated on each call of `learn`.
        self.optimize_memory_usage = False
        n_steps, self.n_steps = self.n_steps, 1
        super()._setup_model()
        self.n_steps = n_steps

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """Continue with another environment, of the same spaces and number; see the parent class.

        Raises:
            ConfigurationError: It has no ``action_masks()``.
        """
        env = self._wrap_env(env, self.verbose)
        _check_masking(env)
        super().set_env(env, force_reset)

    # -- acting -------------------------------------------------------------------------------------------------------

    def predict(
        self,
        observation: Observations,
        state: State = None,
        episode_start: Array | None = None,
        deterministic: bool = False,
        action_masks: npt.ArrayLike | None = None,
    ) -> tuple[Array, State]:
        """Choose a legal action: the best, or with probability ε a random one, drawn for each row.

        Args:
            observation: One, or a batch [n, …].
            state: Returned as it is; there is no recurrence.
            episode_start: Not used.
            deterministic: Always the best one.
            action_masks: bool [k] or [n, k]; by default those in the observation under ``"action_mask"``, and without
                such a key all actions are legal.

        Returns:
            Actions, int64 [n], or [] for one observation; and ``state``.

        Raises:
            ConfigurationError: The masks have another shape, or one of them allows nothing.
        """
        if isinstance(observation, tuple):  # type: ignore[unreachable]
            raise ConfigurationError(
                "predict takes an observation, got a tuple; Gymnasium's reset returns two: `obs, info = env.reset()`"
            )
        self.policy.set_training_mode(False)
        inputs, vectorized = self.policy.obs_to_tensor(observation)
        count = len(next(iter(inputs.values())) if isinstance(inputs, dict) else inputs)
        if action_masks is None and isinstance(observation, dict):
            action_masks = observation.get("action_mask")
        if action_masks is None:
            action_masks = np.ones((count, int(self.action_space.n)), dtype=bool)
        allowed = as_action_masks(np.atleast_2d(action_masks), int(self.action_space.n))
        if len(allowed) != count:
            raise ConfigurationError(f"{len(allowed)} action masks for {count} observations; give one for each")
        exploring = torch.zeros(count, dtype=torch.bool)
        if not deterministic:
            exploring = torch.rand(count) < self.exploration_rate
        actions = _random(allowed)
        if not exploring.all():
            with torch.no_grad():
                best = _best(self._online(inputs), torch.from_numpy(allowed).to(self.device))
            actions = np.where(exploring.numpy(), actions, best.cpu().numpy())
        return (actions if vectorized else actions.squeeze(0)), state

    def _sample_action(
        self, learning_starts: int, action_noise: ActionNoise | None = None, n_envs: int = 1
    ) -> tuple[Array, Array]:
        assert self.env is not None
        assert self._last_obs is not None
        if self._last_masks is None:
            self._last_masks = self._ask_masks()
        if self.num_timesteps < learning_starts:
            actions = _random(self._last_masks)
        else:
            actions, _ = self.predict(self._last_obs, deterministic=False, action_masks=self._last_masks)
        return actions, actions

    def _store_transition(
        self,
        replay_buffer: ReplayBuffer,
        buffer_action: Array,
        new_obs: Observations,
        reward: Array,
        dones: Array,
        infos: list[dict[str, Any]],
    ) -> None:
        self._last_masks = masks = self._ask_masks()
        # At the end of an episode these are the next one's: the mask of the last state is in its own info only.
        infos = [
            info if done else {**info, "action_mask": mask}
            for info, done, mask in zip(infos, dones, masks, strict=True)
        ]
        super()._store_transition(replay_buffer, buffer_action, new_obs, reward, dones, infos)

    def _ask_masks(self) -> BoolArray:
        """Return the masks of the environments' present states, bool [N, k]."""
        assert self.env is not None
        return as_action_masks(self.env.env_method("action_masks"), int(self.action_space.n))

    # -- learning -----------------------------------------------------------------------------------------------------

    def _setup_learn(self, *args: Any, **kwargs: Any) -> tuple[int, BaseCallback]:
        self._last_masks = None  # the environments may have been reset, or others
        return super()._setup_learn(*args, **kwargs)

    def learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 4,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> Self:
        """Train; see the parent class. TensorBoard's runs are named after the class by default.

        Raises:
            ConfigurationError: ``action_masks()`` returned something of the wrong shape, or all False.
            TrainingDivergedError: The loss is no longer finite.
        """
        name = type(self).__name__ if tb_log_name is None else tb_log_name
        return super().learn(total_timesteps, callback, log_interval, name, reset_num_timesteps, progress_bar)

    def train(self, gradient_steps: int, batch_size: int = 100) -> None:
        """Take gradient steps on batches from the replay buffer.

        Raises:
            TrainingDivergedError: The loss is not finite; the network is as the last finite loss left it.
        """
        assert isinstance(self.replay_buffer, MaskedReplayBuffer)
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        losses = []
        for _ in range(gradient_steps):
            batch = self.replay_buffer.sample(batch_size, env=self._vec_normalize_env)
            target = self._bellman_target(batch)
            loss = self._loss(_of_actions(self._online(batch.observations), batch.actions), target)
            losses.append(loss.item())
            if not np.isfinite(losses[-1]):
                raise TrainingDivergedError(
                    f"the loss became {losses[-1]} after {self._n_updates} updates; lower the learning rate, or "
                    "scale the rewards down, and check that rewards and observations are finite"
                )
            self.policy.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            if self.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm)
            self.policy.optimizer.step()
            self._n_updates += 1
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")
        self.logger.record("train/loss", float(np.mean(losses)))

    def _bellman_target(self, batch: MaskedReplaySamples) -> Tensor:
        """Return r + γⁿ · the value of the best *legal* next action, [B, q]."""
        with torch.no_grad():
            following = self._target(batch.next_observations)
            value = _of_actions(following, _best(following, batch.next_action_masks)[:, None])
            # Not a product with 1 - done: after the end there is no observation, and its value could be infinite.
            return batch.rewards + batch.discounts * torch.where(batch.dones > 0, 0.0, value)


class MaskableDQN(_Maskable, DQN):  # type: ignore[misc]  # DQN takes no None for max_grad_norm, QRDQN does
    """DQN (Mnih et al. 2015) with invalid action masking (Huang & Ontañón 2022).

    Masks hold in exploration, in the greedy action, and in the Bellman target; stable-baselines3's DQN takes the
    maximum over all actions there. Any environment with sb3-contrib's ``action_masks()`` works, also through wrappers
    and vectorised. Apart from that it is ``stable_baselines3.DQN``, with three differences: ε is drawn for each
    environment and not once for all, ``n_steps`` works with ``Dict`` observations, and the replay buffer is
    :class:`MaskedReplayBuffer`, whose size ``buffer_bytes`` can give.

    Papers: https://arxiv.org/abs/1312.5602, https://arxiv.org/abs/2006.14171.
    """

    def _online(self, observations: PyTorchObs) -> Tensor:
        values: Tensor = self.q_net(observations)
        return values.unsqueeze(1)

    def _target(self, observations: PyTorchObs) -> Tensor:
        values: Tensor = self.q_net_target(observations)
        return values.unsqueeze(1)

    def _loss(self, current: Tensor, target: Tensor) -> Tensor:
        return functional.smooth_l1_loss(current, target)


class MaskableQRDQN(_Maskable, QRDQN):
    """QR-DQN (Dabney et al. 2018) with invalid action masking (Huang & Ontañón 2022).

    It differs from ``sb3_contrib.QRDQN`` as :class:`MaskableDQN` does from DQN. Given :class:`TokenQPolicy`, it uses
    :class:`TokenQuantilePolicy`, the counterpart with quantiles.

    Papers: https://arxiv.org/abs/1710.10044, https://arxiv.org/abs/2006.14171.
    """

    def __init__(self, policy: str | type[BasePolicy], env: GymEnv | str | None, *args: Any, **kwargs: Any) -> None:
        super().__init__(TokenQuantilePolicy if policy is TokenQPolicy else policy, env, *args, **kwargs)

    def _online(self, observations: PyTorchObs) -> Tensor:
        quantiles: Tensor = self.quantile_net(observations)
        return quantiles

    def _target(self, observations: PyTorchObs) -> Tensor:
        quantiles: Tensor = self.quantile_net_target(observations)
        return quantiles

    def _loss(self, current: Tensor, target: Tensor) -> Tensor:
        return quantile_huber_loss(current, target, sum_over_quantiles=True)


def _random(masks: BoolArray) -> Array:
    """Return an allowed action per row, int64 [B], each as likely, from masks [B, k]."""
    return torch.multinomial(torch.from_numpy(masks).float(), 1).squeeze(1).numpy()


def _best(quantiles: Tensor, masks: Tensor) -> Tensor:
    """Return the allowed action of the highest mean, int64 [B], from quantiles [B, q, k] and masks [B, k]."""
    return quantiles.mean(dim=1).masked_fill(~masks, -torch.inf).argmax(dim=1)


def _of_actions(quantiles: Tensor, actions: Tensor) -> Tensor:
    """Return the quantiles [B, q] of one action per row, from quantiles [B, q, k] and actions [B, 1]."""
    index = actions.long().unsqueeze(1).expand(-1, quantiles.shape[1], 1)
    return quantiles.gather(dim=2, index=index).squeeze(2)


def _check_masking(env: VecEnv) -> None:
    if not is_masking_supported(env):
        raise ConfigurationError(
            "the environment has no action_masks(), which tells the actions that may be taken; add the method, or "
            "sb3_contrib's ActionMasker wrapper; without masks, use DQN or QRDQN"
        )
