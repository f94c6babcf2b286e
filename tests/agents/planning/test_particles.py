"""Particle filters, draws without replacement and adaptive votes against the exact distribution of a small model."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from qstar_decoding.agents import (
    AdaptiveVote,
    AStarPlanner,
    Budget,
    OracleHeuristic,
    ParticleFilter,
    SamplingDecoder,
    UniqueSampler,
    ZeroHeuristic,
)
from qstar_decoding.agents.planning.sampling import leads
from qstar_decoding.envs import BannedStrings, DecodingMDP, TabularLM
from qstar_decoding.errors import ConfigurationError
from qstar_decoding.rewards import Reward, as_reward

HORIZON = 3


class Share(Reward):
    """The share of b's, of prefixes too."""

    lower, upper = 0.0, 1.0

    def score(self, prompts, completions, completion_ids=None, **columns):
        return [text.count("b") / HORIZON for text in completions]

    score_prefixes = score


def make(seed=0, *, top_k=4, weight=0.1, **options):
    lm = TabularLM.random(4, 1, seed=seed)
    return DecodingMDP(lm, reward=Share(), top_k=top_k, max_new_tokens=HORIZON, logprob_weight=weight, **options)


def search_of(plan):
    return plan._active.search


def exact(mdp, prompt="a"):
    """Return the probability and J of every text by its tokens: the model over the candidates, normalised."""
    plan = AStarPlanner(mdp, n=10**6, margin=math.inf).plan(prompt)
    tree, found = search_of(plan), {}
    for (row, action), completion in tree.completions.items():
        path, at = [(row, action)], row
        while tree.parent[at] >= 0:
            parent = int(tree.parent[at])
            path.append((parent, int(np.flatnonzero(tree.child[parent] == at)[0])))
            at = parent
        probability = 1.0
        for r, a in path:
            p = np.exp(mdp.tree.logprobs[tree.node[r]].astype(float)) * (tree.status[r] != 3)
            probability *= p[a] / p.sum()
        found[completion.token_ids] = probability, completion.objective
    assert math.isclose(sum(p for p, _ in found.values()), 1.0)
    return found


HEURISTICS = {
    "likelihood": None,
    "zero": ZeroHeuristic(),
    "oracle": OracleHeuristic(),
    "wrong": lambda mdp, prompts, nodes: np.tile(np.linspace(-0.3, 0.4, mdp.top_k), (len(nodes), 1)),
}


@pytest.mark.parametrize(
    ("heuristic", "threshold"),
    [("likelihood", 0.0), ("likelihood", 1.0), ("zero", 0.5), ("oracle", 0.5), ("wrong", 0.5)],
)
def test_the_normaliser_is_estimated_without_bias(heuristic, threshold):
    mdp, beta = make(seed=3, constraint=BannedStrings("cc")), 0.3
    truth = sum(p * math.exp(j / beta) for p, j in exact(mdp).values())
    estimates = []
    for seed in range(150):
        decoder = ParticleFilter(
            mdp, particles=4, beta=beta, threshold=threshold, seed=seed, heuristic=HEURISTICS[heuristic]
        )
        estimates.append(math.exp(search_of(decoder.plan("a")).log_normalizer))
    error = np.std(estimates) / math.sqrt(len(estimates))
    assert abs(np.mean(estimates) - truth) < 4 * error + 1e-9
    assert error < 0.15 * truth


def test_prefixes_are_weighed_by_the_reward_and_paid_for():
    mdp, beta = make(seed=1), 0.2
    truth = sum(p * math.exp(j / beta) for p, j in exact(mdp).values())
    plans = [ParticleFilter(mdp, particles=4, beta=beta, twist="potential", seed=s).plan("a") for s in range(150)]
    estimates = [math.exp(search_of(plan).log_normalizer) for plan in plans]
    assert abs(np.mean(estimates) - truth) < 4 * np.std(estimates) / math.sqrt(len(estimates))
    assert all(plan.usage.reward_calls > len(plan.completions) for plan in plans)


def test_a_perfect_twist_has_weights_without_variance():
    """With ψ the exact soft value, every weight is the normaliser."""
    mdp, beta = make(seed=2, weight=0.0), 0.25
    values = exact(mdp)

    def soft(mdp, prompts, nodes):
        h = np.full((len(nodes), mdp.top_k), -np.inf)
        for i, node in enumerate(nodes.tolist()):
            ids = mdp.tree.completion_ids(node)
            for a in range(mdp.top_k):
                start = (*ids, int(mdp.tree.tokens[node, a]))
                below = [(p, j) for text, (p, j) in values.items() if text[: len(start)] == start]
                if below:
                    mass = sum(p for p, _ in below)
                    h[i, a] = beta * math.log(sum(p / mass * math.exp(j / beta) for p, j in below))
        return h

    truth = math.log(sum(p * math.exp(j / beta) for p, j in values.values()))
    for seed in range(5):
        plan = ParticleFilter(mdp, particles=3, beta=beta, seed=seed, heuristic=soft).plan("a")
        assert search_of(plan).log_normalizer == pytest.approx(truth, abs=1e-5)


