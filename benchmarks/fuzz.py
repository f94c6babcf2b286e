"""Searches for wrong certificates: random problems, searched by random decoders, judged by an enumerator of their own.

    python benchmarks/fuzz.py --cases 100000 [--seed 0] [--jobs 2] [--json FILE]

Each case draws a language model, a reward, a constraint, stop strings, a heuristic, a decoder, a budget and limits of
memory. The enumerator goes through every text by the definition of J and shares no code with the searches. Faults are:
a text that breaks the constraint, a wrong J, a bound below a reachable J, a certificate for a text that is not the
best, a budget exceeded, and an error that is not the project's own. The exit code is 1 if there is any.
"""

import argparse
import hashlib
import math
import multiprocessing
import sys
import time
import traceback
from collections import Counter

import numpy as np
import regex
from rich.table import Table
from rows import add_json_option, out, row, write

from qstar_decoding.agents import (
    DECODERS,
    SEARCHES,
    BoundHeuristic,
    Budget,
    LookAheadHeuristic,
    OracleHeuristic,
    SoftValueHeuristic,
    ZeroHeuristic,
)
from qstar_decoding.envs import BannedStrings, DecodingMDP, ForcedStrings, MinTokens, RegexConstraint, TabularLM
from qstar_decoding.errors import ConfigurationError, ConstraintError
from qstar_decoding.rewards import Reward, as_reward

TOLERANCE = 1e-9
TEXTS = ["a", "b", "c", "ab", "ba", "B", "Σ", "ς", "ß", "İ", "\n", ".", "🙂", " a", "é"]
COMPLETE = ("level", "anytime", "capped")  # searches that go on until nothing can be better
# Patterns, and the same pattern for the library `regex`, which judges texts here.
PATTERNS = ["[ab]*", "a.*", "(a|b){1,3}", "[^b]+", "a?b?c?"]


def fold(text):
    """Return a text without case, character by character."""
    return "".join(character.casefold() for character in text)


class Letters(Reward):
    """Share of letters that are among some, of at most six; what may still come bounds a prefix."""

    name, lower, upper = "letters", 0.0, 1.0

    def __init__(self, letters, longest):
        super().__init__()
        self.letters, self.longest = letters, longest

    def score(self, prompts, completions, completion_ids=None, **columns):
        return [min(sum(c in self.letters for c in text), 6) / 6 for text in completions]

    def score_prefixes(self, prompts, completions, completion_ids=None, **columns):
        return self.score(prompts, completions)

    def bound_prefixes(self, prompts, completions, remaining, completion_ids=None, **columns):
        found = [sum(c in self.letters for c in text) for text in completions]
        return [min(n + self.longest * left, 6) / 6 for n, left in zip(found, remaining, strict=True)]


def hashed(seed, share_none):
    def reward(prompts, completions, **_):
        values = [int(hashlib.md5(f"{seed}{text}".encode()).hexdigest(), 16) % 10_007 / 10_006 for text in completions]
        return [None if value < share_none else value for value in values]

    return reward


class Wild:
    """A heuristic of any value, infinite ones among them; the same for the same prefix."""

    def __init__(self, seed, infinite):
        self.seed, self.infinite = seed, infinite

    def __call__(self, mdp, prompts, nodes):
        values = np.empty((len(nodes), mdp.top_k))
        for i, ids in enumerate(mdp.tree.completions(nodes)):
            rng = np.random.default_rng([self.seed, *ids])
            values[i] = rng.standard_cauchy(mdp.top_k)
            odd = rng.random(mdp.top_k)
            values[i] = np.where(odd < self.infinite, -np.inf, np.where(odd > 1 - self.infinite, np.inf, values[i]))
        return values


