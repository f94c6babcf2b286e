"""Hard constraints: every text keeps them, nothing that keeps them is lost, and what cannot be kept is said."""

import itertools
import json
import math
import re

import gymnasium as gym
import numpy as np
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

import qstar_decoding  # noqa: F401  registers the environment
from qstar_decoding.agents import DECODERS, AStarPlanner, make_decoder
from qstar_decoding.envs import DecodingMDP, TabularLM, load_language_model, load_prompts
from qstar_decoding.envs.constraints import (
    BannedStrings,
    ForcedStrings,
    GrammarConstraint,
    JSONConstraint,
    MinTokens,
    RegexConstraint,
)
from qstar_decoding.errors import ConfigurationError, ConstraintError
from qstar_decoding.rewards import as_reward


def whim(prompt, completion):
    return math.sin(sum((i + 1) * ord(c) for i, c in enumerate(completion)))


def make_mdp(constraint, *, vocab=4, horizon=4, top_k=None, model=None, **kwargs):
    return DecodingMDP(
        model or TabularLM.random(vocab, 1, seed=1),
        reward=as_reward(whim, lower=-1, upper=1),
        top_k=top_k or vocab,
        max_new_tokens=horizon,
        constraint=constraint,
        **kwargs,
    )


def all_texts(letters, horizon):
    """Every text of a model whose last token ends it: those that end early, and those that the horizon ends."""
    return ["".join(text) for n in range(horizon + 1) for text in itertools.product(letters, repeat=n)]


CASES = {
    "regex": (RegexConstraint("a(b|c)*a?"), lambda text: re.fullmatch("a(b|c)*a?", text)),
    "banned": (BannedStrings("ab", "CA"), lambda text: "ab" not in text and "ca" not in text),
    "forced": (ForcedStrings("b", "AC"), lambda text: "b" in text and "ac" in text),
    "at least": (MinTokens(3), lambda text: len(text) >= 2),  # the end of the sequence is a token too
    "several": ([BannedStrings("aa"), ForcedStrings("b")], lambda text: "aa" not in text and "b" in text),
}


@pytest.mark.parametrize("case", CASES)
def test_exactly_the_texts_that_keep_the_constraint_can_be_written(case):
    constraint, keeps = CASES[case]
    mdp = make_mdp(constraint)
    plan = AStarPlanner(mdp, n=10**6, margin=math.inf).plan("a")
    written = {(c.text, c.stop) for c in plan.completions}
    expected = {
        (text, "length" if len(text) == 4 else "eos")
        for text in all_texts("abc", 4)
        if keeps(text) and (case != "at least" or len(text) > 2 or len(text) == 2)
    }
    if case == "at least":  # three tokens: two letters and an end count as three, so two letters may not end
        expected = {(text, stop) for text, stop in expected if len(text) >= 3}
    assert written == expected


@settings(max_examples=30, deadline=None)
@given(
    case=st.sampled_from(sorted(CASES)),
    name=st.sampled_from(sorted(set(DECODERS) - {"args"})),
    seed=st.integers(0, 50),
    top_k=st.integers(1, 4),
    budget=st.integers(1, 40),
)
def test_no_decoder_writes_anything_else(case, name, seed, top_k, budget):
    constraint, keeps = CASES[case]
    mdp = make_mdp(constraint, model=TabularLM.random(4, 1, seed=seed), top_k=top_k)
    try:
        plan = make_decoder(name, mdp).plan("a", budget)
    except ConstraintError:
        return
    for completion in plan.completions:
        assert keeps(completion.text)
    if plan.certified and name == "astar" and top_k == 4:
        best = max(
            mdp.logprob_weight * c.logprob + whim("a", c.text)
            for c in AStarPlanner(mdp, n=10**6, margin=math.inf).plan("a").completions
        )
        assert plan.objective == pytest.approx(best)


def test_log_probabilities_stay_those_of_the_full_softmax():
    free, bound = make_mdp(None), make_mdp(RegexConstraint("c+"), top_k=2)
    [one], [other] = free.roots(load_prompts(["a"])), bound.roots(load_prompts(["a"]))
    of_c = free.tree.logprobs[one][free.tree.tokens[one] == 2]
    assert bound.tree.tokens[other, 0] == 2
    assert bound.tree.logprobs[other, 0] == of_c
    assert bound.action_mask(np.array([other])).tolist() == [[True, False]]  # nothing else is allowed to begin


def test_where_nothing_is_left_the_first_such_position_is_named():
    with pytest.raises(ConstraintError, match=r"no token is left at position 1, after 'a'"):
        AStarPlanner(make_mdp([RegexConstraint("ab"), BannedStrings("b")])).plan("a")
    # A horizon too short for what is demanded kills every branch at its end.
    with pytest.raises(ConstraintError, match="no token is left at position 1"):
        AStarPlanner(make_mdp(ForcedStrings("abc"), horizon=2)).plan("a")


def test_the_environment_masks_and_says_when_it_is_stuck():
    env = gym.make("TokenDecoding-v0", model=TabularLM.random(4, 1), prompts=["a"], reward=whim, top_k=3,
                   max_new_tokens=4, constraint=RegexConstraint("b(a|c)+"))  # fmt: skip
    observation, info = env.reset(seed=0)
    assert info["action_mask"].tolist() == [1, 0, 0]
    assert np.isfinite(observation["logprobs"]).all()
    text = ""
    for _ in range(4):
        *_, terminated, _, info = env.step(int(np.flatnonzero(env.unwrapped.action_masks())[0]))
        text += info["token_text"]
        if terminated:
            break
    assert re.fullmatch("b(a|c)+", info["completion"])
    stuck = gym.make("TokenDecoding-v0", model=TabularLM.random(4, 1), prompts=["a"], reward=whim, top_k=3,
                     max_new_tokens=4, constraint=[RegexConstraint("ab"), BannedStrings("b")])  # fmt: skip
    stuck.reset(seed=0)
    with pytest.raises(ConstraintError, match="after 'a'"):
        stuck.step(0)


