"""Other people's searches on the same language model, reward and LM tokens, with `qstar serve` as their model.

    pip install --no-deps its-hub backoff     # what its-hub needs beside this package's own environment
    python benchmarks/frameworks.py [TASK] [--prompts 40] [--dev 20] [--runs runs/frameworks] [--json FILE]

its-hub's best-of-n, beam search and particle filtering are its own code. They are told how good a text is: best-of-n
gets J, the two others the reward of the text so far, brought to 0…1 by the reward's bounds, since they want a
probability. Each has a grid of eight settings, compared on dev prompts at each budget. LM tokens are those that the
server drew: a search gets as many texts at a time as whole ones are in the budget. Ours have the task's settings.
Results are kept in --runs: a second call goes on.
"""

import argparse
import asyncio
import contextlib
import hashlib
import itertools
import random
import re
import subprocess
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from learning import make
from openai import AsyncOpenAI
from rich.table import Table
from rows import add_json_option, out, read_or_measure, row, with_the_worst, write

from qstar_decoding.agents import QHeuristic
from qstar_decoding.agents.evaluation.outcomes import evaluate, paired_bootstrap
from qstar_decoding.envs.prompts import as_prompt, columns_of
from qstar_decoding.tasks import load_task

OURS = ("best-of-n", "A*, no Q (bound)", "Q*")
END = "<end>"  # how a step says that the text is complete: no token of the server's
GRIDS = {
    "best-of-n": [{"temperature": t} for t in (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2)],
    "beam search": [
        {"step": s, "temperature": t, "beam_width": w} for s, t, w in itertools.product((4, 8), (0.8, 1.0), (1, 2))
    ],
    "particle filtering": [
        {"step": s, "temperature": t, "entropic": e} for s, t, e in itertools.product((4, 8), (0.8, 1.0), (False, True))
    ],
}


class Served:
    """The plain model of a server, as its-hub asks for it; counts what was drawn."""

    def __init__(self, client, mdp, temperature, seed):
        self.client, self.mdp, self.temperature, self.seeds = client, mdp, temperature, itertools.count(1000 * seed)
        self.lm_tokens, self.lengths, self.complete = 0, {}, set()

    async def agenerate(self, messages, stop=None, max_completion_tokens=None, temperature=None, **_):
        if messages and isinstance(messages[0], list):
            every = (self.agenerate(one, stop, max_completion_tokens, temperature) for one in messages)
            return await asyncio.gather(*every)
        prompt, *rest = (message.content for message in messages)
        so_far = "".join(rest)
        length = self.lengths.get(so_far, 0)
        left = self.mdp.max_new_tokens - length
        if left <= 0:
            return {"role": "assistant", "content": END}
        answer = await self.client.completions.create(
            model=self.mdp.model.name,
            prompt=prompt + so_far,
            max_tokens=min(left, max_completion_tokens or left),
            temperature=self.temperature if temperature is None else temperature,
            seed=next(self.seeds),
        )
        [choice] = answer.choices
        drawn, text = answer.usage.completion_tokens, so_far + choice.text
        self.lm_tokens += drawn
        self.lengths[text] = length + drawn
        if choice.finish_reason == "stop":
            self.complete.add(text)
        is_over = choice.finish_reason == "stop" or drawn >= left
        return {"role": "assistant", "content": choice.text + (END if is_over else "")}

    async def agenerate_single(self, messages, stop=None, **options):
        return await self.agenerate(messages, stop, **options)


class Judge:
    """What a search is told of its texts: J of finished ones, or the reward of unfinished ones as a probability."""

    def __init__(self, prompt, served):
        self.mdp, self.prompt, self.served = served.mdp, as_prompt(prompt), served

    def objective(self, text):
        """Return J of a text whose end, where the model drew one, counts."""
        model, ids = self.mdp.model, self.mdp.encode(self.prompt)
        written = model.tokenizer(text, add_special_tokens=False)["input_ids"]
        if text in self.served.complete:
            written.append(min(model.eos_token_ids, key=lambda i: i != model.tokenizer.eos_token_id))
        logits = model.model(torch.tensor([[*ids, *written]])).logits[0, len(ids) - 1 : -1]
        logprob = logits.log_softmax(-1)[range(len(written)), written].sum()
        [reward] = self.rewards([text])
        return self.mdp.logprob_weight * float(logprob) + float(reward)

    def score(self, conversations, steps=None, **_):
        if steps is None:  # of best-of-n
            return [self.objective(one[-1].content.removesuffix(END)) for one in conversations]
        low, high = self.mdp.reward.lower, self.mdp.reward.upper
        rewards = self.rewards([text.removesuffix(END) for text in steps])
        return [float(np.clip((reward - low) / (high - low), 0, 1)) for reward in rewards]

    def rewards(self, texts):
        prompts = [self.prompt] * len(texts)
        return self.mdp.reward([prompt.text for prompt in prompts], texts, **columns_of(prompts))

    async def ascore(self, conversations, steps=None, **_):
        return self.score(conversations, steps)


