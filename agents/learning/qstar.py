"""Q-learning whose experience comes from its own A* search."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import save_file
from stable_baselines3 import DQN
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.type_aliases import GymEnv, RolloutReturn, TrainFreq
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor

from ...envs import DecodingMDP, Prompt
from ...envs.mdp import mdp_of
from ...errors import ConfigurationError, TrainingDivergedError
from ..distributed.jobs import Job, Workers
from ..planning.astar import AStarPlanner
from ..search.budget import Budget
from ..search.plan import Plan
from .checkpoints import (
    EXPERIENCE,
    OPTIMIZER,
    STATE,
    flatten_optimizer,
    locate_checkpoint,
    read_whole,
    replacing,
    restore_optimizer,
    wrap_damage,
)
from .config import (
    RUNTIME,
    CollectConfig,
    QStarConfig,
    SavedTraining,
    check_env,
    check_policy,
    check_terms,
    setting_names,
)
from .experience import Batch, Collected, SearchExperience, Transitions, asymmetric_loss, collect
from .hub import push_folder
from .online.learner import OnlineLearner
from .policies import TokenQPolicy, TokenScorer
from .q_function import QFunction, QSpec, observed_terms, read_q_function
from .q_heuristic import QHeuristic, export_sb3

__all__ = ["QStar"]

_CHANGEABLE = setting_names(QStarConfig) - {"buffer_bytes", "learning_rate", "policy_kwargs", "seed"}
_DROPOUT = 0.4  # on the hidden state; docs/experiments.md
# Prompts that a worker searches together. Fixed, so that the result depends on the seed, not on the number of workers.
_SEARCHES_PER_JOB = 8


class QStar(DQN):
    """Q-learning in which A* collects the experience: search, back up, learn, repeat.

    Each round searches a batch of prompts with the current Q in one token tree. The best completion found is backed up
    through every tree: the process is deterministic, so this is exact for the edges seen. Q is then regressed onto
    these targets. A target is the best return *found*, a lower bound of the best there is, so the regression is an
    expectile's (:func:`asymmetric_loss`). Too high a Q costs the search an expansion, which corrects it; too low a Q
    loses a text for good.

    Q estimates the return less the potential φ(s), as in the shaped process, whether or not the environment's own
    rewards are shaped. :class:`QHeuristic` adds φ(s) back.

    The interface is that of stable-baselines3's off-policy algorithms. A time step is one token processed by the
    language model. ``save`` and ``load`` use safetensors and JSON instead of pickle.

    Attributes:
        config: The settings; each is also an attribute of the agent.
        experience: States with targets; None before the first round.
        workers: Processes that search; None for this one.
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {"TokenQPolicy": TokenQPolicy}

    def __init__(
        self,
        policy: type[TokenQPolicy] | str = TokenQPolicy,
        env: GymEnv | str | None = None,
        *,
        config: QStarConfig | None = None,
        workers: Workers | None = None,
        tensorboard_log: str | None = None,
        verbose: int = 0,
        device: torch.device | str = "auto",
        _init_setup_model: bool = True,
        **settings: Any,
    ) -> None:
        """Set up the agent.

        Args:
            policy: :class:`TokenQPolicy` or a subclass.
            env: ``TokenDecoding-v0``, single, vectorised or by name; its prompts are the training prompts.
            config: The settings; the defaults of :class:`QStarConfig` without it.
            workers: Do the searches; None for this process. Each holds a :class:`Searcher`, as in
                ``RayWorkers("auto", partial(Searcher, task.mdp))``. The result does not depend on their number, nor on
                workers that die.
            tensorboard_log: Folder for TensorBoard logs.
            verbose: 1 prints the training's figures.
            device: Of the Q-network.
            _init_setup_model: As in stable-baselines3.
            settings: Fields of :class:`QStarConfig`; they replace those of ``config``.

        Raises:
            ConfigurationError: An argument is unknown or out of range; there is no environment, or one that changes
                rewards or observations.
        """
        self.config = config = QStarConfig.of(settings, config)
        check_policy(policy, config.policy_kwargs or {})
        if env is not None or _init_setup_model:
            check_env(env)
        self.workers = workers
        self.experience: SearchExperience | None = None
        self.rng = np.random.default_rng(config.seed)
        self._queue: list[int] = []  # training prompts still to be searched in this pass
        super().__init__(
            policy,
            env,  # type: ignore[arg-type]
            learning_rate=config.schedule(),
            buffer_size=1,  # SB3's transition buffer stays empty
            learning_starts=0,
            batch_size=config.batch_size,
            gamma=1.0,
            train_freq=1,
            gradient_steps=config.gradient_steps,
            policy_kwargs={"dropout": _DROPOUT, **(config.policy_kwargs or {})},
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            seed=config.seed,
            device=device,
            _init_setup_model=_init_setup_model,
        )
        if env is not None:
            check_terms(config, observed_terms(self.env))

    def __getattr__(self, name: str) -> Any:
        """Return a setting; SB3 keeps some of them as attributes of its own."""
        if name in setting_names(QStarConfig):
            return getattr(self.config, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        """Change a setting, as a callback may do; see :class:`QStarConfig`."""
        if name in _CHANGEABLE and "config" in vars(self):
            super().__setattr__("config", replace(self.config, **{name: value}))
        super().__setattr__(name, value)

    # -- the learning loop --------------------------------------------------------------------------------------------

    def collect_rollouts(
        self,
        env: VecEnv,
        callback: BaseCallback,
        train_freq: TrainFreq,
        replay_buffer: ReplayBuffer,
        action_noise: ActionNoise | None = None,
        learning_starts: int = 0,
        log_interval: int | None = None,
    ) -> RolloutReturn:
        """Search a batch of prompts with the current Q and add the results to the experience."""
        del train_freq, replay_buffer, action_noise, learning_starts
        callback.on_rollout_start()
        prompts = self._next_prompts(env.get_attr("prompts")[0])
        mdp = mdp_of(env)
        rounds = self._search(mdp, prompts)
        targets = self.add([states for found in rounds for states in found.states])
        tokens = sum(found.tokens for found in rounds)
        self._episode_num += sum(found.texts for found in rounds)
        best = [completion for found in rounds for completion in found.best]
        if best:
            self.logger.record_mean("search/objective", float(np.mean([c.objective for c in best])))
            self.logger.record_mean("search/reward", float(np.mean([c.reward for c in best])))
        self.logger.record_mean("search/targets", targets)
        callback.update_locals(locals())
        # Callbacks and the progress bar count environment steps, so many at a time.
        go_on = True
        for _ in range(max(tokens // env.num_envs, 1)):
            self.num_timesteps += env.num_envs
            go_on = callback.on_step() and go_on
        self._update_current_progress_remaining(self.num_timesteps, self._total_timesteps)
        if log_interval is not None and (self._round() % log_interval == 0):
            self.dump_logs()
        callback.on_rollout_end()
        return RolloutReturn(tokens, len(best), continue_training=go_on)

    def train(self, gradient_steps: int, batch_size: int = 256) -> None:
        """Regress Q onto the best returns found."""
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        assert self.experience is not None
        scorer: TokenScorer = self.q_net.scorer  # type: ignore[assignment]
        if not self._n_updates and self.experience.size > 1:
            scorer.standardize(torch.from_numpy(self.experience.hidden).to(self.device))
        # Bring the errors of log-probability and terms to units of J.
        scales = torch.as_tensor([mdp_of(self.env).logprob_weight, *observed_terms(self.env).values()])
        scales = scales.float().to(self.device)
        losses, errors = [], []
        for _ in range(gradient_steps if self.experience.size else 0):
            batch = self.experience.sample(batch_size, self.rng, self.config.priority)
            loss, error = self._gradient_step(scorer, batch, scales)
            losses.append(loss)
            errors.append(error)
        if losses:
            self.logger.record("train/loss", float(np.mean(losses)))
            # Mean of target - Q over explored edges: above 0, Q underestimates the returns found.
            self.logger.record("train/underestimation", float(np.mean(errors)))
            self.logger.record("train/states", self.experience.size)
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    def _gradient_step(self, scorer: TokenScorer, batch: Batch, scales: Tensor) -> tuple[float, float]:
        """Take one step; return the loss and the mean of target - Q.

        With terms, the sign of the whole error, by the search's own weights, says whether Q is too low. What is learned
        is each part, its error multiplied by ``scales`` [1+r].
        """
        assert self.experience is not None
        inputs = {key: torch.from_numpy(value).to(self.device) for key, value in batch.observation.items()}
        targets = torch.from_numpy(batch.targets).to(self.device)
        targets = targets if scorer.config.terms else targets.unsqueeze(-1)
        head_outputs = scorer.head_outputs(inputs, ~torch.isnan(targets[..., 0]))  # [batch, k, heads]
        found = torch.from_numpy(batch.found).to(self.device).unsqueeze(-1)
        mask = ~torch.isnan(targets).expand_as(head_outputs)
        if scorer.heads > 1:  # each head learns from half of the states, so that they stay apart
            mask = mask & (torch.rand(len(head_outputs), 1, scorer.heads, device=self.device) < 0.5)
        errors, parts = torch.where(mask, targets - head_outputs, 0.0), None
        if scorer.config.terms:
            parts = (errors * scales).unsqueeze(2)
            errors = (errors * inputs["weights"].unsqueeze(1)).sum(dim=2, keepdim=True)
            mask = mask[..., :1]
        config, count = self.config, mask.sum().clamp(min=1)
        losses = asymmetric_loss(
            errors,
            found,
            optimism=config.optimism,
            estimate_weight=config.estimate_weight,
            regression=config.regression,
            parts=parts,
        )
        loss = losses.sum() / count
        if not torch.isfinite(loss):
            raise TrainingDivergedError(
                f"the loss became {loss.item()} after {self._n_updates} updates; lower the learning rate"
            )
        self.policy.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm)
        self.policy.optimizer.step()
        self._n_updates += 1
        if config.priority:
            wrong = torch.where(losses > 0, errors, 0.0).detach().abs().amax(dim=(1, 2))
            self.experience.prioritize(batch.rows, wrong.cpu().numpy())
        return loss.item(), float(errors.detach().sum() / count)

    def add(self, searches: Sequence[Transitions]) -> int:
        """Add the states of searches to the experience; return the number of their targets."""
        if self.experience is None:
            mdp = mdp_of(self.env)
            self.experience = SearchExperience(mdp, self.q_function().observer(mdp), self.config.buffer_bytes)
        return sum(self.experience.add(states) for states in searches)

    def _on_step(self) -> None:
        """Do nothing: there is no target network to update."""

    # -- using the result ---------------------------------------------------------------------------------------------

    def q_function(self) -> QFunction:
        """Return the Q learned so far, for :class:`QHeuristic` and for saving.

        Raises:
            ConfigurationError: The agent has no environment.
        """
        scorer: TokenScorer = self.q_net.scorer  # type: ignore[assignment]
        mdp, config = mdp_of(self.env), scorer.config
        terms = observed_terms(self.env)
        spec = QSpec.of(mdp, config.candidate_dims, True, config.context_tokens, terms)
        return QFunction(self.q_net, spec, shaped=True, candidate_dims=config.candidate_dims)

    def plan(self, prompt: Any, budget: Budget | int | None = None, **planner_kwargs: Any) -> Plan:
        """Search the best completion of ``prompt`` with the learned Q; see :class:`AStarPlanner`."""
        return AStarPlanner(self.env, heuristic=QHeuristic(self), **planner_kwargs).plan(prompt, budget)

    def online(self, **settings: Any) -> OnlineLearner:
        """Return a learner that lets this agent learn from a planner's searches; see :class:`OnlineLearner`."""
        return OnlineLearner(self, **settings)

    def save(self, path: Any, *_: Any, training_state: bool = True, **description: Any) -> None:
        """Write the agent into the folder ``path``, atomically, as safetensors and JSON.

        Args:
            path: The folder; an older checkpoint there is replaced.
            training_state: Also write experience, optimiser, counters and random states, so that ``load`` can go on.
            description: Origin and figures (seed, …) that the checkpoint states; JSON values.
        """
        with replacing(Path(path)) as new:
            self.q_function().write(new, description)
            if training_state:
                self._write_training(new)

    def push_to_hub(
        self,
        repository: str,
        *,
        training_state: bool = False,
        private: bool | None = None,
        token: str | None = None,
        message: str = "Upload an agent",
        **description: Any,
    ) -> str:
        """Upload the agent to the Hugging Face hub, with a model card; see :meth:`QFunction.push_to_hub`.

        Args:
            repository: ``"user/name"``; made if there is none.
            training_state: See :meth:`save`; without it, Q alone is uploaded.
            private: As there.
            token: As there.
            message: As there.
            description: See :meth:`save`; the card shows it.
        """
        write = partial(self.save, training_state=training_state, **description)
        return push_folder(repository, write, private=private, token=token, message=message)

    @classmethod
    def load(cls, path: Any, env: GymEnv | None = None, *_: Any, **kwargs: Any) -> Self:
        """Return the agent saved in the folder ``path``, ready to go on learning in ``env``; nothing is unpickled.

        Args:
            path: The folder.
            env: The environment, with the arguments it was trained with. To plan without one, load the Q alone:
                ``QHeuristic(path)``.
            kwargs: Replace saved arguments of the constructor.

        Raises:
            CheckpointError: The folder is not a checkpoint, is damaged, or belongs to another environment.
            ConfigurationError: There is no ``env``.
        """
        if env is None:
            raise ConfigurationError(
                f"{cls.__name__} needs the environment that it goes on learning in: give env=…; "
                "QHeuristic(folder) and QFunction.from_pretrained(folder) need none"
            )
        folder = Path(path)
        q, training = read_whole(folder, lambda found: (read_q_function(found), SavedTraining.read(found)))
        saved, network = training.state.arguments if training else QStarConfig(), q.scorer.config.policy_kwargs()
        runtime = {name: kwargs.pop(name) for name in RUNTIME & kwargs.keys()}
        with wrap_damage(folder):
            check_policy(runtime.get("policy", TokenQPolicy), saved.policy_kwargs or {})
        config = QStarConfig.of(kwargs, replace(saved, policy_kwargs={**(saved.policy_kwargs or {}), **network}))
        agent = cls(env=env, config=config, **runtime)
        q.check_env(agent.env)
        with wrap_damage(folder):
            for own in (agent.q_net, agent.q_net_target):
                own.scorer.load_state_dict(q.scorer.state_dict())  # type: ignore[union-attr]
            if training:
                agent._restore(training)
            else:
                agent._n_updates = 1  # a trained network, whose inputs are standardised
        return agent

    @classmethod
    def from_pretrained(cls, name: str | Path, env: GymEnv, **kwargs: Any) -> Self:
        """Return an agent by name: a shipped one's, a folder, or a hub id ``"user/name"``; see :meth:`load`.

        Raises:
            CheckpointError: It cannot be had, is damaged, or belongs to another environment.
            UnknownNameError: There is nothing of that name.
        """
        return cls.load(locate_checkpoint(name), env, **kwargs)

    def export_sb3(self, path: str | Path) -> Path:
        """Write the Q-network as a plain ``stable_baselines3.DQN`` zip; see :func:`export_sb3`."""
        return export_sb3(self, path, self.env)

    # -----------------------------------------------------------------------------------------------------------------

    def _write_training(self, folder: Path) -> None:
        optimizer, steps = flatten_optimizer(self.policy.optimizer)
        save_file(optimizer, folder / OPTIMIZER)
        experience = self.experience.state() if self.experience else {}
        save_arrays({name: np.ascontiguousarray(column) for name, column in experience.items()}, folder / EXPERIENCE)
        state = {
            "arguments": self.config.as_json(),
            "num_timesteps": self.num_timesteps,
            "total_timesteps": self._total_timesteps,
            "n_updates": self._n_updates,
            "episodes": self._episode_num,
            "position": self.experience.position if self.experience else 0,
            "queue": self._queue,
            "optimizer_steps": steps,
            "numpy_rng": self.rng.bit_generator.state,
            "torch_rng": torch.get_rng_state().tolist(),
        }
        (folder / STATE).write_text(json.dumps(state), encoding="utf-8")

    def _restore(self, training: SavedTraining) -> None:
        state = training.state
        if training.experience:
            self.add([])
            assert self.experience is not None
            self.experience.restore(training.experience, state.position)
        restore_optimizer(self.policy.optimizer, training.optimizer, state.optimizer_steps)
        self.num_timesteps, self._total_timesteps = state.num_timesteps, state.total_timesteps
        self._n_updates, self._episode_num = state.n_updates, state.episodes
        prompts = len(self.env.get_attr("prompts")[0])  # type: ignore[union-attr]
        self._queue = [index for index in state.queue if index < prompts]
        self.rng.bit_generator.state = state.numpy_rng
        torch.set_rng_state(torch.tensor(state.torch_rng, dtype=torch.uint8))

    def _round(self) -> int:
        return self._n_updates // max(self.gradient_steps, 1)

    def _search(self, mdp: DecodingMDP, prompts: Sequence[Prompt]) -> list[Collected]:
        """Search the prompts with the current Q, here or by the workers."""
        config = CollectConfig(**{name: getattr(self.config, name) for name in setting_names(CollectConfig)})
        q = self.q_function()
        if self.workers is None:
            return [collect(mdp, q, config, prompts, self.rng)]
        self.workers.share(q)
        parts = [prompts[i : i + _SEARCHES_PER_JOB] for i in range(0, len(prompts), _SEARCHES_PER_JOB)]
        seeds = self.rng.integers(2**63, size=len(parts)).tolist()
        jobs = [
            Job("search", (part, config, seed), f"the search of {', '.join(repr(prompt.text) for prompt in part)}")
            for part, seed in zip(parts, seeds, strict=True)
        ]
        found = {id(job): result for job, result in self.workers.run(jobs)}
        return [found[id(job)] for job in jobs]

    def _next_prompts(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Take the next prompts of a shuffled pass through all of them."""
        count = min(self.config.searches_per_round, len(prompts))
        while len(self._queue) < count:
            self._queue.extend(self.rng.permutation(len(prompts)).tolist())
        chosen = list(dict.fromkeys(self._queue[:count]))
        del self._queue[:count]
        return [prompts[i] for i in chosen]
