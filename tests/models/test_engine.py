"""The token tree against uncached forwards: whatever is asked in whatever order, the outputs are the same."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qstar_decoding.agents import AStarPlanner
from qstar_decoding.envs import DecodingMDP, PrefixEngine, TabularLM, TokenTree, TransformersLM, TreeEngine
from qstar_decoding.errors import ConfigurationError
from qstar_decoding.models import base, testing, token_trie, tree_attention, tree_engine
from qstar_decoding.models.flat.packed_weights import PackedWeights

TinyLM = Callable[[str], TransformersLM]

ARCHITECTURES = ["Llama", "Qwen3", "Mistral", "Gemma2", "GPT2", "Phi", "GPTNeoX", "OPT"]
FALLBACKS = ["Mamba", "GptOss", "Llama4Text"]
TOP_K = 3
VOCABULARY = 40
TOLERANCE = 1e-3
COLUMNS = ["hidden", "tokens", "logprobs", "parent", "action", "depth", "path_logprob", "children"]


def sequences(tree: TokenTree, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return the tokens that every node of the tree stands for."""
    of_root = {int(tree.roots([prompt])[0]): list(prompt) for prompt in prompts}
    result = []
    for node in range(len(tree)):
        root = node
        while tree.parent[root] >= 0:
            root = int(tree.parent[root])
        result.append(of_root[root] + tree.completion_ids(node))
    return result


def assert_exact(tree: TokenTree, prompts: Sequence[Sequence[int]]) -> None:
    """Compare every node with an uncached forward over its tokens, and look at the account of the memory."""
    assert_slots_add_up(tree)
    nodes = sequences(tree, prompts)
    hidden, logprobs = tree.model.forward(nodes)
    np.testing.assert_allclose(tree.hidden, hidden, atol=TOLERANCE)
    # The k tokens have the log-probabilities that they should, and no other token has more.
    np.testing.assert_allclose(tree.logprobs, np.take_along_axis(logprobs, tree.tokens, axis=1), atol=TOLERANCE)
    np.testing.assert_allclose(tree.logprobs, -np.sort(-logprobs, axis=1)[:, : tree.top_k], atol=TOLERANCE)
    assert all(len(set(row)) == tree.top_k for row in tree.tokens.tolist())
    for node, tokens in enumerate(nodes):
        parent, action = int(tree.parent[node]), int(tree.action[node])
        if parent < 0:
            assert (tree.depth[node], tree.path_logprob[node]) == (0, 0)
        else:
            assert tokens == [*nodes[parent], tree.tokens[parent, action]]
            assert tree.children[parent, action] == node
            assert tree.depth[node] == tree.depth[parent] + 1
            expected = tree.path_logprob[parent] + tree.logprobs[parent, action]
            assert tree.path_logprob[node] == pytest.approx(expected)


def assert_slots_add_up(tree: TokenTree) -> None:
    """Every slot of the memory is either free or holds one token, which knows of it."""
    engine = tree._engine
    if isinstance(engine, TreeEngine):
        held = np.flatnonzero(engine._row_in_slot >= 0)
        rows = engine._row_in_slot[held]
        np.testing.assert_array_equal(engine._table.slot[rows], held)
        assert (engine._table.slot[engine._table.in_use()] >= 0).sum() == len(held)
        assert set(rows) <= set(engine._table.in_use())
        assert sorted([*engine._free, *held]) == list(range(engine._pool.capacity))


def contents(tree: TokenTree) -> dict[str, Any]:
    return {name: getattr(tree, name).copy() for name in COLUMNS}


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    for name, column in before.items():
        np.testing.assert_array_equal(column, after[name], err_msg=name)


