"""llama.cpp's token tree against uncached decodes and against transformers; tokens; options; pickling.

Tiny models in float32 show every mistake. The embedded model and Gemma are quantised: llama.cpp rounds the inputs of
their weights to 8 bits, so that its own outputs depend on the batch, by some tenths of a nat.
"""

from __future__ import annotations

import copy
import gc
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: make llama-cpp")

from qstar_decoding.agents import AStarPlanner
from qstar_decoding.envs import DecodingMDP, TokenTree, TransformersLM
from qstar_decoding.errors import ConfigurationError, PromptError, UnknownNameError
from qstar_decoding.models import LlamaCppLM, PrefixEngine, check_language_model, load_language_model, token_trie
from qstar_decoding.models.embedded_model import gguf_path
from qstar_decoding.models.llama_cpp import engine as engine_module
from qstar_decoding.models.llama_cpp.engine import LlamaEngine
from qstar_decoding.models.llama_cpp.gguf_file import read_tensor
from qstar_decoding.models.llama_cpp.softmax import log_softmax

from .tiny_gguf import write

TinyLM = Callable[[str], TransformersLM]
Tiny = Callable[[str], LlamaCppLM]

TREES = ["Llama", "Qwen3", "Gemma2"]
TOP_K = 3
EXACT = 1e-3  # nats, of float32 weights with keys and values in float16
NONE = np.empty(0, dtype=np.int64)
TEXTS = ["Once upon a time there", "The movie was", "The movie was really good", "def main():", "My favourite food is"]


