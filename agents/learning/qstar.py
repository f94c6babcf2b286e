"""Q-learning whose experience comes from its own A* search."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from stable_baselines3 import DQN
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.type_aliases import GymEnv, RolloutReturn, Schedule, TrainFreq
from stable_baselines3.common.utils import LinearSchedule
from stable_baselines3.common.vec_env import VecEnv

from ...checks import check_integer, check_number
from ...envs import Completion, DecodingMDP, Observer, Prompt
from ...envs.mdp import mdp_of
from ...errors import ConfigurationError, TrainingDivergedError
from ..distributed.jobs import Job, Workers
from ..planning.astar import AStarPlanner
from ..search.budget import Budget
from ..search.loop import score_completions
from ..search.plan import Plan
from ..search.problem import Score
from ..search.state import Edges, IntArray, Search, Status, Values
from .experience import SearchExperience, Transitions, extract_targets
from .policies import TokenQPolicy, TokenScorer
from .q_function import QFunction, QSpec
from .q_heuristic import QHeuristic

__all__ = ["QStar", "Searcher"]

_DROPOUT = 0.4  # on the hidden state; docs/experiments.md
# Prompts that a worker searches together. Fixed, so that what is learnt depends on the seed, not on how many workers
# there are.
_SEARCHES_PER_JOB = 8


class QStar(DQN):
    """Q-learning in which A* collects the experience: search, back up, learn, repeat.

    Each round searches a batch of prompts with the current Q in one token tree, backs the best completion found up
    through every tree (the process is deterministic, so this is exact for what was seen), and regresses Q onto it. The
    regression is an expectile's: a target is the best return *found*, a lower bound of the best there is, so falling
    short of it is punished more than exceeding it, as in IQL (Kostrikov, Nair & Levine 2022, eq. 5). Too high a Q costs
    the search an expansion and is corrected by it; too low a Q loses a text for good.

    Q estimates the return less the potential φ(s), that of the shaped process, whether or not
    the environment's own rewards are shaped; :class:`QHeuristic` adds φ(s) back.

    The interface is that of stable-baselines3's off-policy algorithms: ``learn``, ``predict``, ``set_env``, callbacks,
    logger, progress bar. A time step is one token processed by the language model. ``save`` and ``load`` use
    safetensors and JSON instead of pickle.
    """

    def __init__(
        self,
        policy: type[TokenQPolicy] | str = TokenQPolicy,
        env: GymEnv | str | None = None,
        *,
        learning_rate: float | tuple[float, float] | Schedule = (1e-3, 1e-4),
        batch_size: int = 256,
        gradient_steps: int = 96,
        searches_per_round: int = 32,
        tokens_per_search: int = 96,
        width: int = 1,
        margin: float = 0.05,
        score: Score = "reward",
        regression: Literal["expectile", "quantile"] = "expectile",
        optimism: float = 0.8,
        estimate_weight: float = 0.2,
        noise: float = 0.05,
        q_free_share: float = 0.1,
        episode_share: float = 0.0,
        epsilon: float = 0.2,
        priority: float = 0.0,
        buffer_bytes: int = 1 << 29,
        workers: Workers | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        tensorboard_log: str | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: torch.device | str = "auto",
        _init_setup_model: bool = True,
    ) -> None:
        """Set up the agent.

        Args:
            policy: :class:`TokenQPolicy` or a subclass.
            env: ``TokenDecoding-v0``, single or vectorised; its prompts are the training prompts.
            learning_rate: Of Adam; a number, a pair (start, end) to go from one to the other linearly, or a schedule of
                the progress remaining (1 to 0).
            batch_size: Transitions per gradient step, each with all its explored edges.
            gradient_steps: After each round.
            searches_per_round: Prompts searched together in one tree.
            tokens_per_search: LM-token budget of each.
            width: Of the first round of each search; see :class:`AStarPlanner`. 1 follows arg max Q to the end first,
                so that Q hears where it leads.
            margin: How far f may be below the incumbent before an edge is put off; see :class:`AStarPlanner`.
            score: ``"reward"``: the search prunes by the best return found. ``"q"``: by Q alone, as a planner that has
                no reward at hand will; what it found is scored afterwards. See :class:`Decoder`.
            regression: ``"expectile"`` weighs squared errors, ``"quantile"`` absolute ones (Koenker & Bassett 1978).
            optimism: τ in (0, 1), the expectile or quantile: 0.5 treats errors of both signs alike, 1 is the maximum.
            estimate_weight: Weight of an error by which Q exceeds the estimate where a search broke off; the errors on
                what it found weigh ``optimism`` and 1 - ``optimism``. Estimates never raise Q. A larger weight teaches
                Q to shun what it cannot finish: fewer steps to a good search, a more timid arg max.
            noise: Scale of the Gumbel noise added to Q in half of the searches, in units of J. The other half searches
                as the planner will, so that Q hears of its own mistakes.
            q_free_share: Share of the searches that follow log-prob and potential instead of Q.
            episode_share: Share of the prompts that get ε-greedy episodes of the same budget instead of a search.
            epsilon: ε of these episodes.
            priority: Exponent of prioritised replay (Schaul et al. 2016): states are drawn in proportion to their last
                error to this power, 0 uniformly. No importance weights: the targets are not random, and what is
                prioritised is to be fitted. Pays where few states matter, as when one answer in many is right.
            buffer_bytes: Memory for experience.
            workers: Who does the searches; None for this process. Each holds a :class:`Searcher`, as in
                ``RayWorkers("auto", partial(Searcher, task.mdp))``. What is learnt does not depend on how many there
                are, nor on those that die.
            policy_kwargs: Handed to the policy: ``width``, ``dropout`` (0.4 unless given: a few hundred prompts are
                easily learnt by heart), ``dueling``, and ``heads``, the size of an ensemble of which the largest answer
                counts.
            tensorboard_log: Folder for TensorBoard logs.
            verbose: 1 prints the training's figures.
            seed: Of the network, the prompts' order and the noise.
            device: Of the Q-network.
            _init_setup_model: As in stable-baselines3.

        Raises:
            ConfigurationError: An argument is out of range.
        """
        if regression not in ("expectile", "quantile"):
            raise ConfigurationError(f"regression is 'expectile' or 'quantile', got {regression!r}")
        if not 0 < check_number("optimism", optimism, low=0, high=1) < 1:
            raise ConfigurationError(f"optimism is above 0 and below 1, got {optimism!r}")
        for name, share in {"q_free_share": q_free_share, "episode_share": episode_share, "epsilon": epsilon}.items():
            check_number(name, share, low=0, high=1)
        check_number("noise", noise, low=0)
        check_number("estimate_weight", estimate_weight, low=0)
        check_number("priority", priority, low=0)
        for name, value in {
            "gradient_steps": gradient_steps,
            "searches_per_round": searches_per_round,
            "tokens_per_search": tokens_per_search,
        }.items():
            check_integer(name, value)
        self.searches_per_round, self.tokens_per_search = searches_per_round, tokens_per_search
        self.width, self.margin, self.score = width, margin, score
        self.regression, self.optimism, self.noise = regression, optimism, noise
        self.estimate_weight = estimate_weight
        self.q_free_share, self.episode_share, self.epsilon = q_free_share, episode_share, epsilon
        self.priority = priority
        self.buffer_bytes = buffer_bytes
        self.workers = workers
        self.learning_rate_spec = learning_rate
        if isinstance(learning_rate, (tuple, list)):
            start, end = learning_rate
            learning_rate = LinearSchedule(start, end, end_fraction=1.0)
        self.experience: SearchExperience | None = None
        self.rng = np.random.default_rng(seed)
        self._queue: list[int] = []  # training prompts still to be searched in this pass
        super().__init__(
            policy,
            env,  # type: ignore[arg-type]
            learning_rate=learning_rate,
            buffer_size=1,  # SB3's transition buffer stays empty
            learning_starts=0,
            batch_size=batch_size,
            gamma=1.0,
            train_freq=1,
            gradient_steps=gradient_steps,
            policy_kwargs={"dropout": _DROPOUT, **(policy_kwargs or {})},
            tensorboard_log=tensorboard_log,
            verbose=verbose,
            seed=seed,
            device=device,
            _init_setup_model=_init_setup_model,
        )

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
        """Search a batch of prompts with the current Q and remember what was found."""
        del train_freq, replay_buffer, action_noise, learning_starts
        callback.on_rollout_start()
        prompts = self._next_prompts(env.get_attr("prompts")[0])
        mdp = mdp_of(env)
        if self.experience is None:
            self.experience = SearchExperience(mdp, self._observer(mdp), self.buffer_bytes)
        rounds = self._search(mdp, prompts)
        targets = sum(self.experience.add(states) for found in rounds for states in found.states)
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
        losses, errors = [], []
        for _ in range(gradient_steps if self.experience.size else 0):
            batch = self.experience.sample(batch_size, self.rng, self.priority)
            inputs = {key: torch.from_numpy(value).to(self.device) for key, value in batch.observation.items()}
            answers = scorer.answers(inputs)  # [batch, k, heads]
            wanted = torch.from_numpy(batch.targets).to(self.device).unsqueeze(-1)
            heard = ~torch.isnan(wanted).expand_as(answers)
            if scorer.heads > 1:  # each head learns from half of the states, so that they stay apart
                heard = heard & (torch.rand(len(answers), 1, scorer.heads, device=self.device) < 0.5)
            error = torch.where(heard, wanted - answers, 0.0)
            count = heard.sum().clamp(min=1)
            # An estimate is Q's own. It may lower Q, never raise it: a Q that raises itself soon prefers whatever it
            # has not tried to what it has.
            found = torch.from_numpy(batch.found).to(self.device).unsqueeze(-1)
            down = torch.where(found, 1 - self.optimism, self.estimate_weight)
            weight = torch.where(error > 0, self.optimism * found, down)
            size = error.square() if self.regression == "expectile" else error.abs()
            loss = (weight * size).sum() / count
            if not torch.isfinite(loss):
                raise TrainingDivergedError(
                    f"the loss became {loss.item()} after {self._n_updates} updates; lower the learning rate"
                )
            self.policy.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm)
            self.policy.optimizer.step()
            self._n_updates += 1
            if self.priority:
                wrong = torch.where(weight > 0, error.detach().abs(), 0.0).amax(dim=(1, 2))
                self.experience.prioritize(batch.rows, wrong.cpu().numpy())
            losses.append(loss.item())
            errors.append(float(error.detach().sum() / count))
        if losses:
            self.logger.record("train/loss", float(np.mean(losses)))
            # Mean of target - Q over explored edges: above 0, Q underestimates what was found.
            self.logger.record("train/underestimation", float(np.mean(errors)))
            self.logger.record("train/states", self.experience.size)
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    def _on_step(self) -> None:
        """Do nothing: there is no target network to update."""

    # -- using the result ---------------------------------------------------------------------------------------------

    def q_function(self) -> QFunction:
        """Return the Q learned so far, for :class:`QHeuristic` and for saving.

        Raises:
            ConfigurationError: The agent has no environment.
        """
        mdp, dims = mdp_of(self.env), self._candidate_dims
        return QFunction(self.q_net, QSpec.of(mdp, dims, shaped=True), shaped=True, candidate_dims=dims)

    def plan(self, prompt: Any, budget: Budget | int | None = None, **planner_kwargs: Any) -> Plan:
        """Search the best completion of ``prompt`` with the learned Q; see :class:`AStarPlanner`."""
        return AStarPlanner(self.env, heuristic=QHeuristic(self), **planner_kwargs).plan(prompt, budget)

    def arguments(self) -> dict[str, Any]:
        """Return the constructor's arguments as JSON values, for a checkpoint."""
        searching = (
            "searches_per_round",
            "tokens_per_search",
            "width",
            "margin",
            "score",
            "noise",
            "q_free_share",
            "episode_share",
            "epsilon",
            "priority",
            "buffer_bytes",
        )
        names = (
            *searching,
            "batch_size",
            "gradient_steps",
            "regression",
            "optimism",
            "estimate_weight",
            "policy_kwargs",
            "seed",
        )
        rate = self.learning_rate_spec  # a schedule of the caller's own cannot be written down
        return {**{name: getattr(self, name) for name in names}, **({} if callable(rate) else {"learning_rate": rate})}

    def save(self, path: Any, *_: Any, training_state: bool = True, **description: Any) -> None:
        """Write the agent into the folder ``path``, atomically, as safetensors and JSON.

        Args:
            path: The folder; an older checkpoint there is replaced.
            training_state: Also write experience, optimiser, counters and random states, so that ``load`` can go on.
            description: What the checkpoint should say of itself (seed, figures, …); JSON values.
        """
        from .checkpoints import save_agent

        save_agent(self, Path(path), training_state=training_state, description=description)

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
        """Upload the agent to the Hugging Face hub, with a model card; ``from_pretrained`` has it back.

        Args:
            repository: ``"user/name"``; made if there is none.
            training_state: See :meth:`save`; without it, what is uploaded is Q.
            private: Whether a new repository is private; None is the account's own setting.
            token: Instead of the one that ``hf auth login`` has stored.
            message: Of the commit.
            description: See :meth:`save`; the card shows it.

        Returns:
            The repository's address.

        Raises:
            ConfigurationError: ``repository`` is no such name.
            CheckpointError: The hub cannot be reached, or does not let us.
        """
        from .hub import push_folder

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
        from .checkpoints import load_agent

        return load_agent(cls, Path(path), env, kwargs)

    @classmethod
    def from_pretrained(cls, name: str | Path, env: GymEnv, **kwargs: Any) -> Self:
        """Return an agent by name: a shipped one's, a folder, or a hub id ``"user/name"``; see :meth:`load`.

        Raises:
            CheckpointError: It cannot be had, is damaged, or belongs to another environment.
            UnknownNameError: There is nothing of that name.
        """
        from .checkpoints import load_agent, locate_checkpoint

        return load_agent(cls, locate_checkpoint(name), env, kwargs)

    def export_sb3(self, path: str | Path) -> Path:
        """Write the Q-network as a plain ``stable_baselines3.DQN`` zip; return its path.

        For export only: such files are pickles, and nothing here reads them.
        """
        from .checkpoints import export_sb3

        return export_sb3(self, path, self.env)

    # -----------------------------------------------------------------------------------------------------------------

    @property
    def _candidate_dims(self) -> int:
        return int(self.q_net.scorer_kwargs["candidate_dims"])  # type: ignore[index]

    def _observer(self, mdp: DecodingMDP) -> Observer:
        return Observer(mdp, self._candidate_dims)

    def _round(self) -> int:
        return self._n_updates // max(self.gradient_steps, 1)

    def _search(self, mdp: DecodingMDP, prompts: Sequence[Prompt]) -> list[Collected]:
        """Search the prompts with the current Q, here or by the workers."""
        how = CollectConfig(**{field.name: getattr(self, field.name) for field in fields(CollectConfig)})
        q = self.q_function()
        if self.workers is None:
            return [collect(mdp, q, how, prompts, self.rng)]
        self.workers.share(q)
        parts = [prompts[i : i + _SEARCHES_PER_JOB] for i in range(0, len(prompts), _SEARCHES_PER_JOB)]
        seeds = self.rng.integers(2**63, size=len(parts)).tolist()
        jobs = [
            Job("search", (part, how, seed), f"the search of {', '.join(repr(prompt.text) for prompt in part)}")
            for part, seed in zip(parts, seeds, strict=True)
        ]
        found = {id(job): result for job, result in self.workers.run(jobs)}
        return [found[id(job)] for job in jobs]

    def _next_prompts(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Take the next prompts of a shuffled pass through all of them."""
        count = min(self.searches_per_round, len(prompts))
        while len(self._queue) < count:
            self._queue.extend(self.rng.permutation(len(prompts)).tolist())
        chosen = list(dict.fromkeys(self._queue[:count]))
        del self._queue[:count]
        return [prompts[i] for i in chosen]


@dataclass(frozen=True)
class CollectConfig:
    """How experience is searched for; the attributes of :class:`QStar` that say so."""

    tokens_per_search: int
    width: int
    margin: float
    score: Score
    noise: float
    q_free_share: float
    episode_share: float
    epsilon: float


class Collected(NamedTuple):
    """What searches have found.

    Attributes:
        states: What there is to learn, of each search.
        tokens: LM tokens used.
        texts: How many were finished.
        best: The best text of each search that finished one.
    """

    states: list[Transitions]
    tokens: int
    texts: int
    best: list[Completion]


def collect(
    mdp: DecodingMDP, q: QFunction, how: CollectConfig, prompts: Sequence[Prompt], rng: np.random.Generator
) -> Collected:
    """Search the prompts with a Q-function, in a tree of their own, and gather what is to be remembered."""
    mdp = mdp.with_empty_tree()
    searches = _Collector(mdp, q, how, prompts, rng).run_searches(prompts, Budget(how.tokens_per_search))
    if how.score == "q":
        score_completions(searches)
    observer = Observer(mdp, q.candidate_dims)
    states = [extract_targets(s, observer, q.values(mdp, [s.prompt] * s.size, s.node[: s.size])) for s in searches]
    return Collected(
        states,
        sum(search.lm_tokens for search in searches),
        sum(len(search.completions) for search in searches),
        [max(search.completions.values(), key=_objective) for search in searches if search.completions],
    )


class Searcher:
    """What a worker holds that searches for :class:`QStar`: a process of its own, and the agent's Q."""

    def __init__(self, make: Callable[[], DecodingMDP]) -> None:
        """Search in the process that ``make`` returns: the same as the learning environment's."""
        self.mdp = make()
        self.q: QFunction | None = None

    def receive(self, q: QFunction) -> None:
        """Search with this Q from now on.

        Raises:
            CheckpointError: It was made for another model, k or observation layout.
        """
        q.check(self.mdp)
        self.q = q

    def search(self, prompts: Sequence[Prompt], how: CollectConfig, seed: int) -> Collected:
        """See :func:`collect`; the outcome depends on Q and the arguments only."""
        assert self.q is not None
        return collect(self.mdp, self.q, how, prompts, np.random.default_rng(seed))


class _Collector(AStarPlanner):
    """The planner while learning: noise on Q, or no Q at all, or ε-greedy episodes, drawn anew for every prompt."""

    def __init__(
        self, mdp: DecodingMDP, q: QFunction, how: CollectConfig, prompts: Sequence[Prompt], rng: np.random.Generator
    ) -> None:
        super().__init__(mdp, heuristic=self._explore, width=how.width, margin=how.margin, score=how.score)
        self.q, self.rng, self.epsilon = q, rng, how.epsilon
        free = self.rng.random(len(prompts)) < how.q_free_share
        noise = np.where(self.rng.random(len(prompts)) < 0.5, how.noise, 0.0)
        self.modes = {id(p): (bool(f), float(scale)) for p, f, scale in zip(prompts, free, noise, strict=True)}
        in_episodes = self.rng.random(len(prompts)) < how.episode_share if how.episode_share else free & False
        self.in_episodes = {id(p) for p, chosen in zip(prompts, in_episodes, strict=True) if chosen}

    def select(self, search: Search) -> Iterator[Edges]:
        """Search, or play episodes until the budget is used up."""
        return self._play(search) if id(search.prompt) in self.in_episodes else super().select(search)

    def _explore(self, mdp: DecodingMDP, prompts: Sequence[Prompt], nodes: IntArray) -> Values:
        values = self.q.values(mdp, prompts, nodes)
        free, noise = (np.array(column) for column in zip(*(self.modes[id(p)] for p in prompts), strict=True))
        if free.any():
            potential = mdp.potential(prompts, nodes)[:, None]
            values[free] = (mdp.edge_returns(nodes) + potential)[free]
        return values + noise[:, None] * self.rng.gumbel(size=values.shape)

    def _play(self, search: Search) -> Iterator[Edges]:
        fruitless = 0  # a small tree may be played empty long before the budget is used up
        while fruitless < 20:
            row, before = 0, search.size + len(search.completions)
            while row >= 0:
                legal = np.flatnonzero(search.status[row] != Status.MASKED)
                random = self.rng.random() < self.epsilon
                action = self.rng.choice(legal) if random else legal[search.f[row, legal].argmax()]
                edge = Edges(np.array([row]), np.array([action]))
                if search.status[edge][0] == Status.OPEN:
                    yield edge
                row = int(search.child[edge][0])
            fruitless = fruitless + 1 if search.size + len(search.completions) == before else 0


def _objective(completion: Completion) -> float:
    return -math.inf if math.isnan(completion.objective) else completion.objective
