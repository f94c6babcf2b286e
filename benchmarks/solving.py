"""Puzzles with a checker: the share solved within a budget, and LM tokens until solved. Called by learning.py.

Every decoder has the same mask of legal moves, and stops at its first right answer. Decoders that need no budget run
once, until they are right or have followed 1,600 edges; beams choose their width for each budget. Two rows without
language model show what mask and checker do by themselves: random legal moves, and every answer in order.
Rows that the folder of runs holds are not measured again.
"""

import math
from functools import partial

import numpy as np
from rich.table import Table
from rows import out, row

from qstar_decoding.agents import (
    MCTS,
    AStarPlanner,
    BeamSearch,
    Budget,
    GreedyDecoder,
    LevinTreeSearch,
    SamplingDecoder,
    UniqueSampler,
)
from qstar_decoding.agents.evaluation.outcomes import evaluate, tokens_until
from qstar_decoding.agents.planning.decoder import Decoder
from qstar_decoding.agents.search.state import Edges, Status
from qstar_decoding.envs import load_prompts
from qstar_decoding.files import read_json, write_json
from qstar_decoding.rewards import Reward

TARGET = 0.5  # J of a right answer is above, of a wrong one below: α · log π is above -0.5
MOST = 1600
GOALS = {("countdown-3", 100): 0.97, ("countdown-4", 400): 0.80, ("game-of-24", 800): 0.74}
ORDERS = [(0.02, 0.1), (0.02, 0.15), (0.05, 0.25), (0.1, 0.2), (0.1, 0.3)]  # prior and depth bonus
DEEPER = [{"search": "anytime", "weight": 1.0, "prior": b, "depth_bonus": c} for b, c in ORDERS]
WITHOUT_Q = DEEPER[2]  # by `choose_search` without Q, for all three tasks
UNMASKED = {"search": "anytime", "weight": 4.0}  # a bonus for depth leads into endless texts where all is allowed
SEARCHES = [{"search": "level"}, {"search": "capped", "width": 2}, UNMASKED, *DEEPER]


class InOrder(Decoder):
    """Depth first, by token id: every legal answer in one fixed order."""

    def select(self, search):
        """Yield the open edge of smallest token id in the deepest row."""
        while True:
            is_open = search.status[: search.size] == Status.OPEN
            rows = np.flatnonzero(is_open.any(axis=1))
            if not len(rows):
                return
            deepest = rows[search.depth[rows] == search.depth[rows].max()][-1]
            tokens = np.where(is_open[deepest], search.mdp.tree.tokens[search.node[deepest]], np.iinfo(np.int64).max)
            yield Edges(np.array([deepest]), np.array([tokens.argmin()]))


class OneByOne(SamplingDecoder):
    """Draws a text at a time, so that none is begun beside the one that solves the puzzle."""

    largest_wave = 1


class UniqueOneByOne(UniqueSampler):
    """The same without replacement."""

    largest_wave = 1


class LevinOnPolicy(LevinTreeSearch):
    """Levin tree search on the policy π^(1 / temperature) · exp(h / β), as sampling on Q draws from; β = ∞ is the LM's.

    With a heuristic it is policy-guided heuristic search (Orseau & Lelis 2021) without a cost to go.
    """

    def __init__(self, env, *, temperature=1.0, beta=math.inf, **kwargs):
        """Search in the order of depth over the policy's probability of the prefix."""
        super().__init__(env, **kwargs)
        self.temperature, self.beta = temperature, beta

    def priority(self, search, rows):
        """Return log policy - log depth of what each edge leads to, float64 [n, k]."""
        values, at = self.log_policy(search, rows) - np.log(search.depth[rows] + 1.0)[:, None], rows
        while (below := search.parent[at] >= 0).any():
            parents = np.where(below, search.parent[at], 0)
            taken = (search.child[parents] == at[:, None]).argmax(axis=1)
            values += np.where(below, self.log_policy(search, parents)[np.arange(len(at)), taken], 0.0)[:, None]
            at = np.where(below, parents, at)
        # As for A*, what the bound rules out comes last.
        return np.where(search.bound[rows] < TARGET, values - 1e9, values)

    def log_policy(self, search, rows):
        """Return the policy's log-probabilities of the actions of these rows, float64 [n, k]; -inf where masked."""
        h = search.f[rows] - search.g[rows, None]
        logits = search.mdp.logprobs(search.node[rows]) / self.temperature
        if self.beta < math.inf:
            logits = logits + h / self.beta
        logits = np.where(search.status[rows] == Status.MASKED, -np.inf, np.maximum(logits, -1e9))
        return logits - np.nan_to_num(np.logaddexp.reduce(logits, axis=1, keepdims=True), neginf=0.0)


