"""Legal moves of puzzles: everything that is legal can be written, and nothing else, whatever the tokenizer does."""

import itertools

import numpy as np
import pytest

from qstar_decoding.agents import AStarPlanner, Budget, SamplingDecoder
from qstar_decoding.envs import DecodingMDP, MinTokens, Prompt, RegexConstraint, TabularLM
from qstar_decoding.envs.constraints import make_constraint
from qstar_decoding.envs.constraints.countdown import CountdownConstraint
from qstar_decoding.envs.constraints.star_graph import StarGraphConstraint
from qstar_decoding.errors import ConfigurationError, UnknownNameError
from qstar_decoding.rewards import make_reward
from qstar_decoding.tasks.number_puzzles import is_solvable, solutions

FORMATS = ["expression", "steps", "short steps"]
# Single characters, and tokens that join several or cross the border of two moves.
VOCABULARY = [*"0123456789+-*/()=, \n", "12", "7*", "*3", ")*", "=2", "), ", " (", "3=21", "99", "a", ""]


def lm(vocabulary=VOCABULARY):
    return TabularLM(np.ones((len(vocabulary),) * 2), vocabulary=vocabulary)


def completions(constraint, columns):
    """Return every text that the constraint's moves make."""

    def follow(state, text):
        if constraint.is_final(state):
            yield text
        for move, after in constraint.moves(state):
            yield from follow(after, text + move)

    return list(follow(constraint.start(Prompt("", columns)), ""))