def search(name, setting, served, judge, samples):
    """Return the answer of its-hub's search with ``samples`` texts at a time."""
    from its_hub.core.algorithms.beam_search import BeamSearch
    from its_hub.core.algorithms.bon import BestOfN
    from its_hub.core.algorithms.particle_gibbs import EntropicParticleFiltering, ParticleFiltering
    from its_hub.core.lms.step_generation import StepGeneration

    if name == "best-of-n":
        algorithm = BestOfN(judge)
    else:
        steps = -(-served.mdp.max_new_tokens // setting["step"])
        step = StepGeneration(
            max_steps=steps, tokens_per_step=setting["step"], temperature=setting["temperature"], stop_token=END
        )
        if name == "beam search":
            algorithm = BeamSearch(step, judge, setting["beam_width"])
        else:
            algorithm = (EntropicParticleFiltering if setting["entropic"] else ParticleFiltering)(step, judge)
    return algorithm.ainfer(served, judge.prompt.content, samples)


async def decode(name, setting, mdp, prompts, samples, address):
    """Return J and LM tokens of every prompt; eight are asked at once, so that the server can batch them."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  its-hub draws from these
    at_once = asyncio.Semaphore(8)
    async with AsyncOpenAI(base_url=f"{address}/v1", api_key="none", timeout=3600) as client:

        async def one(seed, prompt):
            served = Served(client, mdp, setting["temperature"], seed)
            judge = Judge(prompt, served)
            async with at_once:
                found = await search(name, setting, served, judge, samples)
            return judge.objective(found["content"].removesuffix(END)), served.lm_tokens

        found = await asyncio.gather(*(one(seed, prompt) for seed, prompt in enumerate(prompts)))
    objectives, lm_tokens = zip(*found, strict=True)
    return {"objectives": objectives, "lm_tokens": lm_tokens}


@contextlib.contextmanager
def server():
    """Start `qstar serve` and return its address."""
    command = [sys.executable, "-m", "qstar_decoding.cli", "serve", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            yield next(found[0] for line in process.stdout if (found := re.search(r"http://[0-9.:]+", line)))
        finally:
            process.terminate()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="?", default="sentiment", help="a task whose reward reads unfinished texts")
    parser.add_argument("--prompts", type=int, default=40, help="number of test prompts")
    parser.add_argument("--dev", type=int, default=20, help="number of dev prompts")
    parser.add_argument("--budgets", type=int, nargs="+", default=[50, 100, 200], help="LM tokens a prompt")
    parser.add_argument("--runs", type=Path, default=Path("runs/frameworks"), help="folder of the results")
    add_json_option(parser)
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    task, rows = load_task(arguments.task), []
    mdp = task.mdp()
    dev, test = task.prompts.of("dev")[: arguments.dev], task.prompts.of("test")[: arguments.prompts]

    def measured(name, setting, prompts, samples):
        which = hashlib.sha256(repr((task.name, name, setting, prompts, samples)).encode()).hexdigest()[:16]
        call = partial(decode, name, setting, mdp, prompts, samples, address)
        return read_or_measure(arguments.runs / f"{which}.json", lambda: asyncio.run(call()))

    title = f"{task.name}: {len(test)} test prompts; its-hub {version('its-hub')}, tuned on {len(dev)} dev prompts"
    table = Table(title=title)
    for column in ("budget", "decoder", "setting", "samples", "LM tokens", "J", "Q* minus it"):
        table.add_column(column, justify="left" if column in ("decoder", "setting") else "right")
    with server() as address:
        for budget in arguments.budgets:
            ours = {}
            for name in OURS:
                path = arguments.runs / f"{task.name}-{name}-{budget}-{len(test)}.json"
                outcome = read_or_measure(path, partial(own, name, task, test, budget))
                ours[name] = {**outcome, "setting": "the task's", "samples": ""}
            theirs = {}
            for name, grid in GRIDS.items():
                samples = max(2, budget // mdp.max_new_tokens)  # even, as a beam of width 2 wants
                tuned = [measured(name, setting, dev, samples)["objectives"] for setting in grid]
                best = grid[np.argmax([np.mean(with_the_worst(objectives)) for objectives in tuned])]
                result = measured(name, best, test, samples)
                shown = ", ".join(f"{key} {value}" for key, value in best.items())
                theirs[f"its-hub: {name}"] = {**result, "setting": shown, "samples": str(samples)}
            reference = with_the_worst(ours["Q*"]["objectives"])
            for name, result in {**theirs, **ours}.items():
                objectives = with_the_worst(result["objectives"])
                difference = reference - objectives
                low, high = paired_bootstrap(difference)
                against = "" if name == "Q*" else f"{difference.mean():+.3f} [{low:+.3f}, {high:+.3f}]"
                tokens = f"{np.mean(result['lm_tokens']):.0f}"
                cells = (result["setting"], result["samples"], tokens, f"{objectives.mean():.3f}", against)
                table.add_row(str(budget), name, *cells, end_section=name == "Q*")
                rows.append(row(f"{name} at {budget}", objectives.mean(), "J"))
    out.print(table)
    write(rows, arguments.json)


def own(name, task, prompts, budget):
    """Return J and LM tokens of one of this package's decoders."""
    outcome = evaluate(make(name, task.mdp(), QHeuristic(task.name), task, 0), prompts, budget)
    return {"objectives": outcome.objectives.tolist(), "lm_tokens": outcome.lm_tokens.tolist()}


if __name__ == "__main__":
    main()
