"""One engine for all trees on a language model: one forward, shared memory, and the outputs of each tree alone."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qstar_decoding.agents import AStarPlanner, BeamSearch, Budget
from qstar_decoding.agents.search import loop
from qstar_decoding.agents.search.problem import Problem
from qstar_decoding.agents.search.state import Search
from qstar_decoding.envs import BannedStrings, DecodingMDP, MinTokens, Prompt, TabularLM, TokenTree, TransformersLM
from qstar_decoding.envs.token_tree import GrowRequest, grow_together
from qstar_decoding.models import TreeEngine
from qstar_decoding.models.base import BoolArray, LanguageModel

from .test_engine import (
    TOLERANCE,
    VOCABULARY,
    assert_exact,
    assert_slots_add_up,
    contents,
    forwards,
    play,
    scripts,
)

TinyLM = Callable[[str], TransformersLM]

NO_EDGES = np.empty(0, dtype=np.int64)


def language_model(tiny_lm: TinyLM, architecture: str) -> LanguageModel:
    return (
        TabularLM.random(VOCABULARY, 1, seed=0, vocabulary=[f"w{i} " for i in range(VOCABULARY)])
        if (architecture == "tabular")
        else tiny_lm(architecture)
    )


def even_only(ids: Sequence[int]) -> BoolArray:
    """Allow even tokens after an even number of tokens, and all others after an odd one."""
    return np.arange(VOCABULARY) % 2 == len(ids) % 2


def ask(
    tree: TokenTree, prompts: Sequence[Sequence[int]], nodes: Any = NO_EDGES, actions: Any = NO_EDGES
) -> GrowRequest:
    return GrowRequest(tree, prompts, np.asarray(nodes, dtype=np.int64), np.asarray(actions, dtype=np.int64))


@pytest.mark.parametrize("architecture", ["Llama", "Mistral", "Mamba", "tabular"])
def test_trees_of_different_k_and_masks_grow_in_one_forward(tiny_lm: TinyLM, architecture: str) -> None:
    lm = language_model(tiny_lm, architecture)
    kinds: list[dict[str, Any]] = [{"top_k": 3}, {"top_k": 7}, {"top_k": 4, "allowed": even_only}, {"top_k": 40}]
    prompts = [[5, 6, 7], [5, 6], [5, 6, 9]]

    def grow(trees: list[TokenTree], together: bool) -> None:
        def grown(requests: list[GrowRequest]) -> list[Any]:
            return grow_together(requests) if together else [grow_together([request])[0] for request in requests]

        roots = [roots for roots, _ in grown([ask(tree, prompts) for tree in trees])]
        edges = [ask(t, [[8, 9]], r[[0, 1, 1]], [2, 0, 1]) for t, r in zip(trees, roots, strict=True)]
        children = [children for _, children in grown(edges)]
        grown([ask(t, [], c, [0, 1, 2]) for t, c in zip(trees, children, strict=True)])

    together = [TokenTree(lm, **kind) for kind in kinds]
    assert len({id(tree._engine) for tree in together}) == 1
    alone = [TokenTree(lm, **kind, engine=lm.new_engine()) for kind in kinds]
    if isinstance(together[0]._engine, TreeEngine):
        with forwards(lm) as counts:  # type: ignore[arg-type]
            grow(together, together=True)
        # 5, 6, 7, 9 once for all trees; then 8 and 9, and edges that trees of different k have in common once.
        assert len(counts) == 3
        assert counts[0] == 4
        assert counts[1] <= 2 + 3 + 3
    else:
        grow(together, together=True)
    grow(alone, together=False)
    for shared, single in zip(together, alone, strict=True):
        for name, column in contents(single).items():
            if architecture == "tabular" or name not in ("hidden", "logprobs", "path_logprob"):
                np.testing.assert_array_equal(getattr(shared, name), column, err_msg=name)
            else:
                np.testing.assert_allclose(getattr(shared, name), column, atol=TOLERANCE, err_msg=name)
        assert_slots_add_up(shared)
    constrained = together[2]
    for node in range(len(constrained)):
        legal = np.isfinite(constrained.logprobs[node])
        assert even_only(constrained.completion_ids(node))[constrained.tokens[node][legal]].all()


Steps = list[tuple[int, str, Any]]


@pytest.mark.parametrize("architecture", ["Llama", "Mistral"])
@given(
    plays=st.lists(scripts(tokens=(0, 4)), min_size=2, max_size=5),
    kinds=st.lists(st.sampled_from([3, 5]), min_size=5, max_size=5),
    ends=st.lists(st.sampled_from(["stay", "evict", "die"]), min_size=5, max_size=5),
    spare=st.none() | st.integers(0, 20),
)
@settings(max_examples=15)
def test_trees_come_and_go_and_the_others_stay_exact(
    tiny_lm: TinyLM,
    architecture: str,
    plays: list[Any],
    kinds: list[int],
    ends: list[str],
    spare: int | None,
) -> None:
    lm = tiny_lm(architecture)
    lm.engine()
    assert lm.kv_token_bytes
    budget = None if spare is None else (30 + spare) * lm.kv_token_bytes  # the longest prefix has fewer than 30 tokens
    alive: list[tuple[TokenTree, list[list[int]]]] = []
    for script, top_k, end in zip(plays, kinds, ends, strict=False):
        tree = TokenTree(lm, top_k, budget)
        prompts = play(tree, script)
        if end == "evict":
            tree.evict(2)
            prompts = [prompt for prompt in prompts if (tuple(prompt), None) in tree._roots]
        if end != "die":
            alive.append((tree, prompts))
        del tree
        for other, asked in alive:
            if len(other):
                other.expand(np.array([len(other) - 1]), np.array([len(alive) % 3]))
            assert_exact(other, asked)
    for tree, asked in alive:
        assert tree._engine is alive[0][0]._engine
        assert_exact(tree, asked)


def test_a_shared_beginning_is_computed_once(tiny_lm: TinyLM) -> None:
    lm = tiny_lm("Llama")
    header, one, other = [2, 3, 4], [30, 31], [32]  # too few tokens for a forward to be filled up
    first, second = TokenTree(lm, 3), TokenTree(lm, 8, allowed=even_only)
    with forwards(lm) as counts:
        first.roots([header + one])
        second.roots([header + other])
    assert counts == [len(header) + len(one), len(other)]
    assert_exact(first, [header + one])


@pytest.mark.parametrize(
    ("top_k", "allowed", "computed"), [(5, None, 0), (3, None, 0), (6, None, 2), (5, even_only, 2)]
)
def test_what_another_tree_has_asked_for_is_known(tiny_lm: TinyLM, top_k: int, allowed: Any, computed: int) -> None:
    lm = tiny_lm("Mistral")
    prompts = [[2, 3, 4], [2, 3, 4, 5, 6]]
    first, second = TokenTree(lm, 5), TokenTree(lm, top_k, allowed=allowed)
    roots = first.roots(prompts)
    with forwards(lm) as counts:
        second.roots(prompts)
    assert sum(counts) == computed
    np.testing.assert_allclose(second.hidden, first.hidden, atol=TOLERANCE)
    if not computed:
        np.testing.assert_array_equal(second.tokens, first.tokens[:, :top_k])
        np.testing.assert_array_equal(second.logprobs, first.logprobs[:, :top_k])
        first.expand(roots, np.array([0, 1]))
        # Known and new in one call.
        with forwards(lm) as counts:
            children = second.expand(roots[[0, 0, 1]], np.array([0, 1, 1]))
        assert counts == [1]
        np.testing.assert_array_equal(second.hidden[children[[0, 2]]], first.hidden[[2, 3]])
        assert_exact(second, prompts)
        first.evict(0)
        second.expand(children, np.array([2, 1, 0]))
        assert_exact(second, prompts)


def test_what_was_written_is_a_beginning_too(tiny_lm: TinyLM) -> None:
    lm = tiny_lm("Llama")
    question, more = [2, 3, 4, 5], [30, 31, 32]
    turn = TokenTree(lm, 3)
    nodes = turn.roots([question])
    for _ in range(6):
        nodes = turn.expand(nodes, np.array([0]))
    answer = turn.completion_ids(int(nodes[0]))
    following = TokenTree(lm, 5)
    with forwards(lm) as counts:
        following.roots([question + answer + more])
    assert counts == [len(more)]
    following.expand(following.roots([question + answer + more]), np.array([1]))
    # The first tree may go: what it wrote leads to the second one's prompt.
    del turn
    following.evict(5)
    with forwards(lm) as counts:
        following.expand(following.roots([question + answer + more]), np.array([2]))
    assert counts == [1]
    assert_exact(following, [question + answer + more])


def test_the_memory_of_trees_that_are_gone_is_used_again(tiny_lm: TinyLM) -> None:
    lm = tiny_lm("Llama")
    stays = TokenTree(lm, 3)
    stays.roots([[5, 6, 7]])
    engine, rng = stays._engine, np.random.default_rng(0)
    assert isinstance(engine, TreeEngine)
    sizes = []
    for _ in range(60):
        tree = TokenTree(lm, 4)
        tree.expand(tree.roots(rng.integers(VOCABULARY, size=(4, 20)).tolist()), np.arange(4))
        sizes.append((engine.kv_bytes, engine._table.size, len(engine._trie), len(engine._prompts)))
        del tree
    # 84 tokens a tree: those of one to four trees, which fill the memory of 256 tokens, where all make 5,040.
    assert (np.max(sizes, axis=0) <= [256 * (lm.kv_token_bytes or 0), 3 + 84 * 4, 3 + 84 * 4, 1 + 4 * 4]).all()
    with forwards(lm) as counts:
        stays.expand(stays.roots([[5, 6, 7]]), np.array([0]))
    assert counts == [1]
    assert_exact(stays, [[5, 6, 7]])


def test_an_engine_lives_as_long_as_a_tree_uses_it(tiny_lm: TinyLM) -> None:
    lm = tiny_lm("Qwen3")
    tree, other = TokenTree(lm, 3), TokenTree(lm, 4)
    separate = TokenTree(lm, 3, kv_budget=100_000)  # another budget, another memory
    engine = weakref.ref(tree._engine)
    assert other._engine is tree._engine is not separate._engine
    del tree
    assert engine() is not None
    del other
    assert engine() is None


def test_an_empty_tree_is_on_an_engine_of_its_own(tiny_lm: TinyLM) -> None:
    lm = tiny_lm("Llama")
    mdp = DecodingMDP(lm, reward="length", top_k=3, max_new_tokens=4)
    mdp.roots([Prompt("w5 w6 w7")])
    with forwards(lm) as counts:
        again = mdp.with_empty_tree()
        again.roots([Prompt("w5 w6 w7")])
    assert counts == [3]
    assert again.tree._engine is not mdp.tree._engine
    assert again.tree._engine is not again.with_empty_tree().tree._engine


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
def test_a_shared_forward_that_fails_leaves_all_trees_as_they_were(new_tiny_lm: TinyLM, error: BaseException) -> None:
    lm, other_lm = new_tiny_lm("Llama"), TabularLM.random(VOCABULARY, 1, vocabulary=["x"] * VOCABULARY)
    trees = [TokenTree(other_lm, 2), TokenTree(lm, 3), TokenTree(lm, 6, allowed=even_only)]
    prompts = [[5, 6, 7], [9, 8]]
    roots = [roots for roots, _ in grow_together([ask(tree, prompts) for tree in trees])]
    before, layer = [contents(tree) for tree in trees], lm.model.model.layers[1]

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise error

    requests = [ask(tree, [[3]], nodes, [0, 1]) for tree, nodes in zip(trees, roots, strict=True)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer, "forward", fail)
        with pytest.raises(type(error)):
            grow_together(requests)
    for tree, was in zip(trees, before, strict=True):
        for name, column in was.items():
            np.testing.assert_array_equal(getattr(tree, name), column, err_msg=name)
    grow_together(requests)
    assert_exact(trees[1], [*prompts, [3]])
    assert_slots_add_up(trees[2])


def test_threads_take_turns(tiny_lm: TinyLM) -> None:
    lm, rng = tiny_lm("Llama"), np.random.default_rng(0)
    plans = [(int(k), rng.integers(VOCABULARY, size=(3, 6)).tolist()) for k in rng.integers(2, 6, size=16)]

    def grow(plan: tuple[int, list[list[int]]]) -> TokenTree:
        tree = TokenTree(lm, plan[0])
        nodes = tree.roots(plan[1])
        for step in range(6):
            nodes = tree.expand(nodes, np.full(len(nodes), step % 2))
            if step == 3:
                tree.evict(3)
                nodes = tree.roots(plan[1])
        return tree

    with ThreadPoolExecutor(8) as threads:
        trees = list(threads.map(grow, plans))
    for tree, (_, prompts) in zip(trees, plans, strict=True):
        assert_exact(tree, [prompt for prompt in prompts if (tuple(prompt), None) in tree._roots])


# ------------------------------------------------------------------------------------------------------- whole searches


def problems(lm: LanguageModel) -> list[tuple[Any, DecodingMDP]]:
    """Return searches that differ in k, reward, constraint, horizon, stop and strategy, all on one model."""
    return [
        (AStarPlanner, DecodingMDP(lm, reward=lambda p, c: len(set(c)) / 10, top_k=3, max_new_tokens=5)),
        (BeamSearch, DecodingMDP(lm, reward=lambda p, c: -len(c), top_k=5, max_new_tokens=4, logprob_weight=0.5)),
        (
            AStarPlanner,
            DecodingMDP(
                lm,
                reward="length",
                top_k=4,
                max_new_tokens=6,
                constraint=[BannedStrings("w7"), MinTokens(2)],
                stop="w9",
            ),
        ),
    ]


def searches(decoders: list[tuple[Any, DecodingMDP]], prompt: Prompt, budget: int) -> list[loop.ActiveSearch]:
    active = []
    for decoder, mdp in decoders:
        made = decoder(mdp)
        active.append(loop.ActiveSearch(Search(Problem(mdp), prompt, Budget(lm_tokens=budget)), made.select))
    return active


@pytest.mark.parametrize("architecture", ["Llama", "tabular"])
def test_searches_of_different_problems_make_one_forward_a_step(
    tiny_lm: TinyLM, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = language_model(tiny_lm, architecture)
    prompt = Prompt("w5 w6 " if architecture == "tabular" else "w5 w6", {}, (5, 6))
    together, steps, calls = searches(problems(lm), prompt, 30), 0, 0
    engine = together[0].search.mdp.tree._engine
    compute = engine.compute

    def counted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        return compute(*args)

    monkeypatch.setattr(engine, "compute", counted)
    loop.begin([one.search for one in together])
    assert calls == 1
    for _ in loop.drive(together):
        steps += 1
    assert 1 < calls <= steps + 1 + 1  # the prompts, the steps, and one that only finished texts
    monkeypatch.undo()
    for one, (decoder, mdp) in zip(together, problems(lm), strict=True):
        [alone] = searches([(decoder, mdp.with_empty_tree())], prompt, 30)
        loop.begin([alone.search])
        loop.drive_to_end([alone])
        assert one.search.best is not None
        assert alone.search.best is not None
        assert one.search.best.token_ids == alone.search.best.token_ids
        assert one.search.lm_tokens == alone.search.lm_tokens
        if architecture == "tabular":
            assert one.search.best == alone.search.best
            assert (one.search.lower_bound, one.search.upper_bound) == (
                alone.search.lower_bound,
                alone.search.upper_bound,
            )
        else:
            assert one.search.best.objective == pytest.approx(alone.search.best.objective, abs=TOLERANCE)
