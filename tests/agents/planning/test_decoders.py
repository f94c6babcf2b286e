"""The decoders that A* must beat: each does what its paper says, on models small enough to check by hand."""

import math
from collections import Counter

import numpy as np
import pytest

from qstar_decoding.agents import (
    CONTENDERS,
    MCTS,
    ARGSDecoder,
    BeamSearch,
    BlockwiseDecoder,
    DiverseBeamSearch,
    GreedyDecoder,
    ILQLDecoder,
    LevinTreeSearch,
    MajorityVote,
    OracleHeuristic,
    RebaseSearch,
    SamplingDecoder,
)
from qstar_decoding.agents.planning.registry import TRIALS
from qstar_decoding.agents.search.budget import Budget
from qstar_decoding.envs import DecodingMDP, TabularLM, load_prompts
from qstar_decoding.errors import ConfigurationError
from qstar_decoding.rewards import Reward, as_reward


def flat(probabilities, horizon, reward=lambda prompt, completion: 0.0, top_k=None, **kwargs):
    """A process whose next token never depends on anything, and that never ends early."""
    model = TabularLM(
        probabilities, vocabulary="abcdefg"[: len(probabilities)], eos_token_ids=[], **kwargs.pop("model", {})
    )
    return DecodingMDP(
        model,
        reward=reward if isinstance(reward, Reward) else as_reward(reward, lower=-10, upper=10),
        top_k=top_k or len(probabilities),
        max_new_tokens=horizon,
        **kwargs,
    )


def per_action(*values):
    """A heuristic that says the same of an action everywhere."""
    return lambda mdp, prompts, nodes: np.tile(values, (len(nodes), 1))


class Letters(Reward):
    """A text is worth what its letters are; so is a prefix."""

    lower, upper = -10.0, 10.0

    def __init__(self, **worth):
        super().__init__()
        self.worth = worth

    def score(self, prompts, completions, completion_ids=None, **columns):
        return [float(sum(self.worth.get(letter, 0.0) for letter in text)) for text in completions]

    score_prefixes = score


def test_args_weighs_the_prefixes_reward_against_its_likelihood():
    mdp = flat([0.6, 0.3, 0.1], 3, Letters(b=1.0, c=1.5))
    # log .6 = -.51, log .3 = -1.20, log .1 = -2.30: b needs a weight above .69, c one of above 2.2 beyond b's.
    for weight, text in ((0.5, "aaa"), (1.0, "bbb"), (3.0, "ccc")):
        plan = ARGSDecoder(mdp, reward_weight=weight).plan("a")
        assert plan.text == text
        assert plan.usage.lm_tokens == 2
        assert plan.usage.reward_calls == 3 * 3 + 1  # every candidate's prefix, and the text
    with pytest.raises(ConfigurationError, match="no potential"):
        ARGSDecoder(flat([0.5, 0.5], 2))


def test_a_beam_without_the_reward_proposes_the_likeliest_text():
    mdp = flat([0.6, 0.4], 3, Letters(b=1.0))
    assert BeamSearch(mdp, width=8).plan("a").text == "bbb"
    plan = BeamSearch(mdp, width=8, rerank=False).plan("a")
    assert plan.text == "aaa"
    assert plan.usage.reward_calls == 0
    assert math.isnan(plan.reward)
    assert not plan.certified


def test_the_groups_of_a_diverse_beam_avoid_each_others_tokens():
    mdp = flat([0.4, 0.3, 0.2, 0.1], 2, logprob_weight=1.0)
    for diversity, seconds in ((0.0, {"a"}), (10.0, set("abcd"))):
        plan = DiverseBeamSearch(mdp, width=4, groups=4, diversity=diversity).plan("a")
        # A prefix belongs to one group only, so the first letters differ anyway; what follows need not.
        assert {completion.text[0] for completion in plan.completions} == set("abcd")
        assert {completion.text[1] for completion in plan.completions} == seconds


def test_a_beam_in_one_group_is_a_beam():
    table = np.random.default_rng(0).dirichlet(np.ones(5), size=5)
    mdp = DecodingMDP(TabularLM(table), reward=as_reward(lambda p, c: 0.0, lower=0, upper=1), top_k=5, max_new_tokens=6)
    one, other = DiverseBeamSearch(mdp, width=3, groups=1).plan("a"), BeamSearch(mdp, width=3).plan("a")
    # A finished text leaves its place in a beam of ours, but not in a group: compare what both must find.
    assert one.completions[0] == other.completions[0]


def test_the_majority_wins_whatever_its_reward():
    mdp = flat([0.6, 0.4], 1, Letters(b=5.0))
    plan = MajorityVote(mdp, n=200).plan("a")
    assert plan.text == "a"
    assert plan.usage.reward_calls == 0
    # Equal texts from different tokens vote together.
    model = TabularLM([0.4, 0.3, 0.3], vocabulary=["a", "b", " b"], eos_token_ids=[])
    mdp = DecodingMDP(model, reward=lambda p, c: 0.0, top_k=3, max_new_tokens=1)
    assert MajorityVote(mdp, n=300).plan("a").text.strip() == "b"