@contextmanager
def forwards(lm: TransformersLM) -> Iterator[list[int]]:
    """Collect the number of tokens of every forward of the model."""
    counts: list[int] = []
    hook = lm.model.register_forward_pre_hook(
        lambda _, args, kwargs: counts.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    try:
        yield counts
    finally:
        hook.remove()


Script = tuple[list[list[int]], list[list[int] | list[tuple[int, int]]]]


@st.composite
def scripts(draw: st.DrawFn, tokens: tuple[int, int] = (0, VOCABULARY - 1), steps: int = 6) -> Script:
    """Prompts that share beginnings, and the order in which they and their continuations are asked for.

    A step is a list of prompts' indices, or of (node, action) with the node taken modulo the tree's size, so that one
    step mixes prompts and depths, and may ask for the same twice.
    """
    texts = st.lists(st.integers(*tokens), min_size=1, max_size=6)
    prompts = [draw(texts)]
    for _ in range(draw(st.integers(0, 3))):
        other = draw(st.sampled_from(prompts))
        kind = draw(st.sampled_from(["unrelated", "beginning", "continuation", "fork"]))
        beginning = other[: draw(st.integers(1, len(other)))]
        prompts.append(
            {"unrelated": [], "beginning": beginning, "continuation": other, "fork": beginning}[kind]
            + ([] if kind == "beginning" else draw(texts))
        )
    edges = st.tuples(st.integers(0, 30), st.integers(0, TOP_K - 1))
    asked = st.lists(st.integers(0, len(prompts) - 1), min_size=1, max_size=4)
    rest = draw(st.lists(st.lists(edges, min_size=1, max_size=6) | asked, min_size=1, max_size=steps))
    return prompts, [draw(asked), *rest]


def play(tree: TokenTree, script: Script) -> list[list[int]]:
    """Ask the tree for what the script says, and return the prompts that it has seen."""
    prompts, steps = script
    seen: set[int] = set()
    for step in steps:
        if isinstance(step[0], tuple):
            nodes, actions = np.array(step).T
            nodes = nodes % len(tree)
            children = tree.expand(nodes, actions)
            np.testing.assert_array_equal(children, tree.children[nodes, actions])
        else:
            roots = tree.roots([prompts[i] for i in step])
            assert (tree.parent[roots] == -1).all()
            seen.update(step)
    return [prompts[i] for i in sorted(seen)]


@contextmanager
def small_groups(size: int | None) -> Iterator[None]:
    """Make trees of a few tokens take the paths of those with thousands."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_QUERIES_PER_GROUP", "_PROMPT_TOKENS_PER_GROUP", "_POSITIONS_PER_FORWARD"):
            if size:
                patch.setattr(tree_engine if name == "_POSITIONS_PER_FORWARD" else tree_attention, name, size)
        yield


# --------------------------------------------------------------------------------------- equal to an uncached forward


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@given(script=scripts(), size=st.sampled_from([None, 1, 2, 5]))
@settings(max_examples=12)
def test_the_tree_says_what_uncached_forwards_say(
    tiny_lm: TinyLM, architecture: str, script: Script, size: int | None
) -> None:
    tree = TokenTree(tiny_lm(architecture), TOP_K)
    assert isinstance(tree._engine, TreeEngine)
    with small_groups(size):
        prompts = play(tree, script)
    assert_exact(tree, prompts)


# Without its control tokens 0 to 16: after a beginning such as [0], which it never saw in training, its activations are
# so large that even two uncached forwards, in float32 and in float64, differ by 5e-3.
@given(script=scripts(tokens=(17, 49151), steps=3), size=st.sampled_from([None, 2]))
@settings(max_examples=6)
def test_the_tree_says_what_uncached_forwards_of_the_embedded_model_say(
    lm: TransformersLM, script: Script, size: int | None
) -> None:
    tree = TokenTree(lm, TOP_K)
    assert isinstance(tree._engine, TreeEngine)
    with small_groups(size):
        prompts = play(tree, script)
    assert_exact(tree, prompts)


@pytest.mark.parametrize("architecture", ["Llama", "Mistral"])
def test_one_expansion_mixes_prompts_and_depths(tiny_lm: TinyLM, architecture: str) -> None:
    lm = tiny_lm(architecture)
    tree = TokenTree(lm, TOP_K)
    prompts = [[5, 6, 7, 8], [5, 6], [5, 6, 9], [11] * 12]
    roots = tree.roots(prompts)
    deep = roots[:1]
    for _ in range(8):
        deep = tree.expand(deep, np.array([1]))
    size = len(tree)
    with forwards(lm) as counts:
        tree.expand(np.concatenate([roots, deep, tree.parent[deep]]), np.array([0, 1, 2, 0, 2, 0]))
    assert counts == [6]  # one forward, one token an edge
    assert len(tree) == size + 6
    assert_exact(tree, prompts)


@pytest.mark.parametrize("architecture", ["Llama", "Mistral"])
def test_a_prompt_longer_than_a_forward(tiny_lm: TinyLM, architecture: str) -> None:
    lm = tiny_lm(architecture)
    tokens = np.random.default_rng(0).integers(VOCABULARY, size=1300).tolist()
    prompts = [tokens, tokens[:700], [*tokens[:1100], 3]]
    tree = TokenTree(lm, TOP_K)
    with forwards(lm) as counts:
        roots = tree.roots(prompts)
    assert counts == [1024, 277]  # 1301 different tokens, packed
    tree.expand(roots, np.array([0, 1, 2]))
    assert_exact(tree, prompts)


def test_the_comparison_would_notice_a_wrong_mask(tiny_lm: TinyLM, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm("Llama")
    prompts = [[5, 6, 7], [5, 9]]
    tree = TokenTree(lm, TOP_K)

    def see_everything(block: Any, repeats: int, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros_like(block.visible, dtype=dtype).repeat(1, repeats, 1).unsqueeze(1)

    monkeypatch.setattr(tree_attention.QueryBlock, "mask", see_everything)
    tree.expand(tree.roots(prompts)[[0, 0]], np.array([0, 1]))
    with pytest.raises(AssertionError):
        assert_exact(tree, prompts)
    assert "off by" in str(testing.tree_mask_error(lm))


def test_the_comparison_would_notice_a_forgotten_window(tiny_lm: TinyLM) -> None:
    prompts = [list(range(2, 12))]
    tree = TokenTree(tiny_lm("Mistral"), TOP_K)
    tree._engine._window = None  # type: ignore[attr-defined]
    tree.roots(prompts)
    with pytest.raises(AssertionError):
        assert_exact(tree, prompts)


@given(script=scripts(tokens=(0, 4)))
@settings(max_examples=30)
def test_the_prefix_engine_too_and_it_holds_no_memory(script: Script) -> None:
    tree = TokenTree(TabularLM.random(5, 2, seed=0), TOP_K)
    assert isinstance(tree._engine, PrefixEngine)
    assert_exact(tree, play(tree, script))
    assert tree.kv_bytes == 0


# ------------------------------------------------------------------------------------------------ each computed once


def test_nothing_is_computed_twice(tiny_lm: TinyLM) -> None:
    lm = tiny_lm("Llama")
    tree = TokenTree(lm, TOP_K)
    with forwards(lm) as counts:
        roots = tree.roots([[5, 6, 7], [5, 6, 7], [5, 6, 8, 9], [5]])
    assert counts == [5]  # 5, 6, 7, 8, 9: what prompts share is one
    assert roots[0] == roots[1]
    assert len(tree) == 3
    with forwards(lm) as counts:
        children = tree.expand(roots[[0, 1, 0, 2]], np.array([1, 1, 1, 0]))
    assert counts == [2]  # four edges, of which three are the same
    assert children[0] == children[1] == children[2] != children[3]
    before = contents(tree)
    with forwards(lm) as counts:
        np.testing.assert_array_equal(tree.expand(roots[[2, 0]], np.array([0, 1])), children[[3, 0]])
        np.testing.assert_array_equal(tree.roots([[5], [5, 6, 7]]), roots[[3, 0]])
    assert counts == []
    assert_same(before, contents(tree))
    with forwards(lm) as counts:
        tree.expand(roots[[0, 0]], np.array([1, 2]))  # a known edge and a new one
    assert counts == [1]
    assert_exact(tree, [[5, 6, 7], [5, 6, 8, 9], [5]])


def test_a_prefix_engine_computes_nothing_twice_either(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = TabularLM.random(5, 2, seed=0)
    asked: list[list[tuple[int, ...]]] = []
    forward = lm.forward
    monkeypatch.setattr(lm, "forward", lambda batch: (asked.append([tuple(s) for s in batch]), forward(batch))[1])
    tree = TokenTree(lm, TOP_K)
    roots = tree.roots([[1, 2], [1, 2]])
    tree.expand(roots, np.array([0, 0]))
    tree.expand(roots, np.array([0, 0]))
    assert asked == [[(1, 2)], [(1, 2, int(tree.tokens[0, 0]))]]


def test_what_the_tree_shows_cannot_be_written_to(tiny_lm: TinyLM) -> None:
    tree = TokenTree(tiny_lm("Llama"), TOP_K)
    tree.roots([[5, 6]])
    for column in COLUMNS:
        with pytest.raises(ValueError, match="read-only"):
            getattr(tree, column)[0] = 1


@pytest.mark.parametrize("top_k", [0, -1, VOCABULARY + 1, 2.0, "3", None, True])
def test_top_k_is_from_1_to_the_vocabulary(tiny_lm: TinyLM, top_k: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"top_k is an integer from 1 to {VOCABULARY}"):
        TokenTree(tiny_lm("Llama"), top_k)


def test_top_k_may_be_the_whole_vocabulary(tiny_lm: TinyLM) -> None:
    tree = TokenTree(tiny_lm("Llama"), VOCABULARY)
    tree.roots([[5, 6]])
    assert np.exp(tree.logprobs[0]).sum() == pytest.approx(1, abs=1e-5)
    assert_exact(tree, [[5, 6]])


# ---------------------------------------------------------------------------------------------- a budget of memory


def budgeted(lm: TransformersLM, tokens: int) -> TokenTree:
    lm.engine()  # finds out what a token costs
    assert lm.kv_token_bytes
    return TokenTree(lm, TOP_K, kv_budget=tokens * lm.kv_token_bytes)


@pytest.mark.parametrize("architecture", ["Llama", "Gemma2", "GPT2"])
@given(script=scripts(), spare=st.integers(0, 8), size=st.sampled_from([None, 2]))
@settings(max_examples=15)
def test_a_small_budget_changes_the_memory_and_not_the_outputs(
    tiny_lm: TinyLM, architecture: str, script: Script, spare: int, size: int | None
) -> None:
    lm = tiny_lm(architecture)
    unlimited = TokenTree(lm, TOP_K)
    prompts = play(unlimited, script)
    # The least that works: room for the longest prefix.
    longest = max(len(sequence) for sequence in sequences(unlimited, prompts))
    tree = budgeted(lm, longest + spare)
    assert lm.kv_token_bytes
    with small_groups(size):
        for i, step in enumerate(script[1], start=1):
            play(tree, (script[0], [step]))
            assert tree.kv_bytes <= (longest + spare) * lm.kv_token_bytes, f"after step {i}"
    assert_exact(tree, prompts)
    for name, column in contents(unlimited).items():
        if name in ("hidden", "logprobs", "path_logprob"):
            np.testing.assert_allclose(getattr(tree, name), column, atol=TOLERANCE, err_msg=name)
        else:
            np.testing.assert_array_equal(getattr(tree, name), column, err_msg=name)


def test_what_is_given_up_is_computed_again(tiny_lm: TinyLM) -> None:
    lm = tiny_lm("Llama")
    prompts = [[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16]]
    tree = budgeted(lm, 10)  # room for one of them and a continuation
    with forwards(lm) as counts:
        first, second = (int(tree.roots([prompt])[0]) for prompt in prompts)
        for step in range(3):
            for node in (first, second):
                tree.expand(np.array([node]), np.array([step]))
    assert sum(counts) > 12 + 6  # more than the number of tokens in the tree
    assert tree.kv_bytes == 10 * (lm.kv_token_bytes or 0)
    assert_exact(tree, prompts)


def test_what_a_forward_needs_stays_when_more_than_that_is_given_up(tiny_lm: TinyLM) -> None:
    prompts = [list(range(2, 37)), [5, 6]]
    tree = budgeted(tiny_lm("Llama"), 40)
    roots = tree.roots(prompts)
    children = tree.expand(roots[[0, 0, 0]], np.array([0, 1, 2]))  # the memory is full
    # An eighth would be given up, 5 tokens; but 36 of the 40 are those that the next one sees.
    tree.expand(children[:1], np.array([0]))
    assert_exact(tree, prompts)


def test_a_batch_that_exceeds_the_budget_is_computed_in_parts(tiny_lm: TinyLM) -> None:
    lm = tiny_lm("Llama")
    prompts = [[5, 6, 7, 8, 9, 10], [11, 12, 13, 14, 15, 16], [5, 6, 1]]
    tree = budgeted(lm, 8)
    tree.expand(tree.roots(prompts).repeat(2), np.array([0, 1, 2, 0, 1, 2]))
    assert tree.kv_bytes <= 8 * (lm.kv_token_bytes or 0)
    assert_exact(tree, prompts)


def test_the_embedded_model_with_a_small_budget(lm: TransformersLM) -> None:
    prompts = [lm.encode("The movie was"), lm.encode("The movie I saw"), lm.encode("Our trip")]
    tree = budgeted(lm, 6)
    nodes = tree.roots(prompts)
    for rank in (0, 1):
        nodes = tree.expand(nodes, np.full(3, rank))
    assert tree.kv_bytes <= 6 * (lm.kv_token_bytes or 0)
    assert_exact(tree, prompts)


def test_a_budget_too_small_for_one_prompt(tiny_lm: TinyLM) -> None:
    tree = budgeted(tiny_lm("Llama"), 4)
    roots = tree.roots([[5, 9], [5, 6, 7, 8]])  # the second just fits
    before = contents(tree)
    with pytest.raises(ConfigurationError, match=r"kv_budget of .* holds 4 tokens, .* are 5 tokens .* give at least"):
        tree.roots([[1, 2], [5, 6, 7, 8, 9]])
    with pytest.raises(ConfigurationError, match="holds 4 tokens"):
        tree.expand(roots[[1, 0]], np.array([0, 0]))  # computed one by one, the one that fits first
    assert_same(before, contents(tree))
    assert_slots_add_up(tree)
    tree.expand(tree.expand(roots[[0]], np.array([0])), np.array([1]))
    tree.roots([[1, 2]])
    assert_exact(tree, [[5, 6, 7, 8], [5, 9], [1, 2]])


@pytest.mark.parametrize("kv_budget", [0, -1, "1GB", True, float("nan"), float("inf")])
def test_a_budget_is_a_positive_number(tiny_lm: TinyLM, kv_budget: Any) -> None:
    with pytest.raises(ConfigurationError, match="kv_budget is a number of bytes"):
        TokenTree(tiny_lm("Llama"), TOP_K, kv_budget)


# --------------------------------------------------------------------------------------------------- when it fails


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=["error", "Ctrl-C"])
@pytest.mark.parametrize("tokens", [None, 8], ids=["unlimited", "budget"])
@pytest.mark.parametrize(("size", "at"), [(None, 1), (2, 1), (2, 2)], ids=["only", "first", "second"])
def test_a_forward_that_fails_leaves_the_tree_as_it_was(
    new_tiny_lm: TinyLM, error: BaseException, tokens: int | None, size: int | None, at: int
) -> None:
    lm = new_tiny_lm("Llama")
    tree = budgeted(lm, tokens) if tokens else TokenTree(lm, TOP_K)
    prompts = [[5, 6, 7], [5, 8, 9, 10], [11, 12]]
    layer: Any = lm.model.model.layers[1]  # in the middle: the first layer has written to the memory by then
    calls = 0

    def fail(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            raise error
        return type(layer).forward(layer, *args, **kwargs)

    def fails(ask: Callable[[], Any]) -> None:
        nonlocal calls
        calls, before = 0, contents(tree)
        with pytest.MonkeyPatch.context() as patch, small_groups(size):
            patch.setattr(layer, "forward", fail)
            with pytest.raises(type(error)):
                ask()
        assert_same(before, contents(tree))
        assert_slots_add_up(tree)
        assert lm.model.config._attn_implementation == "sdpa"
        assert tree_attention._active.forward is None

    fails(lambda: tree.roots(prompts))
    roots = tree.roots(prompts)
    edges = roots[[0, 1, 0, 2]], np.array([0, 1, 2, 0])
    fails(lambda: tree.expand(*edges))
    children = tree.expand(*edges)
    fails(lambda: tree.expand(children, np.array([0, 0, 1, 1])))
    tree.expand(children, np.array([0, 0, 1, 1]))
    assert_exact(tree, prompts)


def test_memory_that_cannot_grow_leaves_the_tree_as_it_was(
    new_tiny_lm: TinyLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = new_tiny_lm("Llama")
    tree = TokenTree(lm, TOP_K)
    prompts = [[5, 6, 7], np.random.default_rng(0).integers(VOCABULARY, size=300).tolist()]
    tree.roots(prompts[:1])
    before, allocate, calls = contents(tree), tree_attention._memory_like, 0

    def fail_at_second_layer(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise torch.OutOfMemoryError("no memory left")
        return allocate(tensor, shape)

    with monkeypatch.context() as patch:
        patch.setattr(tree_attention, "_memory_like", fail_at_second_layer)
        with pytest.raises(torch.OutOfMemoryError):
            tree.roots(prompts)
    assert_same(before, contents(tree))
    tree.expand(tree.roots(prompts), np.array([0, 1]))
    assert_exact(tree, prompts)


# ------------------------------------------------------------------------------------------------- the model itself


@pytest.mark.parametrize("architecture", FALLBACKS)
def test_where_a_tree_mask_is_not_exact_whole_prefixes_are_computed(
    new_tiny_lm: TinyLM, architecture: str, caplog: pytest.LogCaptureFixture
) -> None:
    lm = new_tiny_lm(architecture)
    prompts = [[5, 6, 7], [5, 6], list(range(2, 30))]
    with caplog.at_level(logging.WARNING, logger="qstar_decoding"):
        trees = [TokenTree(lm, TOP_K) for _ in range(2)]
    (record,) = [r for r in caplog.records if r.name.startswith("qstar_decoding")]
    assert f"tiny-{architecture}" in record.getMessage()
    assert "whole prefixes are recomputed instead" in record.getMessage()
    for tree in trees:
        assert isinstance(tree._engine, PrefixEngine)
        tree.expand(tree.expand(tree.roots(prompts), np.array([0, 1, 2])), np.array([1, 1, 0]))
        assert_exact(tree, prompts)
        assert tree.kv_bytes == 0


def test_a_window_that_only_the_mask_knows_of_is_not_missed(new_tiny_lm: TinyLM) -> None:
    problem = testing.tree_mask_error(new_tiny_lm("Llama4Text"))
    assert problem == "its attention has a window of 16 tokens that a tree mask does not learn of"


@pytest.mark.parametrize("architecture", ["embedded", *ARCHITECTURES, *FALLBACKS])
def test_the_model_stays_as_it_was(lm: TransformersLM, new_tiny_lm: TinyLM, architecture: str) -> None:
    lm = lm if architecture == "embedded" else new_tiny_lm(architecture)
    ids = torch.tensor([[5, 6, 7]])

    def generate() -> list[int]:
        output: Any = lm.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, pad_token_id=0
        )
        return output.tolist()  # type: ignore[no-any-return]

    before = lm.model.config._attn_implementation, generate(), str(lm.model.config)
    tree = TokenTree(lm, TOP_K)
    tree.expand(tree.roots([[5, 6, 7]]), np.array([0]))
    assert (lm.model.config._attn_implementation, generate(), str(lm.model.config)) == before
    assert not lm.model.training
    assert not any(module._forward_pre_hooks for module in lm.model.modules())


# -------------------------------------------------------------------------------------------------------- forgetting


class Held:
    """Holds some nodes of a tree."""

    def __init__(self, nodes: Sequence[int]) -> None:
        self.node = np.array(nodes, dtype=np.int64)


@pytest.mark.parametrize("architecture", ["Llama", "Mistral", "tabular"])
@given(script=scripts(tokens=(0, 4)), more=scripts(tokens=(0, 4)), most=st.integers(0, 12), data=st.data())
@settings(max_examples=15)
def test_what_is_left_after_forgetting_is_as_it_was(
    tiny_lm: TinyLM, architecture: str, script: Script, more: Script, most: int, data: st.DataObject
) -> None:
    tree = TokenTree(TabularLM.random(5, 2, seed=0) if architecture == "tabular" else tiny_lm(architecture), TOP_K)
    prompts = play(tree, script)
    before, texts = contents(tree), sequences(tree, prompts)
    held = Held(data.draw(st.lists(st.integers(-1, len(tree) - 1), max_size=4)))
    nodes = held.node.copy()
    tree.pin(held)
    new = tree.evict(most)
    kept = np.flatnonzero(new >= 0)
    np.testing.assert_array_equal(new[kept], np.arange(len(tree)))
    np.testing.assert_array_equal(held.node, np.where(nodes < 0, -1, new[nodes]))
    assert (held.node[nodes >= 0] >= 0).all()
    for name in ("hidden", "tokens", "logprobs", "action", "depth", "path_logprob"):
        np.testing.assert_array_equal(getattr(tree, name), before[name][kept], err_msg=name)
    # The tree goes on as if nothing had been: every node is what it was, and so is everything that is grown from it.
    roots = [prompt for prompt in prompts if (tuple(prompt), None) in tree._roots]
    assert sequences(tree, roots) == [texts[node] for node in kept]
    assert_slots_add_up(tree)
    roots += [prompt for prompt in play(tree, more) if prompt not in roots]
    assert_exact(tree, roots)


def test_the_longest_unused_goes_first(tiny_lm: TinyLM) -> None:
    tree = TokenTree(tiny_lm("Llama"), TOP_K)
    first, second, third = (tree.roots([[token, 7]]) for token in (5, 6, 8))
    child = tree.expand(second, np.array([0]))
    tree.roots([[5, 7]])
    new = tree.evict(2)
    assert (new[[*first, *second, *child]] >= 0).all()  # of the second, its last use was as its child's parent
    assert new[third[0]] < 0
    assert len(tree) == 3


def test_memory_stays_flat_over_endless_prompts(tiny_lm: TinyLM) -> None:
    tree = TokenTree(tiny_lm("Llama"), TOP_K)
    engine, rng = tree._engine, np.random.default_rng(0)
    assert isinstance(engine, TreeEngine)
    sizes = []
    for _ in range(40):
        tree.expand(tree.roots(rng.integers(VOCABULARY, size=(8, 20)).tolist()), np.arange(8) % TOP_K)
        tree.evict(16)
        sizes.append([len(tree), len(engine._table.in_use()), engine._table.size, len(engine._prompts)])
        sizes[-1] += [len(engine._prompt_ids), len(engine._trie), engine._pool.capacity]
    # Eight prompts of 20 tokens, with a continuation each; a few of their first tokens were older prompts'. Before
    # the older ones are evicted, the table holds twice as many.
    assert (np.max(sizes, axis=0) <= [16, 8 * 21, 2 * 8 * 21, 20, 20, 8 * 21, 512]).all()
    assert {size for size, *_ in sizes} == {16}
    assert_slots_add_up(tree)


@pytest.mark.parametrize("revisits", [False, True])
def test_memory_grows_only_where_eviction_costs(
    tiny_lm: TinyLM, monkeypatch: pytest.MonkeyPatch, revisits: bool
) -> None:
    monkeypatch.setattr(token_trie, "_FIRST_TOKENS", 40)
    lm, rng = tiny_lm("Llama"), np.random.default_rng(0)
    tree = TokenTree(lm, TOP_K, engine=lm.new_engine())
    engine: Any = tree.engine
    prompts = [[first, *rng.integers(VOCABULARY, size=5).tolist()] for first in range(40)]
    roots = np.concatenate([tree.roots([prompt]) for prompt in prompts])
    assert engine._pool.capacity == 40
    assert engine._computed_again == 0
    for step in range(TOP_K) if revisits else ():
        for root in roots:
            tree.expand(root[None], np.array([step]))
    # 40 prompts of 6 tokens with three continuations each are 360 tokens; from 320 on, none was computed again.
    assert (320 if revisits else 40) <= engine._pool.capacity <= (640 if revisits else 40)
    assert_exact(tree, prompts)


def test_bytes_after_many_prompts_are_bounded(tiny_lm: TinyLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_trie, "_FIRST_TOKENS", 512)
    lm = tiny_lm("Llama")
    process = DecodingMDP(lm, reward="length", top_k=TOP_K, max_new_tokens=8, max_prefixes=400)
    planner, rng = AStarPlanner(process), np.random.default_rng(0)
    held = []
    for _ in range(60):
        planner.plan(" ".join(f"w{i}" for i in rng.integers(2, VOCABULARY, size=12)), 40)
        engine, tree = cast("Any", process.tree.engine), process.tree
        known = sum(column.nbytes for row in engine._known.values() for column in row)
        columns = sum(column.nbytes for column in tree._columns.used().values())
        held.append((engine.kv_bytes, known, columns, len(engine._trie), engine._table.size))
    assert held[-1][0] <= 512 * (lm.kv_token_bytes or 0)
    # Between two evictions the tree grows from half of its limit to the limit and one more search.
    assert len(process.tree) <= 400 + 53
    assert (np.max(held[30:], axis=0) <= 1.3 * np.max(held[:30], axis=0)).all()


# --------------------------------------------------------------------------------------------------- out of memory


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory")])
def test_out_of_memory_halves_the_batch_and_is_said_once(
    new_tiny_lm: TinyLM, error: RuntimeError, caplog: pytest.LogCaptureFixture
) -> None:
    lm = new_tiny_lm("Llama")
    prompts = [[5, 6, 7, 8], [5, 9], [11, 12, 13]]
    tree = TokenTree(lm, TOP_K)
    layer: Any = lm.model.model.layers[1]

    def fail(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if hidden.shape[1] > 4:
            raise error
        return type(layer).forward(layer, hidden, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.WARNING, "qstar_decoding"):
        patch.setattr(layer, "forward", fail)
        roots = tree.roots(prompts)  # eight tokens
        tree.expand(roots.repeat(2), np.array([0, 1] * 3))
    assert [r.getMessage() for r in caplog.records] == ["out of memory: from now on at most 4 tokens at a time"]
    assert_exact(tree, prompts)


def test_one_token_that_does_not_fit_is_an_error(new_tiny_lm: TinyLM) -> None:
    lm = new_tiny_lm("Llama")
    tree = TokenTree(lm, TOP_K)
    layer: Any = lm.model.model.layers[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer, "forward", lambda *a, **k: (_ for _ in ()).throw(torch.OutOfMemoryError("no")))
        with pytest.raises(torch.OutOfMemoryError):
            tree.roots([[5, 6, 7]])
    assert len(tree) == 0
    tree.roots([[5, 6, 7]])
    assert_exact(tree, [[5, 6, 7]])


def test_memory_that_cannot_grow_is_a_budget(
    new_tiny_lm: TinyLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tree = TokenTree(new_tiny_lm("Llama"), TOP_K)
    prompts = np.random.default_rng(0).integers(VOCABULARY, size=(10, 60)).tolist()
    tree.roots(prompts[:2])
    assert tree._engine._pool.capacity == 256  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        patch.setattr(
            tree_attention.KeyValuePool, "grow", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no"))
        )
        roots = tree.roots(prompts)  # 600 tokens
        tree.expand(roots, np.arange(10) % TOP_K)
    assert tree._engine._pool.capacity == 256  # type: ignore[attr-defined]
    assert "going on with 256 tokens" in caplog.text
    assert_exact(tree, prompts)


# ------------------------------------------------------------------------------------------------ faster, not otherwise


@given(data=st.data(), n=st.integers(1, 3), k=st.integers(1, 4), width=st.integers(1, 5), columns=st.integers(4, 60))
def test_the_fast_top_k_is_top_k(data: st.DataObject, n: int, k: int, width: int, columns: int) -> None:
    order = [data.draw(st.permutations(range(columns))) for _ in range(n)]
    values = torch.tensor(order, dtype=torch.float32)
    for ours, theirs in zip(base._top(values, k, width), values.topk(k), strict=True):
        assert torch.equal(ours, theirs)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=20))
def test_pieces_share_groups_without_overlap(widths: list[int]) -> None:
    group, offset, _, width = tree_attention._pack(np.array(widths), np.ones(len(widths), dtype=np.int64))
    taken = [(g, o + i) for g, o, w in zip(group, offset, widths, strict=True) for i in range(w)]
    assert len(set(taken)) == sum(widths)
    assert max(place for _, place in taken) < width == max(widths)
    assert sorted(set(group)) == list(range(max(group) + 1))


@pytest.mark.parametrize("architecture", ["Llama", "Phi"])  # without and with biases
def test_packed_weights_change_nothing_but_the_speed(new_tiny_lm: TinyLM, architecture: str) -> None:
    lm = new_tiny_lm(architecture)
    if lm.packed_weights is None or lm.packed_weights.size_for(16) is None:
        pytest.skip("this build of PyTorch has no MKL")
    prompts = [[5, 6, 7], [5, 9], [11], [12, 13]]

    def grown() -> TokenTree:
        tree = TokenTree(lm, TOP_K)
        nodes = tree.expand(tree.roots(prompts).repeat(3), np.tile([0, 1, 2], 4))
        tree.expand(nodes.repeat(3), np.tile([0, 1, 2], 12))  # 36 tokens
        return tree

    assert_exact(grown(), prompts)
    assert lm.packed_weights._forwards.keys() == {16}  # of 8, 12 and 36 tokens
    assert not any("forward" in vars(module) for module in lm.model.modules())
    with torch.no_grad():
        for weights in lm.model.parameters():
            weights.mul_(0.5)
    assert_exact(grown(), prompts)  # with the weights that the model has now


def test_packed_weights_keep_to_their_share_of_memory(tiny_lm: TinyLM) -> None:
    model = tiny_lm("Llama").model
    nothing, one_copy = (
        PackedWeights(model, n * 4 * sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear)))
        for n in (0.9, 1.5)
    )
    assert [nothing.size_for(n) for n in (1, 6, 7, 16, 17, 64, 65)] == [None] * 7
    if one_copy.size_for(16):
        assert [one_copy.size_for(n) for n in (1, 6, 7, 16, 17, 32, 33, 45, 64, 65)] == [
            *[None, None, 16, 16, 32, 32, None, 64, 64, None]
        ]
        with one_copy.swapped_in(16):
            pass
        assert [one_copy.size_for(n) for n in (16, 32, 64)] == [16, None, None]


def test_the_single_copy_from_a_gpu_is_taken_apart() -> None:
    hidden, logprobs = torch.randn(3, 5), torch.randn(3, 2)
    tokens = torch.tensor([[0, 1], [262_143, 128_255], [(1 << 24) - 1, 7]])
    outputs = tree_engine.unpack_outputs(torch.cat((hidden, tokens.float(), logprobs), 1).numpy(), 2)
    for ours, theirs in zip(outputs, (hidden, tokens, logprobs), strict=True):
        assert torch.equal(torch.from_numpy(ours), theirs)


def test_layouts_are_made_once_they_are_worthwhile(tiny_lm: TinyLM) -> None:
    model = tiny_lm("Llama").model
    if PackedWeights(model).size_for(16) is None:
        pytest.skip("this build of PyTorch has no MKL")
    patient = PackedWeights(model, worthwhile=3)
    assert [patient.size_for(n) for n in (16, 32, 9, 12, 16, 32, 64, 16)] == [
        None,
        None,
        None,
        None,
        16,
        None,
        None,
        16,
    ]
    waiting = tiny_lm("Llama")
    assert TransformersLM(waiting.model, waiting.tokenizer).packed_weights.size_for(16) is None  # type: ignore[union-attr]


@pytest.mark.parametrize("version", [1, 2])
def test_the_limit_of_a_container_counts(version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit, usage, reclaimable = base._CONTROL_GROUPS[2 - version][1:]
    monkeypatch.setattr(
        base, "_CONTROL_GROUPS", ((str(tmp_path), limit, usage, reclaimable), ("/no/such", "a", "b", "c"))
    )
    everything = base.free_memory()
    (tmp_path / usage).write_text("3000000\n")
    (tmp_path / "memory.stat").write_text(f"anon 5\n{reclaimable} 1000000\n")
    (tmp_path / limit).write_text("max\n")
    assert base.free_memory() > 0.5 * everything
    (tmp_path / limit).write_text("9000000\n")
    assert base.free_memory() == 7_000_000
    (tmp_path / limit).write_text("1000000\n")
    assert base.free_memory() == 0


def test_prepack_is_yes_no_or_auto(tiny_lm: TinyLM) -> None:
    lm = tiny_lm("Llama")
    assert TransformersLM(lm.model, lm.tokenizer, prepack=False).packed_weights is None
    with pytest.raises(ConfigurationError, match="prepack is True, False or 'auto'"):
        TransformersLM(lm.model, lm.tokenizer, prepack="yes")
