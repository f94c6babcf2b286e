"""The engine against what a user could put together from ``transformers``, on the embedded model.

    python benchmarks/engine.py [--model NAME] [--device cpu] [--dtype auto] [--repeats 5] [--json FILE]
    python benchmarks/engine.py --scaling
    python benchmarks/engine.py --rivals

The two sides of a comparison run in turn in this process, on the same model object in the same dtype. A figure is the
median of its repeats, a ratio the median of the repeats' ratios. ``--scaling`` shows how the time of a step grows with
batch, depth, prompt length, size of the tree and k. docs/performance.md explains the rows.
"""

import argparse
import itertools
import platform
import time

import gymnasium as gym
import numpy as np
import rivals
import torch
import transformers
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rows import add_json_option, out, row, write

import qstar_decoding
from qstar_decoding.agents import AStarPlanner, QHeuristic
from qstar_decoding.envs import TokenTree, load_language_model
from qstar_decoding.tasks import load_task

TOP_K = 8
HORIZON = 48  # tokens of a completion
MB = 10**6


class Bench:
    """One language model and everything that is timed on it."""

    def __init__(self, model, device, dtype, repeats):
        self.lm, self.repeats, self.rng = (
            load_language_model(model, device, dtype, prepack=True),
            repeats,
            np.random.default_rng(0),
        )
        self.finished = 0
        self.words = " ".join(load_task("sentiment").prompts.of("train")).split()

    def texts(self, count, low, high):
        """Return ``count`` prompts of about ``low`` to ``high`` tokens."""
        lengths = np.linspace(low, high, count).round().astype(int)
        starts = self.rng.integers(len(self.words) - high, size=count)
        return [" ".join(self.words[s : s + n]) for s, n in zip(starts, lengths, strict=True)]

    def ids(self, count, low, high):
        """Return the same as token ids."""
        return [self.lm.encode(text) for text in self.texts(count, low, high)]

    def timed(self, function):
        """Return how many seconds ``function`` takes on the device, and what it returns."""
        self._synchronize()
        start = time.perf_counter()
        result = function()
        self._synchronize()
        return time.perf_counter() - start, result

    def seconds(self, function):
        """Return how many seconds ``function`` takes on the device."""
        return self.timed(function)[0]

    def in_turn(self, *functions):
        """Run functions that return a figure in turn; return float64 [repeats, functions]."""
        for function in functions:
            function()  # to warm up
        return np.array([[function() for function in functions] for _ in range(self.repeats)])

    def _synchronize(self):
        if self.lm.device.type == "cuda":
            torch.cuda.synchronize(self.lm.device)

    # -- this project -------------------------------------------------------------------------------------------------

    def make_vec(self, num_envs, prompts, **kwargs):
        """Make environments with an empty tree."""
        options = {"model": self.lm, "prompts": prompts, "top_k": TOP_K, "max_new_tokens": HORIZON, **kwargs}
        return gym.make_vec("TokenDecoding-v0", num_envs=num_envs, vectorization_mode="vector_entry_point", **options)

    def play(self, env, steps, seed=0):
        """Take random actions from ``reset`` on; return the seconds of the reset and of every step."""
        rng = np.random.default_rng(seed)
        times = [self.seconds(lambda: env.reset(seed=seed))]
        for _ in range(steps):
            actions = rng.integers(TOP_K, size=env.num_envs)
            seconds, (_, _, terminated, _, _) = self.timed(lambda actions=actions: env.step(actions))
            times.append(seconds)
            self.finished += int(terminated.sum())
        return np.array(times)

    def env_speed(self, num_envs, prompts, steps=HORIZON):
        """Return tokens/s, the prompts' processing included in the time.

        Tokens count where nobody was before: new prefixes, and the last tokens of completions, which need no forward
        here, as the last of ``generate``'s do not.
        """
        env = self.make_vec(num_envs, prompts)
        self.finished = 0
        seconds = self.play(env, steps).sum()
        return (np.count_nonzero(env.mdp.tree.depth) + self.finished) / seconds

    def plan_speed(self, prompt, **planner):
        """Return LM tokens/s of a search of 24 tokens with 16 pops at a time."""
        env = gym.make("TokenDecoding-v0", model=self.lm, prompts=[prompt], top_k=TOP_K)
        plan = AStarPlanner(env, width=16, **planner).plan(prompt, 400)
        return plan.usage.lm_tokens / plan.usage.seconds

    # -- transformers alone -------------------------------------------------------------------------------------------

    def generate_speed(self, prompts, new_tokens=HORIZON, **kwargs):
        """Return tokens/s of ``generate`` with its own cache, prompts padded to one length."""
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=self.lm.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.lm.device)
        options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "pad_token_id": 0, **kwargs}

        def generate():
            with torch.inference_mode():
                self.lm.model.generate(ids, attention_mask=mask, **options)

        return len(prompts) * new_tokens * kwargs.get("num_beams", 1) / self.seconds(generate)

    def recompute_speed(self, prompts, depth=HORIZON // 2):
        """Return tokens/s where a step processes whole prefixes, in a padded batch, as in envs without a cache."""
        sequences = [[*p, *self.rng.integers(1000, self.lm.vocab_size, size=depth)] for p in prompts]
        width = max(map(len, sequences))
        ids = torch.tensor([[*s, *[0] * (width - len(s))] for s in sequences], device=self.lm.device)
        mask = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in sequences], device=self.lm.device)
        rows, last = torch.arange(len(sequences)), torch.tensor([len(s) - 1 for s in sequences])

        def step():
            with torch.inference_mode():
                body = self.lm.model.base_model(ids, attention_mask=mask, use_cache=False)
                self.lm.model.get_output_embeddings()(body.last_hidden_state[rows, last]).log_softmax(-1).topk(TOP_K)

        return len(sequences) / self.seconds(step)

    def matrix_products(self, batch):
        """Return the seconds that the products with the model's weights take on their own for ``batch`` tokens."""
        weights = [m.weight for m in self.lm.model.modules() if isinstance(m, torch.nn.Linear)]
        inputs = {w.shape[1]: torch.randn(batch, w.shape[1], dtype=w.dtype, device=w.device) for w in weights}

        def multiply():
            with torch.inference_mode():
                for weight in weights:
                    torch.nn.functional.linear(inputs[weight.shape[1]], weight)

        return self.seconds(multiply)