class Unbounded(Reward):
    """Another reward without its bounds of prefixes."""

    reads_token_ids = False

    def __init__(self, inner):
        """Wrap ``inner``."""
        super().__init__()
        self.inner, self.name, self.lower, self.upper = inner, inner.name, inner.lower, inner.upper

    def score(self, prompts, completions, completion_ids=None, **columns):
        """Return the other reward's scores."""
        return self.inner.score(prompts, completions, completion_ids, **columns)


def decoders(task, qs, seeds):
    """Return by name a list of functions from a process to a decoder, one a seed where seeds matter."""
    plan = {key: value for key, value in task.planner.items() if key != "score"}
    known = [*zip(qs, seeds, strict=False)]
    table = {
        "random legal moves": [lambda mdp, s=s: OneByOne(mdp, temperature=1e6, seed=s) for s in seeds],
        "every answer in order": [InOrder],
        "best-of-n": [lambda mdp, s=s: OneByOne(mdp, seed=s) for s in seeds],
        "best-of-n, temperature 1.5": [lambda mdp, s=s: OneByOne(mdp, temperature=1.5, seed=s) for s in seeds],
        "Levin tree search": [LevinTreeSearch],
        "A*, no Q": [lambda mdp: AStarPlanner(mdp, **WITHOUT_Q)],
        "VAS on Q": [lambda mdp, q=q, s=s: OneByOne(mdp, heuristic=q, beta=0.1, seed=s) for q, s in known],
        "MCTS on Q": [lambda mdp, q=q: MCTS(mdp, heuristic=q) for q in qs],
        "Q*": [lambda mdp, q=q: AStarPlanner(mdp, heuristic=q, **plan) for q in qs],
    }
    beams = {
        "beam, reranked": [BeamSearch],
        "beam on g + Q": [lambda mdp, q=q: BeamSearch(mdp, heuristic=q) for q in qs],
    }
    return {name: made for name, made in table.items() if made}, {name: made for name, made in beams.items() if made}


def choose_search(task, q, prompts):
    """Print the searches of A* by LM tokens until solved on dev prompts; the fewest wins, for every task alike."""
    mdp = task.mdp()
    for setting in SEARCHES:
        tokens = tokens_until(AStarPlanner(mdp, heuristic=q, **setting), prompts, TARGET, most=MOST)
        mean, share = np.minimum(tokens, MOST).mean(), np.isfinite(tokens).mean()
        out.print(f"{task.name}, dev, {'Q' if q else 'no Q'}, {setting}: {mean:.0f} tokens, {share:.2f} solved")


def kept(path, key, measure):
    """Return what the file holds under a key; measure and write it first if need be. Infinities are written as null."""
    known = read_json(path) if path.is_file() else {}
    if key not in known:
        values = np.asarray(measure(), dtype=float)
        known[key] = np.where(np.isfinite(values), values, None).tolist()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, known)
    values = np.array(known[key], dtype=float)
    return np.where(np.isnan(values), np.inf, values)


