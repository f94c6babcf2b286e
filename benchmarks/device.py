"""Checks and timings of the torch engine on a GPU, with random weights at real shapes: ten minutes at most.

    python benchmarks/device.py [--out FOLDER] [--json FILE]        # on a machine with a GPU
    python benchmarks/device.py --dry-run                           # on a CPU, tiny shapes: does the script work?

benchmarks/device.sh runs this and benchmarks/engine.py. The checks: a tree of 8 branches of each of 3 prompts against
uncached forwards, eviction, halving when memory runs out, host synchronisations in a step, 2,000 tokens of training,
Q in a search, and 64 requests on one search engine. Exit status 1 where a check failed; the others still run.
"""

import argparse
import contextlib
import json
import time
import traceback
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from rich.table import Table
from rows import add_json_option, out, row, write
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from qstar_decoding.agents import AStarPlanner, QHeuristic, QStar, Request, SearchEngine
from qstar_decoding.envs import TokenTree, TransformersLM, TreeEngine
from qstar_decoding.models.flat.model import FlatConfig, FlatModel

SHAPES = {
    "tiny": {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    | {"num_attention_heads": 4, "num_key_value_heads": 2},
    "135M": {"vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
    | {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
    "8B": {"vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32}
    | {"num_attention_heads": 32, "num_key_value_heads": 8},
}
TOP_K = 8
BRANCHES, DEPTH = 8, 4
# Largest difference of a log-probability, nats, to an uncached forward; bfloat16 has 8 bits, and logits here reach 10.
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 0.4}


def tokenizer(size):
    """Return a tokenizer whose words are w2, w3, …"""
    words = {"</s>": 0, "<unk>": 1, **{f"w{i}": i for i in range(2, size)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="<unk>")


def make(shape, dtype, device):
    """Return a language model with random weights, and the same weights in a flat forward."""
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = LlamaConfig(**SHAPES[shape], **ends, max_position_embeddings=8192, architectures=["LlamaForCausalLM"])
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        for weights in model.parameters():
            # As initialised, a model hardly attends to anything, and no mistake in the attention would show.
            if weights.ndim > 1:
                weights.data.normal_(0, weights.shape[1] ** -0.5)
    words = tokenizer(SHAPES[shape]["vocab_size"])
    plain = TransformersLM(model, words, name=f"random-{shape}-{dtype}", prepack=False)
    flat = FlatModel(FlatConfig(config.to_dict(), plain.name), model.state_dict().get).to(device)
    return plain, TransformersLM(flat, words, name=f"{plain.name}-flat", prepack=False)


def prompts(lm, count=3, length=20):
    """Return prompts as token ids; they have their first half in common."""
    rng = np.random.default_rng(0)
    first = rng.integers(2, lm.vocab_size, size=length // 2).tolist()
    return [first + rng.integers(2, lm.vocab_size, size=length // 2 + i).tolist() for i in range(count)]


def grown(lm, **options):
    """Return a tree of 8 branches of each of 3 prompts, its last nodes, and the tokens that lead to them."""
    tree, sequences = TokenTree(lm, TOP_K, **options), [list(p) for p in prompts(lm) for _ in range(BRANCHES)]
    nodes = tree.roots(prompts(lm)).repeat(BRANCHES)
    for depth in range(DEPTH):
        ranks = np.tile(np.arange(BRANCHES), 3) if depth == 0 else np.arange(len(nodes)) % 2
        for sequence, token in zip(sequences, tree.tokens[nodes, ranks].tolist(), strict=True):
            sequence.append(token)
        nodes = tree.expand(nodes, ranks)
    return tree, nodes, sequences


def difference(lm, tree, nodes, sequences):
    """Return the largest difference of a log-probability to uncached forwards, nats."""
    exact = lm.forward(sequences)[1]
    return float(np.abs(np.take_along_axis(exact, tree.tokens[nodes], 1) - tree.logprobs[nodes]).max())


def expect(condition, problem):
    if not condition:
        raise AssertionError(problem)


# ---------------------------------------------------------------------------------------------------------------------
# The checks: each returns what it found, or raises


def tree_equals_uncached(lm):
    """8 branches of each of 3 prompts against uncached forwards."""
    tree, nodes, sequences = grown(lm)
    expect(isinstance(tree._engine, TreeEngine), "the trial refused the tree engine")
    found, most = difference(lm, tree, nodes, sequences), TOLERANCE[lm.model.dtype]
    expect(found <= most, f"off by {found:.2g} nats, {most} are allowed")
    apart = difference(lm, tree, nodes, sequences[1:] + sequences[:1])
    expect(apart > 3 * max(found, 1e-4), f"other branches are as near ({apart:.2g} nats): the check shows nothing")
    return f"within {found:.1e} nats; other branches: {apart:.1g}"


def eviction(lm):
    """The same under a budget of a third of its tokens."""
    free, *_ = grown(lm)
    tokens = len(free) + sum(map(len, prompts(lm)))
    bounded, same, sequences = grown(lm, kv_budget=tokens // 3 * lm.kv_token_bytes)
    expect(bounded.kv_bytes < free.kv_bytes, f"{bounded.kv_bytes:,} bytes held, {free.kv_bytes:,} without a budget")
    found = difference(lm, bounded, same, sequences)
    expect(found <= TOLERANCE[lm.model.dtype], f"off by {found:.2g} nats")
    return f"{bounded.kv_bytes / 1e6:.2f} of {free.kv_bytes / 1e6:.2f} MB held, within {found:.1e} nats"


def halving(lm):
    """A forward of more than 16 tokens runs out of memory: the batch is halved, and the outputs stay."""
    compute, refused = lm.hidden_and_logits, []

    def scarce(positions, **inputs):
        if inputs["input_ids"].numel() > 16:
            refused.append(inputs["input_ids"].numel())
            raise torch.OutOfMemoryError("planted: no memory")
        return compute(positions, **inputs)

    lm.hidden_and_logits = scarce
    try:
        tree, nodes, sequences = grown(lm, kv_budget=200 * lm.kv_token_bytes)
    finally:
        del lm.hidden_and_logits
    expect(refused, "no forward was large enough")
    found = difference(lm, tree, nodes, sequences)
    expect(found <= TOLERANCE[lm.model.dtype], f"off by {found:.2g} nats")
    return f"{len(refused)} forwards refused, within {found:.1e} nats"


def synchronisations(lm):
    """Host synchronisations in a step of 24 tokens, as CUDA reports them."""
    if lm.device.type != "cuda":
        return "left out: no GPU"
    tree, nodes, _ = grown(lm)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            tree.expand(nodes, np.full(len(nodes), 3))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    where = {f"{Path(w.filename).name}:{w.lineno}" for w in caught}
    return f"{len(caught)} at {', '.join(sorted(where)) or 'no place'}"


def training_and_search(lm, tokens, gradient_steps):
    """Train Q, then search with it."""
    texts = [" ".join(f"w{i}" for i in range(start, start + 8)) for start in range(2, 42, 10)]
    env = gym.make("TokenDecoding-v0", model=lm, prompts=texts, reward="length", top_k=TOP_K, max_new_tokens=12)
    agent = QStar(
        env=env,
        seed=0,
        tokens_per_search=40,
        searches_per_round=8,
        gradient_steps=gradient_steps,
        device=str(lm.device),
    )
    start = time.perf_counter()
    agent.learn(tokens)
    seconds = time.perf_counter() - start
    weights = next(agent.policy.parameters())
    expect(weights.device.type == lm.device.type, f"Q is on {weights.device}, the language model on {lm.device}")
    plan = AStarPlanner(env, heuristic=QHeuristic(agent)).plan(texts[0], 100)
    expect(plan.text and np.isfinite(plan.objective), f"the search found {plan.text!r} of J {plan.objective}")
    return f"{tokens} tokens in {seconds:.1f} s; a plan of J {plan.objective:.3f}"


def search_engine(lm, requests):
    """Many requests on one search engine, each against the same alone."""
    texts = [" ".join(f"w{2 + (7 * i + j) % 300}" for j in range(8)) for i in range(requests)]
    options = {"reward": "length", "top_k": TOP_K, "max_new_tokens": 8}
    with SearchEngine(lm, max_live=64, **options) as engine:
        start = time.perf_counter()
        handles = [engine.submit(Request(text, 40)) for text in texts]
        plans = [handle.result(timeout=300) for handle in handles]
        seconds = time.perf_counter() - start
    tokens = sum(plan.usage.lm_tokens for plan in plans)
    expect(all(plan.text for plan in plans), "a request has no text")
    return f"{requests} requests, {tokens} LM tokens, {tokens / seconds:.0f} tokens/s"


def speed(lm, counts, steps):
    """Return tokens/s by new tokens a step."""
    found = {}
    for count in counts:
        tree, rng = TokenTree(lm, TOP_K), np.random.default_rng(0)
        nodes, seconds = np.resize(tree.roots(prompts(lm, min(count, 8))), count), []
        for level in range(steps + 3):
            ranks = rng.integers(TOP_K, size=count) if level else (np.arange(count) // 8) % TOP_K
            start = time.perf_counter()
            nodes = tree.expand(nodes, ranks)
            seconds.append(time.perf_counter() - start)
        found[count] = count / float(np.median(seconds[3:]))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--out", default=".", help="folder for the model of 135M that benchmarks/engine.py takes")
    add_json_option(parser)
    arguments = parser.parse_args()
    if not arguments.dry_run and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --dry-run runs on a CPU")
    device = torch.device("cpu" if arguments.dry_run else "cuda")
    small, large = ("tiny", "tiny") if arguments.dry_run else ("135M", "8B")
    rows, failed = [], 0
    table = Table("check", "model", "result", title=f"torch {torch.__version__} on {device}")

    def check(function, lm, *args):
        nonlocal failed
        try:
            result, good = function(lm, *args), True
        except Exception as error:  # the machine is lent: the other checks are still worth it
            traceback.print_exc()
            result, good = f"FAILED: {error}", False
            failed += 1
        table.add_row(function.__name__, lm.name, result)
        rows.append(row(f"{function.__name__}, {lm.name}", good, "passed", 1))

    sizes = [(small, torch.float32), (small, torch.bfloat16), (large, torch.bfloat16)]
    for shape, dtype in dict.fromkeys(sizes):
        plain, flat = make(shape, dtype, device)
        for lm in (plain, flat):
            for function in (tree_equals_uncached, eviction, halving, synchronisations):
                check(function, lm)
            counts = (1, 8) if arguments.dry_run else (1, 8, 64, 256)
            with contextlib.suppress(torch.OutOfMemoryError):
                for count, rate in speed(lm, counts, 3 if arguments.dry_run else 20).items():
                    table.add_row("tokens/s", lm.name, f"{count} new a step: {rate:,.0f}")
                    rows.append(row(f"{lm.name}, {count} tokens", rate, "tokens/s"))
        if (shape, dtype) == (small, torch.float32):
            check(training_and_search, plain, *((120, 8) if arguments.dry_run else (2000, 200)))
            check(search_engine, plain, 8 if arguments.dry_run else 64)
            folder = Path(arguments.out) / f"random-{shape}"
            plain.model.save_pretrained(folder)
            plain.tokenizer.save_pretrained(folder)
        del plain, flat
        if device.type == "cuda":
            torch.cuda.empty_cache()
    out.print(table)
    write(rows, arguments.json)
    print(json.dumps({"checks failed": failed}))
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    main()
