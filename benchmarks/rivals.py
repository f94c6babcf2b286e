"""A step of 1 to 64 new tokens on every way to run the same weights, against `generate` and two limits of the machine.

    python benchmarks/rivals.py [--model NAME] [--tokens 1 4 8 16 32 64] [--steps 20] [--json FILE]
    python benchmarks/engine.py --rivals        # the same

All ways take turns within one process, so ratios hold on a busy machine too; seconds need an idle one. A figure is the
median of its steps. The limits are bytes of weights over the measured bandwidth, and products over the measured rate of
a large matrix product; the larger of the two is the floor.
"""

import argparse
import importlib.util
import time

import numpy as np
import torch
from rich.table import Table
from rows import add_json_option, out, row, write

from qstar_decoding.envs import TokenTree, load_language_model
from qstar_decoding.errors import QStarError
from qstar_decoding.tasks import load_task

TOP_K = 8
PROMPTS = 16


def ways(model, device, dtype):
    """Return the language models to compare, by name; those that this machine cannot run are left out with a reason."""
    wanted = {
        "torch, exact": {"dtype": dtype, "prepack": True},
        "torch, flat": {"dtype": dtype, "weights": "flat", "prepack": True},
        "torch, float16": {"dtype": "float32", "weights": "float16"},
    }
    if importlib.util.find_spec("llama_cpp"):
        wanted["llama.cpp"] = {"engine": "llama.cpp"}
    found = {}
    for name, options in wanted.items():
        try:
            found[name] = load_language_model(model, device=device, **options)
        except QStarError as error:
            out.print(f"{name} is left out: {error}", highlight=False)
    return found


class Steps:
    """A tree on one language model that grows by a fixed number of new tokens a step."""

    def __init__(self, lm, texts, count):
        self.tree, self.rng = TokenTree(lm, TOP_K), np.random.default_rng(0)
        roots = self.tree.roots([lm.encode(text) for text in texts[: min(count, PROMPTS)]])
        self.nodes, self.count, self.level = np.resize(roots, count), count, 0

    def step(self):
        """Take a step; return its seconds."""
        first = (np.arange(self.count) // PROMPTS) % TOP_K
        actions = self.rng.integers(TOP_K, size=self.count) if self.level else first
        self.level += 1
        start = time.perf_counter()
        self.nodes = self.tree.expand(self.nodes, actions)
        return time.perf_counter() - start


def generate(lm, text, count, steps):
    """Return the seconds of a step of ``generate`` with its own cache, for ``count`` texts."""
    ids = torch.tensor([lm.encode(text)] * count, device=lm.device)
    options = {"do_sample": True, "top_k": TOP_K, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}

    def run(tokens):
        start = time.perf_counter()
        with torch.inference_mode():
            lm.model.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, **options)
        return time.perf_counter() - start

    run(2)
    return (run(steps + 1) - run(1)) / steps


def bandwidth(device):
    """Return the bytes a second that reading takes."""
    data = torch.ones(1 << 28, device=device)  # 1 GiB, beyond any cache
    return data.numel() * 4 / min(timed(lambda: float(data.sum())) for _ in range(5))


def product_rate(device, dtype):
    """Return the floating-point operations a second of a large matrix product."""
    left, right = (torch.randn(1024, 1024, device=device, dtype=dtype) for _ in range(2))
    return 2 * 1024**3 / min(timed(lambda: float((left @ right)[0, 0])) for _ in range(5))


def timed(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def matrix_numbers(lm):
    """Return how many numbers of weights a step multiplies by."""
    return sum(m.weight.numel() for m in lm.model.modules() if isinstance(m, torch.nn.Linear))


def compare(model, device, dtype, tokens, steps):
    """Print the table and return its rows."""
    lms = ways(model, device, dtype)
    exact = lms["torch, exact"]
    words = " ".join(load_task("sentiment").prompts.of("train")).split()
    texts = [" ".join(words[30 * i : 30 * i + 30]) for i in range(PROMPTS)]
    numbers, read = matrix_numbers(exact), bandwidth(exact.device)
    rate = product_rate(exact.device, exact.model.dtype)
    table = Table("new tokens a step", *lms, "generate", "floor: bytes, products", title="tokens/s (× torch, exact)")
    rows = []
    for count in tokens:
        trees = {name: Steps(lm, texts, count) for name, lm in lms.items()}
        for tree in trees.values():
            for _ in range(3):
                tree.step()
        seconds = {name: np.zeros(steps) for name in trees}
        for i in range(steps):
            for name, tree in trees.items():
                seconds[name][i] = tree.step()
        cells = []
        for name, values in seconds.items():
            ratio = float(np.median(seconds["torch, exact"] / values))
            cells.append(f"{count / np.median(values):.0f} ({ratio:.2f})")
            rows.append(row(f"{name}, {count} tokens", count / np.median(values), "tokens/s"))
            rows.append(row(f"{name}, {count} tokens, against exact", ratio, "ratio"))
        other = generate(exact, texts[0], count, steps)
        rows.append(row(f"generate, {count} tokens", count / other, "tokens/s"))
        size = {"bytes": numbers * exact.model.dtype.itemsize / read, "products": 2 * numbers * count / rate}
        floor = ", ".join(f"{count / value:.0f}" for value in size.values())
        rows.extend(row(f"floor by {what}, {count} tokens", count / value, "tokens/s") for what, value in size.items())
        table.add_row(str(count), *cells, f"{count / other:.0f}", floor)
    out.print(table)
    out.print(f"{torch.get_num_threads()} threads, {read / 1e9:.1f} GB/s, {rate / 1e9:.0f} GFLOP/s", highlight=False)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 8, 16, 32, 64])
    parser.add_argument("--steps", type=int, default=20)
    add_json_option(parser)
    arguments = parser.parse_args()
    rows = compare(arguments.model, arguments.device, arguments.dtype, arguments.tokens, arguments.steps)
    write(rows, arguments.json)


if __name__ == "__main__":
    main()