def values(numbers):
    """Return what numbers can make if every result is a positive integer, by trying every pair."""
    if len(numbers) == 1:
        return {numbers[0]}
    found = set()
    for a, b in itertools.permutations(range(len(numbers)), 2):
        rest = [n for i, n in enumerate(numbers) if i not in (a, b)]
        x, y = numbers[a], numbers[b]
        results = [x + y, x * y, *([x - y] if x > y else []), *([x // y] if x % y == 0 else [])]
        found = found.union(*(values([*rest, result]) for result in results))
    return found


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("numbers", [(5,), (3, 7), (4, 4, 8), (3, 7, 12), (1, 2, 6, 6)])
def test_every_value_can_be_written_and_nothing_twice(format, numbers):
    columns = {"numbers": list(numbers[::-1])}
    texts = completions(CountdownConstraint(format), columns)
    assert len(texts) == len(set(texts))
    reached = values(list(numbers))
    reward = make_reward("countdown")
    if len(numbers) > 1:
        for target in sorted(reached)[:8]:
            given = {"numbers": [list(numbers)] * len(texts), "target": [target] * len(texts)}
            scores = reward([""] * len(texts), texts, **given)
            right = {text for text, score in zip(texts, scores, strict=True) if score}
            assert right == set(solutions(numbers, target, format))
            assert right
    ends = {int(text.rpartition("=")[2]) if "=" in text else int(eval(text)) for text in texts if len(numbers) > 1}
    assert ends == (reached if len(numbers) > 1 else set())
    assert {n for n in range(1, 60) if is_solvable(numbers, n)} == {n for n in reached if n < 60}


@pytest.mark.parametrize("format", FORMATS)
def test_tokens_that_join_or_split_moves_are_allowed_where_they_fit(format):
    constraint, model = CountdownConstraint(format, "+*"), lm()
    columns = {"numbers": [7, 3, 2]}
    texts = completions(constraint, columns)
    rule = constraint.bind(model, Prompt("", columns))
    beginnings = {text[:end] for text in texts for end in range(len(text) + 1)}
    seen, todo = set(), [[]]
    while todo:
        ids = todo.pop()
        text = model.decode_continuation(ids)
        allowed = {VOCABULARY[token] for token in np.flatnonzero(rule.allowed(ids)).tolist()} - {""}
        assert allowed == {token for token in VOCABULARY if token and text + token in beginnings}
        assert rule.accepts(text, ids) == (text in texts)
        assert rule.can_become(text)
        if text not in seen:
            seen.add(text)
            todo += [[*ids, VOCABULARY.index(token)] for token in allowed]
    assert seen == beginnings
    assert not rule.can_become("7+7")


@pytest.mark.parametrize("format", FORMATS)
def test_planners_write_legal_answers_only_and_find_the_right_one(format):
    mdp = DecodingMDP(
        lm(), reward="countdown", top_k=8, max_new_tokens=30, stop="\n", constraint={"countdown": {"format": format}}
    )
    assert mdp.constraint == CountdownConstraint(format)
    prompts = [
        {"prompt": "7", "numbers": n, "target": t} for n, t in (([3, 7, 12], 33), ([7, 5, 2], 70), ([2, 2, 3], 1))
    ]
    planner, until = AStarPlanner(mdp, search="anytime"), Budget(target=0.1)
    for prompt, plan in zip(prompts, planner.plan_many(prompts, until), strict=True):
        assert plan.reward == 1
        assert plan.text in solutions(tuple(sorted(prompt["numbers"])), prompt["target"], format)
    for prompt, plan in zip(prompts, SamplingDecoder(mdp, n=5).plan_many(prompts), strict=True):
        legal = completions(mdp.constraint, prompt)
        assert all(completion.text in legal for completion in plan.completions)


@pytest.mark.parametrize("kind", [list, tuple, np.array])
def test_numbers_may_be_an_array(kind):
    legal = completions(CountdownConstraint("steps"), {"numbers": [3, 7]})
    assert completions(CountdownConstraint("steps"), {"numbers": kind([3, 7])}) == legal


@pytest.mark.parametrize("kind", [list, tuple, np.array])
def test_paths_follow_the_edges_of_their_prompt(kind):
    edges = [kind(edge) for edge in (["a", "b"], ["b", "cc"], ["a", "d"], ["d", "e"], ["x", "a"])]
    columns = {"edges": kind(edges), "start": "a"}
    assert set(completions(StarGraphConstraint(), columns)) == {"a>b>cc", "a>d>e"}
    vocabulary = [*"abcdex>", ">b", "cc", "\n", ""]
    mdp = DecodingMDP(
        lm(vocabulary), reward="exact_answer", top_k=5, max_new_tokens=9, stop="\n", constraint="star_graph"
    )
    plan = AStarPlanner(mdp).plan({"prompt": "a", "answer": "a>b>cc", **columns})
    assert (plan.text, plan.reward, plan.certified) == ("a>b>cc", 1, True)


@pytest.mark.parametrize(
    ("constraint", "columns", "message"),
    [
        (CountdownConstraint(), {}, "column 'numbers', a list of positive integers; got None"),
        (CountdownConstraint(), {"numbers": [3, 0]}, "got \\[3, 0\\]"),
        (CountdownConstraint(), {"numbers": "3 7"}, "got '3 7'"),
        (CountdownConstraint(), {"numbers": [-3, 7]}, "got \\[-3, 7\\]"),
        (CountdownConstraint(), {"numbers": [True, 7]}, "got \\[True, 7\\]"),
        (CountdownConstraint(), {"numbers": [1, 2, 3, 4, 5, 6]}, "at most 5 numbers.*got 6.*'steps' takes more"),
        (StarGraphConstraint(), {"start": "a"}, "columns 'edges'"),
        (StarGraphConstraint(), {"edges": [["a"]], "start": "a"}, "got edges="),
        (StarGraphConstraint(), {"edges": [["a", "b"]], "start": 3}, "start=3"),
    ],
)
def test_prompts_that_describe_no_puzzle(constraint, columns, message):
    with pytest.raises(ConfigurationError, match=message):
        constraint.bind(lm(), Prompt("a", columns))
    with pytest.raises(ConfigurationError, match="reads the prompt"):
        constraint.bind(lm())


def test_steps_take_many_numbers_and_single_ones_are_final():
    for format in ("steps", "short steps"):
        rule = CountdownConstraint(format).bind(lm(), Prompt("a", {"numbers": [*range(1, 13)]}))
        assert {VOCABULARY[token] for token in np.flatnonzero(rule.allowed([]))} == {*"123456789", "12", "7*"}
    assert completions(CountdownConstraint(), {"numbers": [5]}) == ["5"]
    assert len(completions(CountdownConstraint(), {"numbers": [2, 2, 2, 2, 2]})) > 100


def test_constraints_by_name():
    assert make_constraint("countdown") == CountdownConstraint()
    assert make_constraint({"regex": "a+"}) == RegexConstraint("a+")
    assert make_constraint({"min_tokens": 3}) == MinTokens(3)
    both = make_constraint([{"min_tokens": 3, "countdown": {"operators": "+-"}}, RegexConstraint("b")])
    assert both == [MinTokens(3), CountdownConstraint(operators="+-"), RegexConstraint("b")]
    assert [make_constraint({"json": {"type": "null"}})] == [make_constraint({"json": '{"type": "null"}'})]
    assert make_constraint(None) is None
    with pytest.raises(UnknownNameError, match="countdwn"):
        make_constraint("countdwn")
    with pytest.raises(ConfigurationError, match="does not take"):
        make_constraint({"countdown": {"size": 3}})
    with pytest.raises(ConfigurationError, match="the constraint 'min_tokens': count is an integer >= 1, got '3'"):
        make_constraint({"min_tokens": "3"})
    with pytest.raises(ConfigurationError, match="format is 'expression' or"):
        CountdownConstraint("prose")
    with pytest.raises(ConfigurationError, match="operators are some of"):
        CountdownConstraint(operators="+^")


def test_an_edge_is_bounded_by_the_text_that_it_makes():
    mdp = DecodingMDP(
        lm(), reward="countdown", top_k=8, max_new_tokens=12, stop="\n", logprob_weight=0.0, constraint="countdown"
    )
    prompt = {"prompt": "7", "numbers": [3, 7], "target": 10}
    plan = AStarPlanner(mdp, search="qstar").plan(prompt)
    assert (plan.text, plan.certified) == ("7+3", True)
    # 7 or 3, then the one operator whose result is not settled as wrong, then the other number.
    assert plan.usage.lm_tokens <= 5
    [from_root] = mdp.edge_bounds([Prompt("7", prompt)], mdp.roots([Prompt("7", prompt)]))
    assert from_root.max() == 1