def by_solved(task, qs, seeds, budgets, count, path, only=()):
    """Print and return the share of test prompts solved within each budget, and LM tokens until solved.

    ``path`` is the file of the rows that are measured already; ``only`` has beginnings of names, all rows if empty.
    """
    prompts, mdp, most = load_prompts(task.prompts.of("test")[:count]), task.mdp(), max(budgets)
    unbounded, unmasked = mdp.with_changes(reward=Unbounded(mdp.reward)), mdp.with_changes(constraint=None)
    anytime, beams = decoders(task, qs, seeds)
    few = prompts[: max(len(prompts) // 5, 1)]  # without mask the trees are endless
    runs = [(name, mdp, made, prompts) for name, made in anytime.items()]
    runs += [("A*, no Q, no bounds of prefixes", unbounded, anytime["A*, no Q"], prompts)]
    without = {**anytime, "A*, no Q": [lambda mdp: AStarPlanner(mdp, **UNMASKED)]}
    runs += [
        (f"{name}, no mask, {len(few)} problems", unmasked, without[name][:1], few)
        for name in ("best-of-n", "A*, no Q", "Q*")
        if name in without
    ]
    table = Table(title=f"{task.name}: {len(prompts)} test problems, {len(qs)} trained Q; solved within LM tokens")
    for column in ("decoder", *map(str, budgets), "tokens until solved", "median"):
        table.add_column(column, justify="left" if column == "decoder" else "right")
    rows = []

    def report(name, shares, tokens=None):
        cells = [f"{share:.2f}" for share in shares]
        if tokens is not None:
            mean, median = np.minimum(tokens, most).mean(), np.median(tokens)
            cells += [f"{mean:.0f}", f"{median:.0f}" if median <= most else f"> {most}"]
            target = 35 if task.name == "countdown-3" and name in ("A*, no Q", "Q*") else None
            unit = f"LM tokens, {most} where unsolved"
            rows.append(row(f"{task.name}, {name}: until solved", mean, unit, target, higher_is_better=False))
        table.add_row(name, *cells, style="bold" if name == "Q*" else "")
        for budget, share in zip(budgets, shares, strict=True):
            target = GOALS.get((task.name, budget)) if name in ("A*, no Q", "Q*") else None
            rows.append(row(f"{task.name}, {name}: solved within {budget}", share, "share", target))

    of = f"{len(prompts)} problems, {[q.q.description for q in qs]}"
    for name, process, made, asked in runs:
        if only and not name.startswith(tuple(only)):
            continue
        most_here = MOST if asked is prompts else most
        measure = partial(_all_tokens, made, process, asked, most_here)
        tokens = kept(path, f"{name}, at most {most_here}, {of}", measure)
        report(name, [(tokens <= budget).mean() for budget in budgets], tokens)
    for name, made in beams.items():
        if only and not name.startswith(tuple(only)):
            continue
        found = [kept(path, f"{name}, {b}, {of}", partial(_all_rewards, made, mdp, prompts, b)) for b in budgets]
        report(name, [rewards.mean() for rewards in found])
    out.print(table)
    return rows


def _all_tokens(made, process, prompts, most):
    return [tokens_until(make(process), prompts, TARGET, most=most) for make in made]


def _all_rewards(made, process, prompts, budget):
    return [evaluate(make(process), prompts, Budget(budget, target=TARGET)).rewards for make in made]


def by_ranking(task, qs, budgets, count):
    """Print and return the share right where Q alone ranks the answers, and no decoder sees the checker."""
    prompts, mdp = load_prompts(task.prompts.of("test")[:count]), task.mdp()
    plan = {**task.planner, "score": "q"}
    made = {
        "greedy LM": [lambda: GreedyDecoder(mdp)],
        "arg max Q": [lambda q=q: GreedyDecoder(mdp, heuristic=q, score="q") for q in qs],
        "beam on g + Q": [lambda q=q: BeamSearch(mdp, heuristic=q, score="q") for q in qs],
        "Q*, level by level": [lambda q=q: AStarPlanner(mdp, heuristic=q, score="q", pathmax=True) for q in qs],
        f"Q*, {plan.get('search', 'level')}": [lambda q=q: AStarPlanner(mdp, heuristic=q, **plan) for q in qs],
    }
    table = Table(title=f"{task.name}: {len(prompts)} test problems, {len(qs)} trained Q; share right, no checker")
    for column in ("decoder", *map(str, budgets)):
        table.add_column(column, justify="left" if column == "decoder" else "right")
    rows = []
    for name, makes in made.items():
        shares = []
        for budget in budgets if name not in ("greedy LM", "arg max Q") else [None]:
            shares.append(np.mean([evaluate(make(), prompts, budget).rewards for make in makes]))
            rows.append(row(f"{task.name}, no checker, {name}, {budget or 'one text'}", shares[-1], "share right"))
        table.add_row(name, *(f"{share:.2f}" for share in shares))
    out.print(table)
    return rows