def draw_problem(rng):
    """Return the parts of a random problem: what the MDP is made of, and what judges its texts."""
    size = int(rng.integers(2, 6))
    order = int(rng.integers(0, 3))
    vocabulary = [str(text) for text in rng.choice(TEXTS, size, replace=False)]
    eos = [size - 1]
    if (kind := rng.random()) < 0.15:
        eos = []
    elif kind < 0.3 and size > 2:
        eos = [0, size - 1]
    table = rng.dirichlet(np.full(size, rng.choice([0.1, 1.0, 10.0])), size=(size,) * order)
    if rng.random() < 0.1:
        table = np.where(rng.random(table.shape) < 0.3, 0.0, table) + 1e-3 * np.eye(size)[0]
    elif rng.random() < 0.5:
        table = np.maximum(table, 1e-9)
    lm = TabularLM(table, vocabulary=vocabulary, eos_token_ids=eos)
    seen = "".join(vocabulary)
    stop = [None, None, str(rng.choice(list(seen))), seen[:2], "\n"][int(rng.integers(5))]
    constraint, holds = draw_constraint(rng, vocabulary)
    options = {
        "reward": draw_reward(rng, vocabulary),
        "top_k": int(rng.integers(1, size + 1)),
        "top_p": float(rng.choice([1.0, 1.0, 0.7])) if constraint is None else 1.0,
        "max_new_tokens": int(rng.integers(1, {2: 7, 3: 5, 4: 5, 5: 4}[size])),
        "stop": stop,
        "logprob_weight": float(rng.choice([0.0, 0.02, 0.5, 2.0])),
        "constraint": constraint,
        "max_prefixes": int(rng.choice([1, 3, 1000])),
    }
    prompt = next((text for i, text in enumerate(vocabulary) if i not in eos and text.strip()), None)
    if prompt is None:  # nothing but white space
        return draw_problem(rng)
    return lm, options, holds, prompt


def draw_constraint(rng, vocabulary):
    def some():
        return "".join(rng.choice(vocabulary, int(rng.integers(1, 3))))

    kind = int(rng.integers(8))
    if kind == 0:
        banned = [some(), some()]
        return BannedStrings(*banned), lambda text, ids: not any(fold(b) in fold(text) for b in banned)
    if kind == 1:
        forced = some()
        return ForcedStrings(forced), lambda text, ids: fold(forced) in fold(text)
    if kind == 2:
        least = int(rng.integers(1, 4))
        return MinTokens(least), lambda text, ids: len(ids) >= least
    if kind == 3:
        pattern = str(rng.choice(PATTERNS))
        return RegexConstraint(pattern), lambda text, ids: bool(regex.fullmatch(pattern, text))
    if kind == 4:
        banned, least = some(), int(rng.integers(1, 3))
        return [BannedStrings(banned), MinTokens(least)], (
            lambda text, ids: fold(banned) not in fold(text) and len(ids) >= least
        )
    return None, lambda text, ids: True


def draw_reward(rng, vocabulary):
    kind = int(rng.integers(5))
    letters = "".join(rng.choice(vocabulary, 2))
    longest = max(map(len, vocabulary))
    if kind == 0:
        return Letters(letters, longest)
    if kind == 1:
        return 0.7 * Letters(letters, longest) - 0.3 * as_reward(hashed(int(rng.integers(99)), 0.0), lower=0, upper=1)
    if kind == 2:
        return as_reward(hashed(int(rng.integers(99)), 0.2), lower=0, upper=1)
    if kind == 3:
        return as_reward(hashed(int(rng.integers(99)), 0.0))  # of which nothing is known
    return as_reward(hashed(int(rng.integers(99)), 0.0), lower=0, upper=1)


def enumerate_texts(lm, options, holds, prompt):
    """Return J, text and whether it lies in the top-k tree, of every completion, straight from the definition.

    Texts of probability 0 are no completions.
    """
    eos, weight, horizon = lm.eos_token_ids, options["logprob_weight"], options["max_new_tokens"]
    stop, start = options["stop"], lm.encode(prompt)
    found, ranked_after = {}, {}

    def ranked(ids):
        context = tuple([*start, *ids][-2:])  # no model here looks further back
        if context not in ranked_after:
            logprobs = lm.forward([[*start, *ids]])[1][0]
            order = np.argsort(-logprobs, kind="stable")
            mass = np.cumsum(np.exp(logprobs[order])) - np.exp(logprobs[order])
            likely = (mass < options["top_p"]) | (options["top_p"] == 1)
            inside = (np.arange(len(order)) < options["top_k"]) & (likely | (np.arange(len(order)) == 0))
            ranked_after[context] = [
                (token, float(logprobs[token]), bool(is_inside))
                for token, is_inside in zip(order.tolist(), inside, strict=True)
                if logprobs[token] > -np.inf
            ]
        return ranked_after[context]

    def visit(ids, total, all_inside):
        for token, logprob, inside in ranked(ids):
            after = (*ids, token)
            text = lm.decode(list(after))
            cut = text.find(stop) if stop and stop in text else -1
            if token in eos or cut >= 0 or len(after) == horizon:
                kept = text if token in eos or cut < 0 else text[:cut]
                if holds(kept, after[:-1] if token in eos else after):
                    found[after] = (total + logprob, kept, all_inside and inside)
            else:
                visit(after, total + logprob, all_inside and inside)

    visit((), 0.0, True)
    texts = [text for _, text, _ in found.values()]
    rewards = options["reward"]([prompt] * len(texts), texts) if texts else []
    return {
        ids: (weight * total + float(r), text, inside)
        for (ids, (total, text, inside)), r in zip(found.items(), rewards, strict=True)
    }