# ---------------------------------------------------------------------------------------------------------------------
# The comparisons: each returns (name, [repeats, 2] figures of both sides, unit, target of the ratio, higher is better)


def one_env(bench):
    """1 env against ``generate`` with greedy decoding."""
    (text,) = bench.texts(1, 30, 30)
    ids = bench.lm.encode(text)
    both = bench.in_turn(lambda: bench.env_speed(1, [text]), lambda: bench.generate_speed([ids], do_sample=False))
    return "1 env, fresh, / generate (greedy)", both, "tokens/s", 1.0, True


def many_envs(bench):
    """64 envs against ``generate`` with sampling."""
    texts = bench.texts(16, 10, 120)
    batch = [bench.lm.encode(text) for text in texts] * 4
    both = bench.in_turn(
        lambda: bench.env_speed(64, texts), lambda: bench.generate_speed(batch, do_sample=True, top_k=TOP_K)
    )
    return "64 envs, fresh, / generate (sampling, padded)", both, "tokens/s", 1.4, True


def no_cache(bench):
    """64 envs against whole prefixes each step."""
    texts = bench.texts(16, 10, 120)
    batch = [bench.lm.encode(text) for text in texts] * 4
    both = bench.in_turn(lambda: bench.env_speed(64, texts), lambda: bench.recompute_speed(batch))
    return "64 envs, fresh, / whole prefixes each step", both, "tokens/s", 8.0, True


def visited(bench):
    """A walk that was walked before against its first time."""

    def walks():
        env = bench.make_vec(64, bench.texts(16, 10, 120))
        fresh = bench.play(env, HORIZON)
        return [64 / np.median(bench.play(env, HORIZON)[1:]), 64 / np.median(fresh[1:])]

    return "64 envs, visited, / fresh", np.array([walks() for _ in range(bench.repeats)]), "tokens/s", 50.0, True


def planner(bench):
    """A* with 16 pops at a time against 16 beams."""
    (text,) = bench.texts(1, 30, 30)
    ids = bench.lm.encode(text)
    both = bench.in_turn(
        lambda: bench.plan_speed(text, heuristic=QHeuristic("sentiment") if bench.lm.hidden_size == 576 else None),
        lambda: bench.generate_speed([ids], 24, num_beams=16, do_sample=False),
    )
    return "A*, 16 pops at a time, / generate (16 beams)", both, "LM tokens/s", 1.5, True