@pytest.fixture(scope="module")
def lm():
    return load_language_model("smollm2-135m-instruct")


def test_the_language_model_writes_json(lm):
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}, "stars": {"type": "integer", "maximum": 5}},
        "required": ["name", "stars"],
    }
    mdp = DecodingMDP(
        lm, reward=as_reward(lambda p, c: 0.0, lower=0, upper=0), max_new_tokens=30, constraint=JSONConstraint(schema)
    )
    plan = AStarPlanner(mdp, width=4, taper=None).plan("A review of a film as JSON:", 120)
    content = json.loads(plan.text)
    assert set(content) == {"name", "stars"}
    assert isinstance(content["stars"], int)


def test_the_tree_under_a_mask_is_that_of_an_uncached_forward(lm):
    mdp = DecodingMDP(lm, reward="pangram", top_k=4, max_new_tokens=6, constraint=BannedStrings("e", "the"))
    plan = AStarPlanner(mdp, width=3, taper=None).plan("Once upon a time", 12)
    assert "e" not in plan.text
    prompt = lm.encode("Once upon a time")
    for completion in plan.completions[:3]:
        logprob = 0.0
        for i, token in enumerate(completion.token_ids):
            logprob += float(lm.forward([[*prompt, *completion.token_ids[:i]]])[1][0][token])
        assert completion.logprob == pytest.approx(logprob, abs=1e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RegexConstraint(""), "non-empty"),
        (lambda: make_mdp(RegexConstraint("(a")), "cannot be followed"),
        (lambda: make_mdp(RegexConstraint("z+")), "cannot be followed"),
        (lambda: JSONConstraint("{"), "JSON schema"),
        (lambda: BannedStrings(), "non-empty strings"),
        (lambda: BannedStrings(["a", "b"]), "each as an argument"),
        (lambda: MinTokens(0), "count"),
        (lambda: make_mdp(3), "constraint is a Constraint"),
        (lambda: make_mdp([RegexConstraint("a+"), MinTokens(99)]), "at least 99 tokens, and max_new_tokens is"),
        (lambda: make_mdp(MinTokens(3)).with_changes(max_new_tokens=2), "at least 3 tokens, and max_new_tokens is 2"),
        (lambda: make_mdp("a+"), "unknown constraint"),
    ],
)
def test_what_is_no_constraint_is_refused(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()


@pytest.mark.parametrize(
    "pattern",
    [
        # a "]" that is a character of the class
        *("[]a]", "[^]a]", "[^]]*", r"[^\]a]", r"a[^]\n]?", "[]]"),
        # flags of a group hold within it
        *("(?s:a).", "(?s:.).", ".(?s:.)", "(?s)(?-s:.)", "(?i)(?s).", "(?si:B).", "((?s:.))|..", "(?:a|(?s:.)b)."),
        # ends in ends
        *("a$$", "(a$)$", "^(a$|b$)$", "(a|b$)$", "a(|b$)$", r"a|\$", "[$]", "[^$]", r"[.^$]?"),
        # classes that the end mark is in
        *(r"[\x00-\x7f]*", r"[\x00-\x7f]?a", r"[^\W]", r"[\D]b?", r"[\s\S]"),
    ],
)
def test_a_pattern_matches_what_it_does_in_python(pattern):
    letters = ["a", "B", "b", "]", "$", "\n", "\\", "é", "1", "."]
    rule = RegexConstraint(pattern).bind(TabularLM(np.ones((11, 11)), vocabulary=[*letters, ""]))
    texts = ["".join(text) for size in range(3) for text in itertools.product(letters, repeat=size)]
    assert [t for t in texts if rule.accepts(t, [])] == [t for t in texts if re.fullmatch(pattern, t)]


def test_classes_within_classes():
    rule = RegexConstraint("[^[:alpha:]1]").bind(TabularLM(np.ones((4, 4)), vocabulary=["a", "1", ".", ""]))
    assert [text for text in ("", "a", "1", ".") if rule.accepts(text, [])] == ["."]


@pytest.mark.parametrize("make", [RegexConstraint, GrammarConstraint, BannedStrings, ForcedStrings])
def test_half_of_a_character_is_refused(make):
    with pytest.raises(ConfigurationError, match=r"'start: .ud800' has half of a character"):
        make("start: \ud800")


@pytest.mark.parametrize("pattern", ["[^b]+", r"\S+", r"\W+|\D", "(?s).+", ".{1,2}", "[^\\x03b]+", r"[\D]+", "(?s).+$"])
def test_a_pattern_that_takes_most_characters_does_not_take_the_end_for_one(pattern):
    lm = TabularLM([0.4, 0.3, 0.2, 0.1], vocabulary=["a", "b", "\n", ""])
    reward = as_reward(lambda prompt, text: 1.0 - len(text) / 4, lower=0, upper=1)  # the empty text would be best
    mdp = DecodingMDP(lm, reward=reward, top_k=4, max_new_tokens=3, constraint=RegexConstraint(pattern))
    plan = AStarPlanner(mdp, n=99).plan("a")
    assert plan.completions
    assert all(regex.fullmatch(pattern, completion.text) for completion in plan.completions)


@pytest.mark.parametrize(
    "constraint", [BannedStrings("a", "b'"), ForcedStrings("x"), MinTokens(3), RegexConstraint("a+")], ids=repr
)
def test_a_constraint_shows_the_expression_that_makes_it(constraint):
    assert eval(repr(constraint)) == constraint