@pytest.fixture(scope="module")
def files(tiny_lm: TinyLM, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Write the tiny model of an architecture as a GGUF file, once."""
    folder = tmp_path_factory.mktemp("gguf")

    def file(architecture: str) -> Path:
        path = folder / f"{architecture}.gguf"
        return path if path.exists() else write(tiny_lm(architecture).model, architecture, path)

    return file


@pytest.fixture(scope="module")
def tiny(files: Callable[[str], Path]) -> Tiny:
    """Load the tiny model of an architecture with llama.cpp."""

    def load(architecture: str) -> LlamaCppLM:
        model = load_language_model(str(files(architecture)))
        assert isinstance(model, LlamaCppLM)
        return model

    return load


@pytest.fixture(scope="module")
def embedded() -> LlamaCppLM:
    """The embedded model in llama.cpp."""
    model = load_language_model("smollm2-135m-instruct", engine="llama.cpp")
    assert isinstance(model, LlamaCppLM)
    return model


def grow(
    tree: TokenTree, prompts: list[list[int]], rng: np.random.Generator, steps: int, width: int
) -> list[list[int]]:
    """Follow random edges from nodes of all ages, prompts among them; return the tokens of every node."""
    waiting = list(prompts)
    for step in range(steps):
        if waiting and step % 2 == 0:
            tree.roots([waiting.pop(0)])
        nodes = rng.integers(len(tree), size=int(rng.integers(1, width + 1)))
        tree.expand(nodes, rng.integers(tree.top_k, size=len(nodes)))
    of_root = {int(tree.roots([prompt])[0]): prompt for prompt in prompts}
    result = []
    for node in range(len(tree)):
        root = node
        while tree.parent[root] >= 0:
            root = int(tree.parent[root])
        result.append(of_root[root] + tree.completion_ids(node))
    return result


def assert_exact(tree: TokenTree, sequences: list[list[int]], tolerance: float = EXACT) -> None:
    hidden, logprobs = tree.model.forward(sequences)
    np.testing.assert_allclose(tree.hidden, hidden, atol=tolerance * max(1.0, float(np.abs(hidden).max())))
    np.testing.assert_allclose(tree.logprobs, np.take_along_axis(logprobs, tree.tokens, axis=1), atol=tolerance)
    np.testing.assert_allclose(tree.logprobs, -np.sort(-logprobs, axis=1)[:, : tree.top_k], atol=tolerance)


def assert_memory_adds_up(engine: LlamaEngine) -> None:
    """Every token in memory has a slot, a place of its own on a shelf, and a cell; every lane holds a whole path."""
    table = engine._table
    resident = np.flatnonzero(table.slot[: table.size] >= 0)
    assert (engine._shelf[resident] >= 0).all()
    assert engine._stored[resident].all()
    assert (
        engine._taken.sum()
        == len(resident)
        == len(set(zip(table.position[resident], engine._shelf[resident], strict=True)))
    )
    parents = table.parent[resident]
    assert set(parents[parents >= 0]) <= set(resident)  # a path is in memory from its beginning
    tips = engine._tip[engine._tip >= 0]
    assert set(tips) <= set(resident)
    assert all(engine._tip[lane] == row for row, lane in engine._lane_of.items())


# --------------------------------------------------------------------------------------- equal to an uncached decode


@pytest.mark.parametrize("architecture", [*TREES, "Mamba"])
def test_forward_says_what_transformers_says(tiny: Tiny, tiny_lm: TinyLM, architecture: str) -> None:
    ours, theirs = tiny(architecture), tiny_lm(architecture)
    rng = np.random.default_rng(0)
    sequences = [rng.integers(1, theirs.vocab_size, size=n).tolist() for n in (1, 2, 3, 12, 40)]
    (hidden, logprobs), (expected_hidden, expected) = ours.forward(sequences), theirs.forward(sequences)
    np.testing.assert_allclose(logprobs, expected, atol=2e-2)  # keys and values are in float16
    np.testing.assert_allclose(hidden, expected_hidden, atol=2e-2)
    np.testing.assert_array_equal(ours.token_embeddings(), theirs.token_embeddings())


@pytest.mark.parametrize("architecture", TREES)
@pytest.mark.parametrize("budget", [None, 45])
def test_the_tree_says_what_uncached_decodes_say(tiny: Tiny, architecture: str, budget: int | None) -> None:
    lm, rng = tiny(architecture), np.random.default_rng(1)
    lm.engine()
    tree = TokenTree(lm, TOP_K, kv_budget=None if budget is None else budget * lm.kv_token_bytes)
    engine = tree._engine
    assert isinstance(engine, LlamaEngine)
    prompts = [[5, 6, 7, 8], [5, 6], [5, 6, 9], [11] * 12, [5, 6, 7, 8, 9, 10, 11, 12], list(range(1, 31))]
    assert_exact(tree, grow(tree, prompts, rng, steps=40, width=7))
    assert_memory_adds_up(engine)
    if budget:
        assert engine._pool.capacity <= budget
    gc.collect()


def test_a_window_is_kept_over_long_texts(tiny: Tiny, tiny_lm: TinyLM) -> None:
    lm = tiny("Gemma2")  # every other layer looks back 4 tokens; the library reuses cells that one sequence holds
    tree, rng = TokenTree(lm, TOP_K), np.random.default_rng(2)
    prompt = rng.integers(1, 40, size=30).tolist()
    root = tree.roots([prompt])
    node = root
    for _ in range(12):
        node = tree.expand(node, np.array([0]))
    tree.roots([prompt[:3], prompt[:9], prompt[:20]])
    tree.expand(root.repeat(3), np.array([0, 1, 2]))
    sequences = [prompt + tree.completion_ids(n) for n in range(len(tree)) if n >= root[0] and tree.depth[n] > 0]
    nodes = [n for n in range(len(tree)) if tree.depth[n] > 0]
    logprobs = lm.forward(sequences)[1]
    np.testing.assert_allclose(
        tree.logprobs[nodes], np.take_along_axis(logprobs, tree.tokens[nodes], axis=1), atol=EXACT
    )


def test_the_comparison_would_notice_a_lane_with_a_sibling(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    walk = LlamaEngine._walk

    def also_to_the_siblings(self: LlamaEngine, row: int, lane: int) -> None:
        walk(self, row, lane)
        position = int(self._table.position[row])
        for shelf in np.setdiff1d(np.flatnonzero(self._taken[position]), self._shelf[row]).tolist():
            self._context.copy(self._sequence(shelf, 0), lane, position, position + 1)

    lm = tiny("Llama")
    tree = TokenTree(lm, TOP_K)
    children = tree.expand(tree.roots([[5, 6, 7]]).repeat(2), np.array([0, 1]))
    monkeypatch.setattr(LlamaEngine, "_walk", also_to_the_siblings)
    tree._engine._lane_of.clear()  # type: ignore[attr-defined]
    tree.expand(children, np.array([1, 2]))
    with pytest.raises(AssertionError):
        assert_exact(tree, [[5, 6, 7, *tree.completion_ids(node)] for node in range(len(tree))])
    monkeypatch.setattr("qstar_decoding.models.llama_cpp.library.Context.copy", lambda *_: None)
    assert "off by" in str(engine_module.tree_error(lm))


def test_more_branches_at_one_depth_than_sequences(tiny: Tiny) -> None:
    lm, rng = tiny("Llama"), np.random.default_rng(0)
    tree = TokenTree(lm, 20)
    roots = tree.roots([[a, b] for a in range(1, 13) for b in range(1, 3)])
    nodes = tree.expand(roots.repeat(20), np.tile(np.arange(20), len(roots)))  # 480 branches
    nodes = tree.expand(nodes, rng.integers(20, size=len(nodes)))
    some = rng.choice(len(tree), size=60, replace=False)
    prompts = {
        int(root): prompt
        for root, prompt in zip(roots, [[a, b] for a in range(1, 13) for b in range(1, 3)], strict=True)
    }
    sequences = []
    for node in some:
        root = int(node)
        while tree.parent[root] >= 0:
            root = int(tree.parent[root])
        sequences.append(prompts[root] + tree.completion_ids(int(node)))
    logprobs = lm.forward(sequences)[1]
    np.testing.assert_allclose(
        tree.logprobs[some], np.take_along_axis(logprobs, tree.tokens[some], axis=1), atol=2 * EXACT
    )
    assert_memory_adds_up(tree._engine)  # type: ignore[arg-type]


def test_the_memory_grows_and_keeps_what_it_holds(tiny: Tiny) -> None:
    lm, rng = tiny("Qwen3"), np.random.default_rng(3)
    engine = lm.new_engine()
    assert isinstance(engine, LlamaEngine)
    prompts = [rng.integers(1, 40, size=40).tolist() for _ in range(12)]
    rows, _ = engine.compute(prompts[:6], NONE, NONE, TOP_K)
    before = engine._pool.capacity
    more, _ = engine.compute(prompts[6:], NONE, NONE, TOP_K)
    assert engine._pool.capacity > before
    tokens = rng.integers(1, 40, size=12)
    _, outputs = engine.compute([], np.concatenate((rows, more)), tokens, TOP_K)
    logprobs = lm.forward([[*prompt, int(token)] for prompt, token in zip(prompts, tokens, strict=True)])[1]
    np.testing.assert_allclose(outputs.logprobs, np.take_along_axis(logprobs, outputs.tokens, axis=1), atol=EXACT)


def test_each_token_is_computed_once_and_prompts_cost_one_more_decode(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    decodes: list[tuple[int, bool]] = []
    decode = LlamaEngine._decode

    def counted(self: LlamaEngine, rows: Any, *, outputs: bool) -> Any:
        decodes.append((len(rows), outputs))
        return decode(self, rows, outputs=outputs)

    monkeypatch.setattr(LlamaEngine, "_decode", counted)
    tree = TokenTree(tiny("Llama"), TOP_K)
    roots = tree.roots([[21, 22, 23, 24], [21, 22, 25]])
    assert decodes == [(5, True)]  # what prompts share is one; few tokens are not worth a decode of their own
    decodes.clear()
    tree.expand(roots.repeat(3), np.array([0, 1, 2] * 2))
    assert decodes == [(6, True)]
    decodes.clear()
    tree.roots([list(range(36, 6, -1))])
    assert decodes == [(29, False), (1, True)]


def test_masks_of_allowed_tokens(tiny: Tiny) -> None:
    lm = tiny("Llama")
    engine, mask = lm.new_engine(), np.zeros(lm.vocab_size, dtype=bool)
    mask[[3, 17]] = True
    _, outputs = engine.compute([[5, 6], [5, 7]], NONE, NONE, TOP_K, [mask, None])
    logprobs = lm.forward([[5, 6], [5, 7]])[1]
    assert set(outputs.tokens[0, :2]) == {3, 17}
    assert outputs.logprobs[0, 2] == -np.inf
    np.testing.assert_allclose(outputs.logprobs[0, :2], logprobs[0, outputs.tokens[0, :2]], atol=EXACT)
    np.testing.assert_allclose(outputs.logprobs[1], -np.sort(-logprobs[1])[:TOP_K], atol=EXACT)


def test_a_failed_decode_changes_nothing(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny("Llama")
    tree = TokenTree(lm, TOP_K)
    roots = tree.roots([[5, 6, 7], [5, 8]])
    with monkeypatch.context() as patch:
        patch.setattr(type(tree._engine._context), "decode", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))  # type: ignore[attr-defined]
        with pytest.raises(KeyboardInterrupt):
            tree.expand(roots, np.array([0, 1]))
    assert_memory_adds_up(tree._engine)  # type: ignore[arg-type]
    tree.expand(roots, np.array([0, 1]))
    assert_exact(tree, [[5, 6, 7], [5, 8], [5, 6, 7, int(tree.tokens[0, 0])], [5, 8, int(tree.tokens[1, 1])]])


@pytest.mark.parametrize("architecture", [*TREES, "Mamba"])
def test_the_laws_of_language_models(tiny: Tiny, architecture: str) -> None:
    check_language_model(tiny(architecture), prompts=["abc"])
    assert isinstance(tiny(architecture).new_engine(), PrefixEngine if architecture == "Mamba" else LlamaEngine)


# ------------------------------------------------------------------------------------------------- quantised models


def quantised(lm: LlamaCppLM, budget: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the errors of a tree, and those of llama.cpp alone where it reads the same token by token: [n, top_k]."""
    lm.engine()
    tree, rng = (
        TokenTree(lm, 8, kv_budget=None if budget is None else budget * lm.kv_token_bytes),
        np.random.default_rng(0),
    )
    grown = grow(tree, [lm.encode(text) for text in TEXTS], rng, steps=10, width=3)
    some = np.sort(rng.choice(len(tree), size=8, replace=False))
    sequences = [grown[node] for node in some]
    reference = np.take_along_axis(lm.forward(sequences)[1], tree.tokens[some], axis=1)
    alone = []
    for sequence, tokens in zip(sequences, tree.tokens[some], strict=True):
        context, ids = lm.plain_context(len(sequence)), np.array(sequence)
        for place in range(len(sequence)):
            logits, _ = context.extend(ids, place, place + 1, outputs=place == len(sequence) - 1)
        alone.append(log_softmax(logits)[0, tokens])
    assert_memory_adds_up(tree._engine)  # type: ignore[arg-type]
    return np.abs(tree.logprobs[some] - reference), np.abs(np.array(alone) - reference)


@pytest.mark.parametrize(("name", "budget"), [("smollm2-135m-instruct", 30), ("gemma3-270m", None)])
def test_quantised_trees_differ_no_more_than_batches_do(name: str, budget: int | None) -> None:
    if gguf_path(name) is None:
        pytest.skip(f"the wheels of {name} are not installed")
    lm = load_language_model(name, engine="llama.cpp")
    assert isinstance(lm, LlamaCppLM)
    ours, alone = quantised(lm, budget)
    # A token too many or too few in a path moves log-probabilities by more than a nat.
    assert np.sqrt(np.mean(ours**2)) <= max(1.5 * np.sqrt(np.mean(alone**2)), 0.02)
    assert ours.max() <= max(2 * alone.max(), 0.1)


def test_the_embedded_model_is_near_that_of_transformers(embedded: LlamaCppLM, lm: TransformersLM) -> None:
    sequences = [lm.encode(text) for text in TEXTS]
    (hidden, logprobs), (expected_hidden, expected) = embedded.forward(sequences), lm.forward(sequences)
    top = np.argsort(-expected, axis=1)[:, :8]
    difference = np.take_along_axis(logprobs - expected, top, axis=1)
    assert np.sqrt(np.mean(difference**2)) < 0.3  # inputs of weights rounded to 8 bits; measured in docs/performance.md
    cosine = (
        (hidden * expected_hidden).sum(1) / np.linalg.norm(hidden, axis=1) / np.linalg.norm(expected_hidden, axis=1)
    )
    assert cosine.min() > 0.98
    assert embedded.hidden_size == lm.hidden_size
    path = gguf_path("smollm2-135m-instruct")
    assert path is not None
    np.testing.assert_array_equal(read_tensor(path, "token_embd.weight"), lm.token_embeddings())
    assert read_tensor(path, "no such tensor") is None


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_a_tensor_of_a_file_is_what_the_gguf_package_reads(kind: str, tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((6, 64)).astype(np.float32)
    quantization = gguf.GGMLQuantizationType[kind]
    data = gguf.quantize(values, quantization)
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_array("words", ["of", "any", "length"])
    writer.add_tensor("first", values[:1])
    writer.add_tensor("x", data, raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    np.testing.assert_array_equal(read_tensor(tmp_path / "x.gguf", "x"), gguf.dequantize(data, quantization))
    assert read_tensor(tmp_path / "x.gguf", "no such tensor") is None
    content = (tmp_path / "x.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(content[:-100])
    with pytest.raises(ValueError, match="ends before its tensor 'x' does"):
        read_tensor(tmp_path / "cut.gguf", "x")
    (tmp_path / "other.gguf").write_bytes(b"PK" + content)
    with pytest.raises(ValueError, match="is not a GGUF file"):
        read_tensor(tmp_path / "other.gguf", "x")


def test_a_shipped_q_plans_with_it(embedded: LlamaCppLM) -> None:
    from qstar_decoding.agents import QHeuristic

    mdp = DecodingMDP(embedded, reward="sentiment", max_new_tokens=8)
    plan = AStarPlanner(mdp, heuristic=QHeuristic("sentiment")).plan("The movie was", 40)
    logprobs = embedded.forward(
        [embedded.encode("The movie was") + list(plan.token_ids[:n]) for n in range(len(plan.token_ids))]
    )[1]
    assert plan.logprob == pytest.approx(
        sum(float(row[token]) for row, token in zip(logprobs, plan.token_ids, strict=True)),
        abs=0.5 * len(plan.token_ids),
    )
    assert plan.text


# ------------------------------------------------------------------------------------------------------------- tokens


def test_tokens_are_those_of_transformers(embedded: LlamaCppLM, lm: TransformersLM) -> None:
    texts = [
        "The movie was great.", "  two  spaces\n\nnew\ttab", "é 日本語 🙂", "<|im_start|>user\nhi<|im_end|>", "", "a",
        "it's 1999 and 3.14 $5", "def f(x):\n    return x**2",
    ]  # fmt: skip
    for text in texts:
        assert embedded.encode(text) == lm.encode(text)
        assert embedded.decode(embedded.encode(text)) == lm.decode(lm.encode(text))
    chats = [
        [{"role": "user", "content": "Hello"}],
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Sure, the answer"}],
    ]
    for chat in chats:
        assert embedded.encode(chat) == lm.encode(chat)
    assert embedded.eos_token_ids == lm.eos_token_ids
    assert dict(embedded.special_tokens) == lm.special_tokens
    assert embedded.context_length == lm.context_length
    rng = np.random.default_rng(0)
    for ids in rng.integers(embedded.vocab_size, size=(200, 4)).tolist():
        assert embedded.decode(ids) == lm.decode(ids)
        assert embedded.decode_continuation(ids) == lm.decode_continuation(ids)
        assert embedded.token_bytes(ids[0]) == lm.token_bytes(ids[0])
    with pytest.raises(ConfigurationError, match="from 0 to 49151"):
        embedded.decode([49152])


def test_a_chat_without_a_template_is_refused(tiny: Tiny) -> None:
    with pytest.raises(PromptError, match="no chat template"):
        tiny("Llama").encode([{"role": "user", "content": "a"}])


# ------------------------------------------------------------------------------------------------- loading and options


def test_one_model_a_process_that_can_be_pickled_and_is_never_copied(tiny: Tiny, files: Callable[[str], Path]) -> None:
    lm = tiny("Llama")
    assert tiny("Llama") is lm is pickle.loads(pickle.dumps(lm)) is copy.deepcopy(lm)
    other = LlamaCppLM(files("Llama"), name="mine")
    other.eos_token_ids = frozenset({3})
    again = pickle.loads(pickle.dumps(other))
    assert again is not other
    assert (again.name, again.eos_token_ids) == ("mine", frozenset({3}))
    np.testing.assert_array_equal(again.forward([[5, 6]])[1], other.forward([[5, 6]])[1])


def test_threads_take_turns(tiny: Tiny) -> None:
    lm = tiny("Llama")
    mdps = [DecodingMDP(lm, reward="length", top_k=3, max_new_tokens=8) for _ in range(3)]
    plans: dict[int, Any] = {}

    def plan(i: int) -> None:
        plans[i] = AStarPlanner(mdps[i]).plan("abc"[: i + 1], 60)

    workers = [threading.Thread(target=plan, args=(i,)) for i in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for i, mdp in enumerate(mdps):
        alone = AStarPlanner(mdp.with_empty_tree()).plan("abc"[: i + 1], 60)
        assert plans[i].text == alone.text


def test_options_that_it_does_not_have_are_named(tiny: Tiny, files: Callable[[str], Path], tmp_path: Path) -> None:
    path = str(files("Llama"))
    with pytest.raises(ConfigurationError, match="last hidden state only"):
        DecodingMDP(path, reward="length", hidden_layers=[0])
    with pytest.raises(ConfigurationError, match="no option revision"):
        load_language_model(path, revision="main")
    with pytest.raises(ConfigurationError, match="dtype"):
        load_language_model(path, dtype="float32")
    with pytest.raises(ConfigurationError, match="n_gpu_layers"):
        load_language_model(path, n_gpu_layers="many")
    with pytest.raises(UnknownNameError, match="engine"):
        load_language_model(path, engine="tgi")
    for device in ("cuda", "zpu"):
        with pytest.raises(ConfigurationError, match=f"device='cpu', or 'auto'.*got '{device}'"):
            load_language_model(path, device=device)
    for name, engine in ((path, "torch"), ("toy", "torch"), ("toy", "llama.cpp"), ("http://x/v1", "llama.cpp")):
        with pytest.raises(ConfigurationError, match=f"does not run on engine='{engine}'; leave engine out"):
            load_language_model(name, engine=engine)
    with pytest.raises(UnknownNameError, match=r"no file 'nowhere\.gguf'"):
        load_language_model("nowhere.gguf")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF and nothing else")
    with pytest.raises(ConfigurationError, match="cannot load"):
        load_language_model(str(tmp_path / "broken.gguf"))
    with pytest.raises(ConfigurationError, match="kv_budget"):
        tiny("Llama").new_engine(kv_budget=0)
    with pytest.raises(ConfigurationError, match="this prompt and its continuation are 9 tokens"):
        tiny("Llama").new_engine(kv_budget=8 * int(tiny("Llama").kv_token_bytes or 0)).compute([[5] * 9], NONE, NONE, 1)


def test_tasks_environments_and_the_doctor_know_the_engine(embedded: LlamaCppLM) -> None:
    from qstar_decoding.cli.doctor import examine
    from qstar_decoding.tasks import load_task

    assert load_task("sentiment", engine="llama.cpp").mdp().model is embedded
    assert DecodingMDP(reward="length", model_kwargs={"engine": "llama.cpp"}).model is embedded
    [finding] = [finding for finding in examine(self_test=False) if finding.check == "llama.cpp"]
    assert finding.status == "good"
    assert "llama-cpp-python" in finding.detail


def test_a_text_longer_than_the_first_memory(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_trie, "_FIRST_TOKENS", 10)
    engine = tiny("Llama").new_engine()
    prompt = list(range(1, 31))
    _, outputs = engine.compute([prompt], NONE, NONE, TOP_K)
    logprobs = tiny("Llama").forward([prompt])[1]
    np.testing.assert_allclose(outputs.logprobs, np.take_along_axis(logprobs, outputs.tokens, axis=1), atol=EXACT)
