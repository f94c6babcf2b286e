"""llama.cpp on the same GGUF file: its token tree here, its single stream, and its server with as many streams.

    python benchmarks/streams.py [--model NAME] [--tokens 1 4 8 16 32 64] [--steps 20] [--json FILE]

A figure is new tokens a second, prompts not counted. The tree and the single stream take turns in this process; the
server (``pip install xllamacpp``) runs in a process of its own, after them. All have the same number of threads.
Seconds need an idle machine.
"""

import argparse
import contextlib
import importlib.util
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from rich.table import Table
from rows import add_json_option, out, row, write

from qstar_decoding.envs import TokenTree, load_language_model
from qstar_decoding.models.embedded_model import gguf_path
from qstar_decoding.models.llama_cpp.library import Context
from qstar_decoding.tasks import load_task

TOP_K = 8
PROMPTS = 16
SERVER = """
import sys, time, xllamacpp
parameters, streams = xllamacpp.CommonParams(), int(sys.argv[2])
parameters.model.path = sys.argv[1]
parameters.hostnames, parameters.port = ["127.0.0.1"], int(sys.argv[4])
parameters.n_parallel, parameters.n_ctx = streams, 256 * streams
parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = int(sys.argv[3])
parameters.verbosity = -1
server = xllamacpp.Server(parameters)
time.sleep(1e6)
"""


def prompts():
    """Return texts of about 30 words."""
    words = " ".join(load_task("sentiment").prompts.of("train")).split()
    return [" ".join(words[30 * i : 30 * i + 30]) for i in range(PROMPTS)]


def tree_steps(lm, texts, count):
    """Return a function that takes a step of ``count`` new tokens and returns its seconds."""
    tree, rng = TokenTree(lm, TOP_K), np.random.default_rng(0)
    roots = tree.roots([lm.encode(text) for text in texts[: min(count, PROMPTS)]])
    state = {"nodes": np.resize(roots, count), "actions": (np.arange(count) // PROMPTS) % TOP_K}

    def step():
        start = time.perf_counter()
        state["nodes"] = tree.expand(state["nodes"], state["actions"])
        seconds = time.perf_counter() - start
        state["actions"] = rng.integers(TOP_K, size=count)
        return seconds

    return step


def single_stream(lm, text):
    """Return a function that decodes one token greedily with llama.cpp alone and returns its seconds."""
    ids = lm.encode(text)
    context = Context(lm, len(ids) + 200)
    state = {"tokens": np.array(ids, dtype=np.int64)}
    logits, _ = context.extend(state["tokens"], 0, len(ids), outputs=True)
    state["tokens"] = np.append(state["tokens"], logits[-1].argmax())

    def step():
        tokens = state["tokens"]
        start = time.perf_counter()
        logits, _ = context.extend(tokens, len(tokens) - 1, len(tokens), outputs=True)
        state["tokens"] = np.append(tokens, logits[-1].argmax())
        return time.perf_counter() - start

    return step


@contextlib.contextmanager
def server(gguf, streams, threads):
    """Run llama.cpp's server, and give its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", SERVER, str(gguf), str(streams), str(threads), str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        address = f"http://127.0.0.1:{port}"
        while process.poll() is None:
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(f"{address}/v1/models", timeout=10).close()
                break
            time.sleep(0.1)
        else:
            raise RuntimeError(f"llama.cpp's server ended with status {process.returncode}")
        yield address
    finally:
        process.kill()
        process.wait()


def server_speed(address, texts, count, steps):
    """Return the tokens a second of ``count`` streams; the prompts are processed before."""

    def complete(text, tokens):
        body = {"prompt": text, "n_predict": tokens, "ignore_eos": True, "cache_prompt": True, "n_probs": TOP_K}
        request = urllib.request.Request(
            f"{address}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.loads(answer.read())["tokens_predicted"]

    def run(tokens):
        start = time.perf_counter()
        with ThreadPoolExecutor(count) as pool:
            done = sum(pool.map(lambda i: complete(texts[i % len(texts)], tokens), range(count)))
        return done, time.perf_counter() - start

    run(1)  # the prompts
    first, alone = run(1)
    done, seconds = run(steps + 1)
    return (done - first) / max(seconds - alone, 1e-9)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 8, 16, 32, 64])
    parser.add_argument("--steps", type=int, default=20)
    add_json_option(parser)
    arguments = parser.parse_args()
    lm, texts = load_language_model(arguments.model, engine="llama.cpp"), prompts()
    alone = single_stream(lm, texts[0])
    trees = {count: tree_steps(lm, texts, count) for count in arguments.tokens}
    seconds = {count: [] for count in trees}
    singles = []
    for step in range(arguments.steps + 3):
        times = {count: take() for count, take in trees.items()}
        single = alone()
        if step >= 3:  # the first ones warm up
            singles.append(single)
            for count, value in times.items():
                seconds[count].append(value)
    stream = 1 / float(np.median(singles))
    has_server = importlib.util.find_spec("xllamacpp") is not None
    table = Table("new tokens a step", "llama.cpp engine", "llama.cpp, one stream", "its server", title="tokens/s")
    rows = [row("llama.cpp, one stream", stream, "tokens/s")]
    for count, values in seconds.items():
        ours = count / float(np.median(values))
        rows.append(row(f"llama.cpp engine, {count} tokens", ours, "tokens/s"))
        other = None
        if has_server:
            with server(gguf_path(arguments.model) or arguments.model, count, lm.threads) as address:
                other = server_speed(address, texts, count, arguments.steps)
            rows.append(row(f"llama.cpp server, {count} tokens", other, "tokens/s"))
            rows.append(row(f"llama.cpp engine against its server, {count} tokens", ours / other, "ratio"))
        table.add_row(str(count), f"{ours:.0f}", f"{stream:.0f}", "not installed" if other is None else f"{other:.0f}")
    out.print(table)
    write(rows, arguments.json)


if __name__ == "__main__":
    main()