@pytest.mark.parametrize("count", [1, 2])
def test_draws_without_replacement_have_the_exact_probabilities(count):
    """Of the first and the second text, drawn together (n = 2) or one after the other (waves of one)."""
    mdp = make(seed=5, top_k=3)
    probabilities = {text: p for text, (p, _) in exact(mdp).items()}
    pairs, seeds = Counter(), 1000
    for seed in range(seeds):
        decoder = UniqueSampler(mdp, n=2, seed=seed)
        decoder.largest_wave = count
        search = search_of(decoder.plan("a", Budget(lm_tokens=1000)))
        first, second = (search.completions[edge].token_ids for edge in search.draws)
        pairs[first, second] += 1
    chi, cells = 0.0, 0
    for first, second in itertools.permutations(probabilities, 2):
        expected = seeds * probabilities[first] * probabilities[second] / (1 - probabilities[first])
        if expected >= 5:
            cells += 1
            chi += (pairs[first, second] - expected) ** 2 / expected
    assert cells > 20
    assert chi < cells + 4 * math.sqrt(2 * cells)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_no_text_is_drawn_twice_and_all_are_drawn_in_the_end(temperature):
    mdp = make(seed=4, top_k=4)
    texts = exact(mdp)
    plan = UniqueSampler(mdp, n=len(texts) + 5, temperature=temperature, seed=1).plan("a", 500)
    assert max(search_of(plan).draws.values()) == 1
    assert {c.token_ids for c in plan.completions} == texts.keys()


def test_draws_without_replacement_find_more_texts_for_the_same_tokens():
    mdp = make(seed=7)
    found = {
        kind: np.mean([len(kind(mdp, seed=s).plan("a", 12).completions) for s in range(30)])
        for kind in (SamplingDecoder, UniqueSampler)
    }
    assert found[UniqueSampler] > found[SamplingDecoder]


def test_an_adaptive_vote_stops_when_the_lead_is_sure():
    sure = TabularLM([[0.98, 0.01, 0.01]] * 3)
    even = TabularLM([[0.34, 0.33, 0.33]] * 3)
    reward = as_reward(lambda prompt, text: 0.0, lower=0, upper=0)
    drawn = {}
    for name, lm in (("sure", sure), ("even", even)):
        mdp = DecodingMDP(lm, reward=reward, top_k=3, max_new_tokens=1)
        plans = [AdaptiveVote(mdp, seed=seed).plan("a") for seed in range(20)]
        drawn[name] = np.mean([sum(search_of(plan).draws.values()) for plan in plans])
    assert 4 <= drawn["sure"] < 6 < drawn["even"] <= 40
    strict = AdaptiveVote(DecodingMDP(sure, reward=reward, top_k=3, max_new_tokens=1), confidence=1.0).plan("a")
    assert sum(search_of(strict).draws.values()) in (20, 40)  # the tree is known, or as many as in the paper


def test_the_probability_of_the_lead_is_that_of_the_beta_distribution():
    for first, second in ((0, 0), (3, 3), (4, 0), (7, 2)):
        p = (np.arange(200_000) + 0.5) / 200_000
        density = p**first * (1 - p) ** second
        assert leads(first, second) == pytest.approx(density[p > 0.5].sum() / density.sum(), abs=1e-4)
    assert leads(4, 0) >= 0.95 > leads(3, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"twist": "reward"}, "twist is"),
        ({"beta": 0}, "beta"),
        ({"particles": 0}, "particles"),
        ({"threshold": 2}, "threshold"),
        ({"seed": -1}, "seed is an integer >= 0"),
        ({"twist": "potential", "score": "q"}, 'score="q" rules out'),
    ],
)
def test_arguments_of_a_particle_filter_are_checked(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        ParticleFilter(make(), heuristic=ZeroHeuristic(), **arguments)
    blind = DecodingMDP(TabularLM.random(4, 1), reward=as_reward(lambda p, c: 0.0, lower=0, upper=0), top_k=3)
    with pytest.raises(ConfigurationError, match="cannot give"):
        ParticleFilter(blind, twist="potential")