def outside_the_forward(bench):
    """What of a step of 16 envs is not the language model."""
    inside = [0.0]
    forward = type(bench.lm).hidden_and_logits

    def timed(*args, **kwargs):
        seconds, result = bench.timed(lambda: forward(bench.lm, *args, **kwargs))
        inside[0] += seconds
        return result

    def walk():
        env = bench.make_vec(16, bench.texts(16, 10, 120))
        bench.lm.hidden_and_logits = timed
        try:
            env.reset(seed=0)
            inside[0] = 0.0
            total = bench.play(env, HORIZON)[1:].sum()
        finally:
            del bench.lm.hidden_and_logits
        return [1e3 * (total - inside[0]) / HORIZON, 1e3 * total / HORIZON]

    return "16 envs, outside the forward / step", np.array([walk() for _ in range(bench.repeats)]), "ms", 0.10, False


def above_the_floor(bench):
    """A step of 16 envs against its matrix products."""
    texts = bench.texts(16, 10, 120)
    both = bench.in_turn(
        lambda: 1e3 * np.median(bench.play(bench.make_vec(16, texts), HORIZON)[1:]),
        lambda: 1e3 * np.median([bench.matrix_products(16) for _ in range(HORIZON)]),
    )
    return "16 envs, step / its matrix products alone", both, "ms", 1.5, False


def size_of_the_tree(bench):
    """A step in a large tree against the same in a small one."""
    small, large = (TokenTree(bench.lm, TOP_K) for _ in range(2))
    grow(bench, small, 1_000)
    grow(bench, large, 50_000)

    def step(tree):
        nodes, actions = fresh_edges(bench, tree, 16)
        return 1e3 * bench.seconds(lambda: tree.expand(nodes, actions))

    both = bench.in_turn(*[lambda t=t: np.median([step(t) for _ in range(20)]) for t in (large, small)])
    return "16 prefixes, tree of 50,000 / of 1,000", both, "ms", 1.15, False


def bounded_memory(bench, prefixes=20_000, budget=64 * MB):
    """The same prefixes with all memory and with little: the most that was held, and how far the outputs are apart.

    Prompt after prompt gets a tree of some 400 prefixes, 32 at a time; every 25th step continues nodes of all prompts.
    """
    free, bounded = TokenTree(bench.lm, TOP_K), TokenTree(bench.lm, TOP_K, kv_budget=budget)
    held, difference, seconds, done, start = 0, 0.0, np.zeros(2), 0, 0
    for step in itertools.count():
        if done == prefixes:
            break
        if step % 13 == 0:
            start = len(free)
            prompts = bench.ids(1, 10 + step % 111, 10 + step % 111)
            for tree in (free, bounded):
                tree.roots(prompts)
        edges = fresh_edges(bench, free, min(32, prefixes - done), 0 if step % 25 == 24 else start, like=bounded)
        for i, tree in enumerate((free, bounded)):
            seconds[i] += bench.seconds(lambda tree=tree, edges=edges: tree.expand(*edges))
        new = slice(len(free) - len(edges[0]), len(free))
        done += len(edges[0])
        held = max(held, bounded.kv_bytes)
        difference = max(difference, float(np.abs(free.logprobs[new] - bounded.logprobs[new]).max()))
    return free.kv_bytes, held, difference, seconds


def grow(bench, tree, prefixes):
    tree.roots(bench.ids(16, 10, 120))
    while len(tree) < prefixes:
        tree.expand(*fresh_edges(bench, tree, min(256, prefixes - len(tree))))


def fresh_edges(bench, tree, count, start=0, like=None):
    """Return up to ``count`` edges that nobody has followed yet, from nodes of all ages, numbered ``start`` or more.

    ``like`` is a tree of the same prefixes: edges whose ranks differ there (rounding may swap two tokens that are about
    as likely) are left out.
    """
    open_ = (tree.children[start:] < 0) & (tree.depth[start:] < HORIZON)[:, None]
    if like is not None:
        open_ &= tree.tokens[start:] == like.tokens[start:]
    edges = np.flatnonzero(open_)
    edges = np.sort(bench.rng.choice(edges, size=min(count, len(edges)), replace=False))
    return start + edges // TOP_K, edges % TOP_K


