"""Level-synchronous search: beams have the settings of A*, and their defaults give the beams of version 0.1."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qstar_decoding.agents import AStarPlanner, BeamSearch, SoftValueHeuristic
from qstar_decoding.agents.planning.beam import LevelSearch, affordable_width
from qstar_decoding.agents.planning.decoder import Decoder
from qstar_decoding.agents.planning.registry import CONTENDERS
from qstar_decoding.agents.search.budget import Budget
from qstar_decoding.agents.search.state import Edges, Search, Status
from qstar_decoding.envs import DecodingMDP, TabularLM, load_prompts
from qstar_decoding.errors import ConfigurationError
from qstar_decoding.rewards import as_reward


class BeamOf01(Decoder):
    """The beam of version 0.1, kept as the reference."""

    def __init__(self, env: Any, *, width: int | None = None, **kwargs: Any) -> None:
        super().__init__(env, **kwargs)
        self.width = width

    def select(self, search: Search) -> Iterator[Edges]:
        width = self.width or 1
        for depth in range(search.mdp.max_new_tokens):
            width = self.width or max(width, affordable_width(search, depth))
            rows = search.at_depth(depth)
            row, action = np.nonzero(search.status[rows] == Status.OPEN)
            best = np.argsort(-search.f[rows[row], action], kind="stable")[:width]
            if not len(best):
                return
            yield Edges(rows[row[best]], action[best])


def whim(prompt: Any, text: str) -> float:
    return math.sin(sum((i + 1) * ord(c) for i, c in enumerate(text))) / 2


def noisy(mdp: Any, prompts: Any, nodes: Any) -> Any:
    noise = np.sin(7 * (mdp.tree.path_logprob[nodes][:, None] + np.arange(mdp.top_k)))
    return SoftValueHeuristic()(mdp, prompts, nodes) + 0.2 * noise


def process(seed: int = 0, horizon: int = 6, top_k: int = 3) -> DecodingMDP:
    model = TabularLM.random(6, 2, seed=seed, concentration=0.7)
    reward = as_reward(whim, lower=-0.5, upper=0.5)
    return DecodingMDP(model, reward=reward, top_k=top_k, max_new_tokens=horizon, logprob_weight=0.1)


def facts(plan: Any) -> tuple[Any, ...]:
    texts = sorted((c.text, c.objective) for c in plan.completions)
    return plan.text, plan.objective, plan.upper_bound, plan.usage.lm_tokens, plan.usage.pops, texts


@settings(max_examples=40)
@given(
    seed=st.integers(0, 5),
    horizon=st.integers(1, 5),
    width=st.none() | st.integers(1, 5),
    budget=st.none() | st.integers(3, 60) | st.builds(Budget, pops=st.integers(3, 30)),
    with_heuristic=st.booleans(),
)
def test_default_beams_are_those_of_version_0_1(
    seed: int, horizon: int, width: int | None, budget: Any, with_heuristic: bool
) -> None:
    options = {"width": width, "heuristic": noisy if with_heuristic else None}
    before, now = (kind(process(seed, horizon), **options) for kind in (BeamOf01, BeamSearch))
    assert facts(now.plan("ab", budget)) == facts(before.plan("ab", budget))


def test_beams_and_a_star_have_the_same_settings() -> None:
    shared = inspect.signature(LevelSearch).parameters.keys() - {"env", "kwargs"}
    assert shared == {"width", "growth", "taper", "prior", "pathmax", "all_endings"}
    assert shared <= inspect.signature(AStarPlanner).parameters.keys()
    BeamSearch(process(), width=3, growth=2.0, taper=2.0, prior=0.1, pathmax=True, all_endings=True)


@settings(max_examples=12)
@given(seed=st.integers(0, 5), budget=st.integers(6, 40), taper=st.sampled_from([0.0, 1.0, 2.0]))
def test_a_beam_with_all_settings_is_a_star_that_never_prunes(seed: int, budget: int, taper: float) -> None:
    """The stated bound of the reward is so large that A* excludes nothing by U; an infinite margin bets nothing."""
    shared = {"heuristic": noisy, "taper": taper, "prior": 0.1, "pathmax": True, "growth": 2.0}
    model = TabularLM.random(6, 2, seed=seed, concentration=0.7)
    mdps = [
        DecodingMDP(model, reward=as_reward(whim, lower=-0.5, upper=1e3), top_k=3, max_new_tokens=6) for _ in range(2)
    ]
    beam = BeamSearch(mdps[0], all_endings=True, **shared).plan("ab", budget)
    astar = AStarPlanner(mdps[1], margin=math.inf, **shared).plan("ab", budget)
    assert facts(beam) == facts(astar)


def test_a_taper_spends_more_on_early_depths() -> None:
    model = TabularLM.random(12, 1, seed=0, eos_token_ids=[])

    def depths(**options: Any) -> list[int]:
        mdp = DecodingMDP(model, reward=as_reward(whim, lower=-0.5, upper=0.5), top_k=8, max_new_tokens=7)
        [search] = BeamSearch(mdp, **options).run_searches(load_prompts(["ab"]), Budget(lm_tokens=60))
        return np.bincount(search.depth[: search.size], minlength=7)[2:7].tolist()

    even, tapered = depths(), depths(taper=2.0)
    assert max(even) - min(even) <= 1
    assert tapered == sorted(tapered, reverse=True)
    assert tapered[0] > 2 * tapered[-1]


def test_a_prior_orders_by_the_language_model_too() -> None:
    mdp = process()
    likeliest = BeamSearch(mdp, width=1, prior=1e6, heuristic=noisy).plan("ab")
    assert likeliest.token_ids == BeamSearch(mdp, width=1).plan("ab").token_ids
    assert likeliest.token_ids != BeamSearch(mdp, width=1, heuristic=noisy).plan("ab").token_ids


def test_pathmax_bounds_f_by_the_edge_before() -> None:
    plain, bounded = (BeamSearch(process(), width=4, heuristic=noisy, pathmax=on) for on in (False, True))
    for decoder, holds in ((plain, False), (bounded, True)):
        [search] = decoder.run_searches(load_prompts(["ab"]), Budget())
        rows = np.arange(1, search.size)
        parents = search.parent[rows]
        actions = [np.flatnonzero(search.child[p] == r)[0] for p, r in zip(parents, rows, strict=True)]
        legal = search.status[rows] != Status.MASKED
        above = search.f[parents, actions][:, None] < search.f[rows]
        assert bool((above & legal).any()) is not holds


def test_endings_may_leave_the_beam_its_places() -> None:
    ends = process(seed=2)
    taking, free = (BeamSearch(ends, taper=0.0, all_endings=on).plan("ab", 12) for on in (False, True))
    assert len(free.completions) > len(taking.completions)
    assert free.usage.lm_tokens <= 12


def test_rounds_spend_what_the_budget_leaves_over() -> None:
    one, more = (BeamSearch(process(), width=2, growth=growth).plan("ab", 60) for growth in (None, 2.0))
    assert more.usage.lm_tokens > one.usage.lm_tokens
    assert more.objective >= one.objective
    endless = BeamSearch(process(), width=1, growth=math.inf).plan("ab")
    assert endless.objective == pytest.approx(AStarPlanner(process()).plan("ab").objective)


def test_one_round_of_a_star_never_returns() -> None:
    once, rounds = (
        AStarPlanner(process(), heuristic=noisy, width=1, growth=growth).plan("ab") for growth in (None, 2.0)
    )
    assert once.usage.lm_tokens < rounds.usage.lm_tokens
    assert not once.certified
    assert rounds.certified


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"width": 0}, "width"),
        ({"growth": 1.0}, "growth"),
        ({"taper": -1.0}, "taper"),
        ({"prior": -0.1}, "prior"),
        ({"prior": math.nan}, "prior"),
    ],
)
def test_settings_out_of_range(options: dict[str, Any], reason: str) -> None:
    for kind in (BeamSearch, AStarPlanner):
        with pytest.raises(ConfigurationError, match=reason):
            kind(process(), **options)


def test_rounds_are_for_searches_by_level() -> None:
    with pytest.raises(ConfigurationError, match='growth=None is for search="level"'):
        AStarPlanner(process(), search="anytime", growth=None)


def test_a_task_gives_beams_on_q_the_same_settings() -> None:
    planner = {"prior": 0.3, "pathmax": True, "taper": 1.5, "margin": 0.2, "score": "reward"}
    beam = CONTENDERS["beam on g + Q"].make(process(), noisy, 0, planner)
    assert (beam.prior, beam.pathmax, beam.taper) == (0.3, True, 1.5)
    tuned = CONTENDERS["beam on g + Q"].make(process(), noisy, 0, planner, **CONTENDERS["beam on g + Q"].grid[0])
    assert tuned.prior == CONTENDERS["beam on g + Q"].grid[0]["prior"]
    assert CONTENDERS["beam on g + Q"].grid == CONTENDERS["Q*"].grid