def draw_decoder(rng, mdp):
    name = str(rng.choice(sorted(DECODERS))) if rng.random() < 0.5 else "astar"
    heuristic = [
        None,
        ZeroHeuristic(),
        BoundHeuristic(),
        OracleHeuristic(),
        SoftValueHeuristic(),
        LookAheadHeuristic(2),
        Wild(int(rng.integers(999)), 0.0),
        Wild(int(rng.integers(999)), 0.2),
    ][int(rng.integers(8))]
    options = {"heuristic": heuristic, "scope": str(rng.choice(["top-k tree", "full vocabulary"]))}
    if name in ("astar", "levin"):
        options |= {"n": int(rng.integers(1, 4)), "width": int(rng.integers(1, 6))}
    if name == "astar":
        options["search"] = str(rng.choice(sorted(SEARCHES)))
        options |= {"margin": float(rng.choice([0.0, 0.05, np.inf])), "pathmax": bool(rng.random() < 0.3)}
        options |= {"taper": [None, 0.0, 2.0][int(rng.integers(3))], "batch_size": int(rng.integers(1, 4))}
        options["weight"] = float(rng.choice([0.0, 1.0, 2.0])) if math.isfinite(mdp.reward.upper) else 1.0
        if options["search"] in COMPLETE:
            options["prior"] = float(rng.choice([0.0, 0.1]))
    if name in ("adaptive-vote", "sample", "ilql", "majority", "blockwise", "rebase", "smc", "unique"):
        options["seed"] = int(rng.integers(9))
    if heuristic is not None and name not in ("adaptive-vote", "args", "majority") and rng.random() < 0.2:
        options["score"] = "q"
    if name == "args" and not mdp.reward.has_potential:
        name, options = "greedy", {}
    return DECODERS[name](mdp, **options), name, options


def draw_budget(rng):
    kind = int(rng.integers(9))
    return [
        Budget(),
        Budget(lm_tokens=int(rng.integers(1, 60))),
        Budget(lm_tokens=int(rng.integers(1, 12))),
        Budget(pops=int(rng.integers(1, 40))),
        Budget(reward_calls=int(rng.integers(1, 9))),
        Budget(gap=float(rng.random())),
        Budget(target=float(rng.random())),
        Budget(lm_tokens=40, patience=int(rng.integers(1, 9))),
        Budget(seconds=0.02),
    ][kind]


def judge(plan, mdp, options, decoder_options, objectives, reachable, holds, budget):
    """Yield what is wrong with a plan.

    Args:
        objectives: J and text of every text that may be returned, by token ids.
        reachable: The same of those that the scope surely holds.
    """
    eos = mdp.model.eos_token_ids
    best = max((j for j, _ in reachable.values() if not math.isnan(j)), default=-math.inf)
    by_reward = decoder_options.get("score", "reward") == "reward" and not math.isnan(plan.reward)
    for completion in plan.completions:
        ids = completion.token_ids
        if ids not in objectives:
            written = ids[:-1] if ids[-1] in eos else ids
            kind = "broken constraint" if not holds(completion.text, written) else "text outside the tree"
            yield kind, (ids, completion.text)
            continue
        objective, text = objectives[ids]
        if text != completion.text:
            yield "wrong text", (ids, text, completion.text)
        if by_reward and not abs(completion.objective - objective) <= TOLERANCE:
            yield "wrong J", (ids, objective, completion.objective)
    if by_reward and plan.completions and plan.lower_bound != max(c.objective for c in plan.completions):
        yield "wrong LB", plan.lower_bound
    if plan.upper_bound < best - TOLERANCE:
        yield "bound below a reachable J", (plan.upper_bound, best)
    if plan.certified and plan.objective < best - TOLERANCE:
        yield "wrong certificate", (plan.objective, best)
    if plan.certified and plan.stop == "partial":
        yield "certified half a text", plan.text
    if plan.stop_reason == "target" and by_reward and plan.objective < budget.target:
        yield "target not reached", plan.objective
    look_ahead = isinstance(decoder_options.get("heuristic"), LookAheadHeuristic)
    for limit in ("lm_tokens", "pops", "reward_calls"):
        allowed = getattr(budget, limit)
        exempt = limit == "lm_tokens" and look_ahead  # the heuristic's last call may overshoot, by no more than itself
        if allowed is not None and not exempt and getattr(plan.usage, limit) > allowed and plan.stop != "partial":
            yield f"budget of {limit} exceeded", (getattr(plan.usage, limit), allowed)