def test_nucleus_sampling_leaves_out_the_tail():
    mdp = flat([0.5, 0.3, 0.2], 1)
    for top_p, letters in ((1.0, "abc"), (0.79, "ab"), (0.5, "a")):
        drawn = {SamplingDecoder(mdp, n=1, top_p=top_p, seed=seed).plan("a").text for seed in range(60)}
        assert drawn == set(letters)


def test_ilql_tilts_by_the_advantage_and_sharpens_the_sum():
    mdp = flat([0.5, 0.3, 0.2], 1)
    h = per_action(0.0, 0.1, 0.2)
    for temperature in (1.0, 0.5):
        decoders = (ILQLDecoder(mdp, heuristic=h, n=1, beta=0.1, temperature=temperature, seed=s) for s in range(2000))
        texts = [decoder.plan("a").text for decoder in decoders]
        weights = (np.array([0.5, 0.3, 0.2]) * np.exp([0.0, 1.0, 2.0])) ** (1 / temperature)
        seen = np.array([texts.count(letter) for letter in "abc"]) / 2000
        np.testing.assert_allclose(seen, weights / weights.sum(), atol=0.04)


def test_blockwise_keeps_the_best_block():
    mdp = flat([0.4, 0.3, 0.3], 6, Letters(c=1.0))

    def plan(n, block):
        # f after a block: what its letters are worth.
        def h(mdp, prompts, nodes):
            return np.repeat(mdp.potential(prompts, nodes)[:, None], 3, axis=1)

        return BlockwiseDecoder(mdp.with_empty_tree(), heuristic=h, n=n, block=block, seed=1).plan("a")

    assert plan(64, 1).text == "cccccc"
    assert plan(64, 2).text == "cccccc"  # a block of two c's has probability .09
    assert plan(1, 2).text == SamplingDecoder(mdp.with_empty_tree(), n=1, seed=1).plan("a").text  # one block: no choice


def test_levin_tree_search_keeps_its_bound():
    """A text of probability p and T tokens is found within T / p expansions (Orseau et al. 2018, theorem 3)."""
    table = np.random.default_rng(3).dirichlet(np.full(4, 0.5), size=4)
    model = TabularLM(table, eos_token_ids=[])
    target = BeamSearch(DecodingMDP(model, reward=lambda p, c: 0.0, top_k=4, max_new_tokens=5), width=99).plan("a")
    reward = as_reward(lambda p, c: float(c == target.text), lower=0, upper=1)
    mdp = DecodingMDP(model, reward=reward, top_k=4, max_new_tokens=5, logprob_weight=0.0)
    plan = LevinTreeSearch(mdp).plan("a")
    assert plan.objective == 1.0
    assert plan.usage.pops <= 5 / math.exp(target.logprob) + 1


def test_mcts_follows_its_value_and_finds_the_optimum():
    mdp = flat([0.5, 0.3, 0.2], 5, Letters(c=1.0))
    greedy = MCTS(mdp, heuristic=OracleHeuristic(), exploration=0.0, simulations=1).plan("a", 4)
    assert greedy.text == "ccccc"
    assert greedy.usage.lm_tokens == 4
    # Led by likelihood alone, it still learns from the texts that it finishes.
    blind = MCTS(mdp.with_empty_tree(), simulations=30).plan("a", 200)
    assert blind.objective > GreedyDecoder(mdp).plan("a").objective
    assert blind.usage.lm_tokens <= 200


def test_rebase_gives_children_in_proportion():
    mdp = flat([0.25] * 4, 3, logprob_weight=0.0)

    def h(mdp, prompts, nodes):
        return np.where(mdp.tree.action[nodes] == 0, 1.0, 0.0)[:, None] * np.ones((1, 4))

    def by_first_letter(balance):
        [search] = RebaseSearch(mdp, heuristic=h, width=4, balance=balance).run_searches(load_prompts(["a"]), Budget())
        children = search.at_depth(2)
        return Counter(mdp.tree.action[search.node[search.parent[children]]].tolist())

    assert by_first_letter(1e6) == Counter({0: 1, 1: 1, 2: 1, 3: 1})
    assert by_first_letter(0.01) == Counter({0: 4})
    assert by_first_letter(0.5)[0] in (2, 3)  # e² : 1 : 1 : 1 of four


@pytest.mark.parametrize("name", sorted(CONTENDERS))
def test_every_contender_has_as_many_trials_as_the_others_and_works_with_each(name):
    contender = CONTENDERS[name]
    assert len(contender.grid) in (0, TRIALS)
    assert len({repr(setting) for setting in contender.grid}) == len(contender.grid)
    mdp = flat([0.5, 0.3, 0.2], 4, Letters(b=0.5, c=1.0))
    for setting in contender.grid or [{}]:
        plan = contender.make(mdp, per_action(0.0, 0.1, 0.2), 0, {"score": "reward"}, **setting).plan("a", 30)
        assert plan.token_ids
        assert plan.usage.lm_tokens <= 30 or name == "look-ahead"  # whose last call may overshoot