def scaling(bench):
    """Print what a step costs as batch, depth, prompt, tree and k grow, one at a time; everything else stays."""
    table = Table("what", "ms a step", title=machine(bench.lm))

    def step(count=16, depth=24, prompt=30, size=0, k=TOP_K):
        tree = TokenTree(bench.lm, k)
        nodes = np.resize(tree.roots(bench.ids(min(count, 16), prompt, prompt)), count)
        if size:
            grow(bench, tree, size)
        times = []
        for level in range(depth + 5):
            actions = bench.rng.integers(k, size=count) if level else (np.arange(count) // 16) % k
            seconds, nodes = bench.timed(lambda n=nodes, a=actions: tree.expand(n, a))
            times.append(1e3 * seconds)
        return np.median(times[depth:])

    series = {
        "batch": [("count", n) for n in (1, 4, 8, 16, 32, 64, 128)],
        "depth, tokens since the prompt": [("depth", n) for n in (1, 24, 96, 192)],
        "prompt, words": [("prompt", n) for n in (10, 30, 120, 480)],
        "prefixes in the tree": [("size", n) for n in (1_000, 10_000)],
        "k": [("k", n) for n in (2, 8, 64, 512)],
    }
    for name, points in series.items():
        for i, (argument, value) in enumerate(points):
            table.add_row(f"{name} = {value:,}", f"{step(**{argument: value}):.1f}", end_section=i == len(points) - 1)
    out.print(table)


COMPARISONS = [
    one_env,
    many_envs,
    no_cache,
    visited,
    planner,
    outside_the_forward,
    above_the_floor,
    size_of_the_tree,
]
NAMES = [*(comparison.__name__ for comparison in COMPARISONS), "bounded_memory"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some of: " + ", ".join(NAMES))
    parser.add_argument("--scaling", action="store_true", help="show how the time of a step grows, and nothing else")
    parser.add_argument("--rivals", action="store_true", help="compare the ways to run a model; see rivals.py")
    add_json_option(parser)
    arguments = parser.parse_args()
    if arguments.rivals:
        device, dtype = ("cpu" if arguments.device == "auto" else arguments.device), arguments.dtype
        dtype = "float32" if dtype == "auto" and device == "cpu" else dtype
        write(rivals.compare(arguments.model, device, dtype, [1, 4, 8, 16, 32, 64], 20), arguments.json)
        return
    if unknown := set(arguments.only or ()) - set(NAMES):
        parser.error(f"--only takes {', '.join(NAMES)}; got {', '.join(sorted(unknown))}")
    transformers.utils.logging.set_verbosity_error()
    bench = Bench(arguments.model, arguments.device, arguments.dtype, arguments.repeats)
    if arguments.scaling:
        scaling(bench)
        return

    table = Table("what", "this project", "the other", "ratio", "target", title=machine(bench.lm))
    rows = []

    def add(name, ours, other, value, unit, target, higher, shown):
        sign = "≥" if higher else "≤"
        table.add_row(name, ours, other, shown, f"{sign} {target:g}" + (" MB" if unit == "MB" else ""))
        rows.append(row(name, value, unit, target, higher_is_better=higher))

    chosen = [name for name in NAMES if name in (arguments.only or NAMES)]
    for name in track(chosen, "timing", console=Console(stderr=True), transient=True):
        if name == "bounded_memory":
            free, held, difference, (seconds, bounded_seconds) = bounded_memory(bench)
            label = f"20,000 prefixes, kv_budget=64 MB ({bounded_seconds / seconds:.1f} × the time): held"
            add(label, f"{held / MB:.1f} MB", f"{free / MB:,.0f} MB", held / MB, "MB", 64, False, f"{held / free:.2f}")
            add("  largest difference of a log-prob", f"{difference:.1e} nats", "", difference, "nats", 1e-3, False, "")
            continue
        label, both, unit, target, higher = COMPARISONS[NAMES.index(name)](bench)
        ours, other = np.median(both, axis=0)
        ratio = float(np.median(both[:, 0] / both[:, 1]))
        cells = [f"{figure:,.1f} {unit}" for figure in (ours, other)]
        add(label, *cells, ratio, "ratio", target, higher, f"{ratio:.2f}")
    out.print(table)
    write(rows, arguments.json)


def machine(lm):
    """Say what the figures were measured on."""
    device = torch.cuda.get_device_name(lm.device) if lm.device.type == "cuda" else processor()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    dtype, threads = str(lm.model.dtype).removeprefix("torch."), torch.get_num_threads()
    return f"{lm.name}, {dtype}; {device}, {threads} threads\n{versions}, qstar-decoding {qstar_decoding.__version__}"


def processor():
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


if __name__ == "__main__":
    main()