def try_case(seed):
    """Return what one case showed: facts to count, and faults with what is needed to see them again."""
    rng = np.random.default_rng(seed)
    facts, faults = Counter(cases=1), []
    try:
        lm, options, holds, prompt = draw_problem(rng)
        try:
            mdp = DecodingMDP(lm, **options)
        except ConfigurationError:  # tokens that cannot follow a regular expression
            facts["refused"] += 1
            return facts, faults
        everything = {}
        inside = {}
        for ids, (objective, text, is_inside) in enumerate_texts(lm, options, holds, prompt).items():
            everything[ids] = objective, text
            if is_inside:
                inside[ids] = objective, text
        for _ in range(2):  # two searches on one tree
            decoder, name, chosen = draw_decoder(rng, mdp)
            budget = draw_budget(rng)
            full = chosen.get("scope") == "full vocabulary"
            may_return = everything if options["constraint"] is not None else inside
            reachable = everything if full else inside
            limits = {key: value for key, value in vars(budget).items() if value is not None}
            where = f"{lm.vocabulary}, end {sorted(lm.eos_token_ids)}, {options}, {name} {chosen} {limits}"
            try:
                plan = decoder.plan(prompt, budget)
                plans = [plan]
                if rng.random() < 0.3:
                    plans.append(decoder.resume(plan, 1000))
            except ConstraintError:
                facts["dead ends"] += 1
                if inside:
                    faults.append((seed, "dead end though there is a text", where))
                continue
            for number, plan in enumerate(plans):
                facts["plans"] += 1
                facts["certified"] += plan.certified
                facts["finished"] += plan.stop != "partial"
                limits = budget if number == 0 else Budget()
                judged = judge(plan, mdp, options, chosen, may_return, reachable, holds, limits)
                faults += [(seed, kind, f"{what}: {where}") for kind, what in judged]
    except Exception:
        faults.append((seed, "crash", traceback.format_exc(limit=-3)))
    return facts, faults


def run(seeds, jobs=1):
    """Yield the outcome of each case."""
    if jobs == 1:
        yield from map(try_case, seeds)
        return
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        yield from pool.imap_unordered(try_case, seeds, chunksize=50)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0, help="of the first case; the others follow")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    add_json_option(parser)
    arguments = parser.parse_args()
    start, facts, faults = time.perf_counter(), Counter(), []
    for found, wrong in run(range(arguments.seed, arguments.seed + arguments.cases), arguments.jobs):
        facts.update(found)
        faults += wrong
        for seed, kind, what in wrong[: max(20 - len(faults), 0)]:
            out.print(f"case {seed}: {kind}: {what}", markup=False)
        if facts["cases"] % 10_000 == 0:
            out.print(f"{facts['cases']:,} cases, {len(faults)} faults, {time.perf_counter() - start:.0f} s")
    table = Table("what", "count", title=f"{facts['cases']:,} random problems, {time.perf_counter() - start:.0f} s")
    kinds = Counter(kind for _, kind, _ in faults)
    names = ("refused", "plans", "finished", "certified", "dead ends")
    for name, count in [*((name, facts[name]) for name in names), ("faults", len(faults)), *kinds.most_common()]:
        table.add_row(name, f"{count:,}")
    out.print(table)
    rows = [row(name, facts[name], "cases") for name in ("cases", *names)]
    write([*rows, row("faults", len(faults), "cases", 0, higher_is_better=False)], arguments.json)
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
