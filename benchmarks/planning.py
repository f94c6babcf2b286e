"""What A* expands, what it costs beside the language model, and whether it earns its place beside Q.

    python benchmarks/planning.py exact|overhead|duel|ablation|solve|certificates [--json FILE]

exact         expansions to the optimum for heuristics from none to perfect, on trees small enough to enumerate
overhead      seconds that the planner itself takes, and what a long queue costs
duel          the same Q and prompts: A* against every other decoder on Q, all tuned alike; a budget each, and one for
              all prompts; --fair: seven tasks and three seeds
ablation      what each part of Q* is worth: Q, taper, prior, pathmax, pruning by f and by U, all endings, backtracking;
              of A* on puzzles: prior, depth bonus, order, bounds, log-probabilities, legal moves
solve         LM tokens until puzzles are solved: A* and decoders with the same mask and Q, all tuned alike
certificates  the gap that remains, by budget and α, and how many texts are proven to be the best of their tree
"""

import argparse
import inspect
import itertools
import math
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress, track
from rich.table import Table
from rows import add_json_option, out, row, write
from solving import SEARCHES, TARGET, InOrder, LevinOnPolicy, OneByOne, Unbounded, UniqueOneByOne, kept

from qstar_decoding.agents import (
    CONTENDERS,
    MCTS,
    AStarPlanner,
    BeamSearch,
    BoundHeuristic,
    OracleHeuristic,
    QHeuristic,
    QStar,
    SoftValueHeuristic,
    TokenQPolicy,
    evaluate,
    paired_bootstrap,
)
from qstar_decoding.agents.evaluation.comparison import Comparison
from qstar_decoding.agents.evaluation.outcomes import tokens_until
from qstar_decoding.agents.learning.checkpoints import pretrained_names
from qstar_decoding.agents.search.budget import Budget
from qstar_decoding.agents.search.state import Edges
from qstar_decoding.envs import DecodingMDP, Finish, TabularLM, TokenDecodingVecEnv, load_prompts
from qstar_decoding.rewards import as_reward
from qstar_decoding.tasks import load_task, task_names

BUDGETS = [50, 100, 200, 400, 800]


def progress(items, what):
    return track(list(items), what, console=Console(stderr=True), transient=True)


def table_of(title, *columns):
    table = Table(title=title)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    return table


# -- exact ------------------------------------------------------------------------------------------------------------


def letters_reward(prompts, completions, **columns):
    """In [0, 1]: alternations of vowels and consonants please, and every text has a whim of its own."""
    scores = []
    for text in completions:
        changes = sum((a in "aeiou") != (b in "aeiou") for a, b in itertools.pairwise(text))
        whim = math.sin(sum((i + 1) * ord(c) for i, c in enumerate(text)))
        scores.append(0.7 * changes / max(len(text) - 1, 1) + 0.15 * (whim + 1))
    return scores


def exact(trees=20, horizon=6, alpha=0.1):
    """Means over random trees, expansions being prefixes whose candidates were looked at, the prompt included."""
    model = TabularLM.random(6, 2, seed=0, concentration=0.5)
    reward = as_reward(letters_reward, lower=0.0, upper=1.0)
    options = {"top_k": 4, "max_new_tokens": horizon, "logprob_weight": alpha}
    prompts = ["".join(p) for p in (f"{a}{b}" for a in "abcde" for b in "abcde")]
    train, test = prompts[trees:], prompts[:trees]
    vec = TokenDecodingVecEnv(num_envs=4, model=model, prompts=train, reward=reward, **options)
    agent = QStar(
        TokenQPolicy, vec, seed=0, searches_per_round=5, tokens_per_search=40, policy_kwargs={"dropout": 0.0}
    ).learn(6000)
    mdp = DecodingMDP(model, reward=reward, **options)
    oracle = OracleHeuristic()
    heuristics = {
        "h = 0 (nothing costs anything)": lambda m, p, n: np.full((len(n), m.top_k), m.reward.upper),
        "bound": BoundHeuristic(),
        "soft value": SoftValueHeuristic(),
        "learned Q, 5 other prompts": QHeuristic(agent),
        "oracle": oracle,
    }
    counts = {name: {"stop": [], "found": [], "certified": [], "optimal": []} for name in heuristics}
    limits, path = [], []
    for prompt in progress(test, "searching"):
        [loaded] = load_prompts([prompt])
        best = oracle(mdp, [loaded], mdp.roots([loaded])).max()
        for name, h in heuristics.items():
            stopping = AStarPlanner(mdp, search="qstar", heuristic=h).plan(prompt)
            # In the order of the same f, but until U proves it.
            proving = AStarPlanner(mdp, search="anytime", weight=1.0, margin=math.inf, heuristic=h).plan(prompt)
            counts[name]["stop"].append(stopping.usage.lm_tokens + 1)
            counts[name]["optimal"].append(stopping.objective >= best - 1e-6)
            counts[name]["certified"].append(proving.usage.lm_tokens + 1)
            found = next(point for point in proving.trace if point.lower_bound >= best - 1e-6)
            counts[name]["found"].append(found.lm_tokens + 1)
        [search] = AStarPlanner(mdp, margin=math.inf, n=10**6).run_searches([loaded], Budget())  # every text
        objectives = np.array([c.objective for c in search.completions.values()])
        limits.append(horizon / (1 / np.exp((objectives - best) / alpha).sum()))
        path.append(len(search.best.token_ids))
    everything = sum(mdp.top_k**d for d in range(horizon))
    table = table_of(
        f"{trees} random trees: k = 4, T = {horizon}, at most {everything} prefixes, α = {alpha}",
        "heuristic", "until A* stops", "optimal then", "until the optimum is found", "until U proves it",
    )  # fmt: skip
    rows = []
    for name, c in counts.items():
        means = {key: float(np.mean(values)) for key, values in c.items()}
        table.add_row(
            name,
            f"{means['stop']:.1f}",
            f"{means['optimal']:.0%}",
            f"{means['found']:.1f}",
            f"{means['certified']:.1f}",
        )
        target = float(np.mean(path)) if name == "oracle" else None
        rows.append(
            row(f"expansions until A* stops, {name}", means["stop"], "prefixes", target, higher_is_better=False)
        )
    out.print(table)
    soft = np.array(counts["soft value"]["stop"])
    out.print(
        f"the optimal path has {np.mean(path):.1f} prefixes; theory allows the soft value T / p*(y*) = "
        f"{np.mean(limits):.1f} expansions; it keeps to that in {np.mean(soft <= np.array(limits)):.0%} of the trees"
    )
    return [*rows, row("soft value within T / p*(y*)", np.mean(soft <= np.array(limits)), "share", 1)]


# -- overhead ---------------------------------------------------------------------------------------------------------


class Stopwatch:
    """Adds up the seconds spent in some methods of some objects."""

    def __init__(self):
        self.seconds = {}

    def watch(self, name, holder, method):
        original = getattr(holder, method)

        def timed(*args, **kwargs):
            start = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

        setattr(holder, method, timed)


def overhead(repeats=5):
    rows, task = [], load_task("sentiment")
    q = QHeuristic("sentiment")
    table = table_of(
        "16 pops a batch, 400 LM tokens, the embedded model: medians of seconds",
        "search", "language model", "reward", "Q", "planner", "planner's share",
    )  # fmt: skip
    model = task.mdp().model
    for name, planner in {
        "level": {"search": "level", "width": 16, "taper": None},
        "anytime": {"search": "anytime", "weight": 1.0, "batch_size": 16},
    }.items():
        parts = []
        for prompt in progress(task.prompts.of("test")[: repeats + 1], f"timing {name}"):
            mdp, watch = task.mdp(model=model), Stopwatch()
            watch.watch("lm", mdp.tree, "grow")
            watch.watch("reward", mdp.reward, "score")
            decoder = AStarPlanner(mdp, heuristic=q, **planner)
            watch.watch("q", decoder, "evaluate")
            start = time.perf_counter()
            decoder.plan(prompt, 400)
            total = time.perf_counter() - start
            del mdp.reward.score  # the reward is shared: take the stopwatch off
            lm, reward, by_q = (watch.seconds.get(part, 0.0) for part in ("lm", "reward", "q"))
            parts.append((lm, reward, by_q, total - lm - reward - by_q, total))
        lm, reward, by_q, rest, total = np.median(parts[1:], axis=0)  # the first warms up
        table.add_row(name, f"{lm:.2f}", f"{reward:.3f}", f"{by_q:.3f}", f"{rest:.3f}", f"{rest / total:.1%}")
        rows.append(row(f"planner's share of the time, {name}", rest / total, "share", 0.10, higher_is_better=False))
    out.print(table)

    table = table_of(
        "what a pop costs beside the LM and the reward, 16 a batch", "search", "1,000 edges", "100,000", "ratio"
    )
    for name in ("anytime", "capped"):
        mdp = DecodingMDP(
            TabularLM.random(20, 1, seed=0, eos_token_ids=[]), reward="pangram", top_k=8, max_new_tokens=200
        )
        watch, marks = Stopwatch(), []
        watch.watch("lm", mdp.tree, "grow")
        watch.watch("reward", mdp, "potential")
        start = time.perf_counter()

        def note(search, watch=watch, marks=marks, start=start):
            marks.append((search.lm_tokens, time.perf_counter() - start - sum(watch.seconds.values())))

        weight = {"weight": 1.0} if name == "anytime" else {"width": 10**9}
        AStarPlanner(mdp, search=name, batch_size=16, **weight).plan("a", 15_500, progress=note)
        tokens, seconds = np.array(marks).T

        def per_pop(edges, tokens=tokens, seconds=seconds):
            # A node brings eight edges and takes one: about seven more in the queue.
            near = np.abs(tokens * 7 - edges) < 0.05 * edges + 700
            return np.median(np.diff(seconds[near]) / np.diff(tokens[near]))

        few, many = per_pop(1_000), per_pop(100_000)
        table.add_row(name, f"{few * 1e6:.0f} µs", f"{many * 1e6:.0f} µs", f"{many / few:.2f}")
        rows.append(row(f"a pop of 100,000 edges / of 1,000, {name}", many / few, "ratio", 1.2, higher_is_better=False))
    out.print(table)
    return rows


# -- duel -------------------------------------------------------------------------------------------------------------

FAIR_TASKS = ("review", "keywords", "relevance", "countdown-3", "countdown-4", "game-of-24", "reasoning-gym")


def rivals_of():
    """Every decoder on the same Q, Q* last; the one routine of comparisons tunes all, with as many trials."""
    return [name for name, spec in CONTENDERS.items() if spec.uses == "q" and spec.grid and name != "Q*"] + ["Q*"]


class Bar:
    """A line of progress that a comparison tells what it does."""

    def __init__(self, shown, name):
        self.shown, self.name, self.task = shown, name, shown.add_task(name)

    def __call__(self, text, done, total):
        self.shown.update(self.task, description=f"{self.name}: {text}", completed=done, total=total)


def objectives(comparison):
    """J by decoder and budget, float64 [prompts], means over seeds."""
    found = {}
    for one in comparison.rows():
        value = math.nan if one["objective"] is None else one["objective"]
        found.setdefault((one["decoder"], one["budget"]), {}).setdefault(one["prompt_index"], []).append(value)
    return {key: np.array([np.mean(values) for _, values in sorted(by.items())]) for key, by in found.items()}


def duel(names=("sentiment", "keywords"), budgets=BUDGETS, seeds=1, folder="runs/duel", prompts=None):
    """Cells and settings are kept in the folder: a second call goes on where the first one was stopped."""
    rows = []
    for name in names:
        if name not in task_names() or name not in pretrained_names():
            out.print(f"{name}: left out, since the package ships no task or no Q-function of that name")
            continue
        task = load_task(name)
        few = task.prompts.model_copy(update={"test": task.prompts.of("test")[:prompts]})
        task = task.model_copy(update={"prompts": few})
        rivals, test = rivals_of(), few.of("test")
        comparison = Comparison(task, Path(folder) / name, rivals, budgets, seeds, [name])
        with Progress(console=Console(stderr=True), transient=True) as shown:
            comparison.run(Bar(shown, name))
        found = objectives(comparison)
        settings = {rival: comparison.setting(rival) for rival in rivals}
        one_budget = AStarPlanner(
            comparison.mdp, heuristic=comparison.heuristics[0], **{**task.planner, **settings["Q*"]}
        )
        for budget in progress(budgets, f"{name}: one budget for all"):
            found["shared", budget] = evaluate(one_budget, test, budget * len(test), shared=True).objectives
        title = f"{name}: {len(test)} held-out prompts, {seeds} seeds, J; settings " + ", ".join(
            f"{rival} {setting}" for rival, setting in settings.items()
        )
        table = table_of(title, "decoder", *map(str, budgets))
        for rival in rivals:
            table.add_row(rival, *(f"{np.nanmean(found[rival, b]):.3f}" for b in budgets))
        table.add_row("Q*, one budget for all", *(f"{np.nanmean(found['shared', b]):.3f}" for b in budgets))
        for ours, label in (("Q*", name), ("shared", f"{name}, one budget for all prompts")):
            ahead = behind = 0
            cells = []
            for budget in budgets:
                best = max(rivals[:-1], key=lambda r: np.nanmean(found[r, budget]))
                difference = found[ours, budget] - found[best, budget]
                low, high = paired_bootstrap(difference)
                ahead, behind = ahead + (low > 0), behind + (high < 0)
                cells.append(f"{np.nanmean(difference):+.3f} [{low:+.3f}, {high:+.3f}]\n({best})")
            table.add_row(f"{'Q*' if ours == 'Q*' else 'one budget for all'} minus the best other", *cells)
            halves = sum(
                np.nanmean(found[ours, half]) >= np.nanmean(found["beam on g + Q", whole])
                for half, whole in itertools.pairwise(budgets)
            )
            wanted = (0, 3, len(budgets) - 1) if ours == "Q*" else (None, None, None)
            rows += [
                row(f"{label}: significantly behind", behind, "budgets", wanted[0], higher_is_better=False),
                row(f"{label}: significantly ahead", ahead, "budgets", wanted[1]),
                row(f"{label}: the beam's J with half its tokens", int(halves), "budgets", wanted[2]),
            ]
        out.print(table)
    return rows


# -- ablation ---------------------------------------------------------------------------------------------------------


class WithoutBounds(AStarPlanner):
    """A* that never prunes by U; its bets by f stay."""

    def prune(self, search, edges, *, margin):
        keep = (search.f[edges] >= search.nth_best - margin) | (search.finish[edges] != Finish.NO)
        return Edges(edges.rows[keep], edges.actions[keep])


# Each part with the settings that take it away; a prior and pathmax are put in where the task has none.
PARTS = {
    "Q": {"heuristic": BoundHeuristic()},
    "taper": {"taper": 0.0},
    "pruning by f": {"margin": math.inf},
    "pruning by U": {},
    "all endings": {"all_endings": False},
    "backtracking": {"growth": None},
}
EFFORTS = 1600  # edges followed, after which a puzzle counts as unsolved; so many LM tokens are counted for it


def ablation(names=("sentiment", "keywords", "countdown-3"), budgets=(50, 100, 200), prompts=None):
    """Q* with the task's settings against the same with one part less; puzzles by LM tokens until solved."""
    rows = []
    for name in names:
        task = load_task(name)
        test = load_prompts(task.prompts.of("test")[:prompts])
        by_part = ablation_of_puzzle if task.env["reward"] == "countdown" else ablation_by_objective
        rows += by_part(task, test, budgets)
    return rows


def ablation_by_objective(task, test, budgets):
    """Print and return J of Q* less J without each part."""
    mdp, q = task.mdp(), QHeuristic(task.name)
    whole = {**task.planner, "heuristic": q}
    decoders = {"Q*": AStarPlanner(mdp, **whole)}
    for part, changes in PARTS.items():
        decoders[part] = (WithoutBounds if part == "pruning by U" else AStarPlanner)(mdp, **{**whole, **changes})
    for part, value in (("prior", 0.1), ("pathmax", True)):
        present = bool(whole.get(part))
        label = part if present else f"(absence of {part})"
        decoders[label] = AStarPlanner(mdp, **{**whole, part: type(value)() if present else value})
    level = {key: value for key, value in whole.items() if key in ("heuristic", "prior", "pathmax")}
    decoders["all that is A*"] = BeamSearch(mdp, **level, taper=2.0, all_endings=True, growth=2.0)
    decoders["all but Q: a plain beam on g + Q"] = BeamSearch(mdp, heuristic=q)
    cells = list(itertools.product(decoders, budgets))
    found = {
        (label, budget): evaluate(decoders[label], test, budget).objectives
        for label, budget in progress(cells, f"{task.name}: decoding")
    }
    table = table_of(
        f"{task.name}: {len(test)} held-out prompts, J, and what is lost without", "part", *map(str, budgets)
    )
    table.add_row("Q*", *(f"{np.nanmean(found['Q*', budget]):.3f}" for budget in budgets))
    rows = [row(f"{task.name}, {b} LM tokens: J of Q*", np.nanmean(found["Q*", b]), "J") for b in budgets]
    for part in list(decoders)[1:]:
        differences = [found["Q*", budget] - found[part, budget] for budget in budgets]
        table.add_row(part, *map(with_interval, differences))
        for budget, difference in zip(budgets, differences, strict=True):
            rows.append(row(f"{task.name}, {budget} LM tokens: worth of {part}", np.nanmean(difference), "J"))
    out.print(table)
    return rows


def ablation_of_puzzle(task, test, budgets):
    """Print and return LM tokens until solved without each part, less those of A*; nothing has a Q."""
    mdp, plan = task.mdp(), {key: value for key, value in task.planner.items() if key != "score"}
    decoders = {
        "A*": AStarPlanner(mdp, **plan),
        "prior": AStarPlanner(mdp, **{**plan, "prior": 0.0}),
        "depth bonus": AStarPlanner(mdp, **{**plan, "depth_bonus": 0.0}),
        "best first": AStarPlanner(mdp),
        "bounds of prefixes": AStarPlanner(mdp.with_changes(reward=Unbounded(mdp.reward)), **plan),
        "log π (no prior, α = 0)": AStarPlanner(mdp.with_changes(logprob_weight=0.0), **{**plan, "prior": 0.0}),
        "legal moves": AStarPlanner(mdp.with_changes(constraint=None), **plan),
    }
    found = {}
    for label, decoder in progress(decoders.items(), f"{task.name}: solving"):
        # Without the mask the trees are endless.
        asked = test[: max(len(test) // 5, 1)] if label == "legal moves" else test
        found[label] = np.minimum(tokens_until(decoder, asked, TARGET, most=EFFORTS), EFFORTS)
    table = table_of(
        f"{task.name}: {len(test)} test problems, no Q; solved within, and LM tokens until solved without",
        "part", *map(str, budgets), "tokens", "more than A*",
    )  # fmt: skip
    rows = []
    for label, tokens in found.items():
        more = tokens - found["A*"][: len(tokens)]
        cells = [f"{(tokens <= budget).mean():.2f}" for budget in budgets]
        table.add_row(label, *cells, f"{tokens.mean():.1f}", "" if label == "A*" else with_interval(more, digits=1))
        name = f"{task.name}: A*" if label == "A*" else f"{task.name}: without {label}"
        rows.append(row(f"{name}, until solved", tokens.mean(), "LM tokens", higher_is_better=False))
    out.print(table)
    return rows


def with_interval(differences, digits=3):
    """Return the mean of paired differences and its interval as a text; prompts without a text are left out."""
    known = differences[~np.isnan(differences)]
    low, high = paired_bootstrap(known)
    return f"{known.mean():+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


# -- solve ------------------------------------------------------------------------------------------------------------


TEMPERATURES = (0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 1e6)  # the last draws legal moves at random
ROUNDS = [{"width": w, "growth": 2.0, "all_endings": True, "prior": b} for w in (1, 2, 4, 8) for b in (0.0, 0.05)]
SIMULATIONS = [{"exploration": c, "temperature": t} for c in (0.1, 0.3, 1.0, 3.0) for t in (1.0, 3.0)]
ON_Q = [{"beta": b, "temperature": t} for b in (0.05, 0.1, 0.2, 0.4) for t in (1.0, 3.0)]
# By name, the class, what guides it, and its settings: eight, or none to choose from.
SOLVERS = {
    "best-of-n": (OneByOne, None, [{"temperature": t} for t in TEMPERATURES]),
    "without replacement": (UniqueOneByOne, None, [{"temperature": t} for t in TEMPERATURES]),
    "beam, in rounds": (BeamSearch, "bound", ROUNDS),
    "MCTS": (MCTS, "bound", SIMULATIONS),
    "Levin": (LevinOnPolicy, "bound", [{"temperature": t} for t in TEMPERATURES]),
    "every answer in order": (InOrder, None, [{}]),
    "A*": (AStarPlanner, "bound", SEARCHES),
    "π·exp(Q/β), one by one": (OneByOne, "Q", ON_Q),
    "beam on g + Q, in rounds": (BeamSearch, "Q", ROUNDS),
    "MCTS on Q": (MCTS, "Q", SIMULATIONS),
    "Levin on π·exp(Q/β)": (LevinOnPolicy, "Q", ON_Q),
    "Q*": (AStarPlanner, "Q", SEARCHES),
}
OURS = ("A*", "Q*")


def solve(names=("countdown-3", "countdown-4", "game-of-24"), prompts=30, dev=16, folder="runs/solve"):
    """LM tokens until solved; each decoder tuned by their mean on dev problems, then run on test ones.

    Where the package ships a Q, decoders on it are there too. The folder keeps what was measured.
    """
    rows = []
    for name in names:
        task = load_task(name)
        mdp, known = task.mdp(), name in pretrained_names()
        guides = {None: {}, "bound": {"heuristic": BoundHeuristic()}}
        if known:
            guides["Q"] = {"heuristic": QHeuristic(name)}
        tuning, test = (load_prompts(task.prompts.of(part)[:n]) for part, n in (("dev", dev), ("test", prompts)))

        def tokens(label, setting, asked, mdp=mdp, guides=guides, name=name, tuning=tuning):
            kind, guide, _ = SOLVERS[label]
            decoder = kind(mdp, **guides[guide], **setting)
            key = f"{label}, {setting}, {len(asked)} {'dev' if asked is tuning else 'test'} problems"
            found = kept(Path(folder) / f"{name}.json", key, lambda: tokens_until(decoder, asked, TARGET, most=EFFORTS))
            return np.minimum(found, EFFORTS)

        found, chosen = {}, {}
        solvers = {label: grid for label, (_, guide, grid) in SOLVERS.items() if guide in guides}
        for label, grid in progress(solvers.items(), f"{name}: solving"):
            trials = [tokens(label, setting, tuning).mean() for setting in grid] if len(grid) > 1 else [0.0]
            chosen[label] = grid[int(np.argmin(trials))]
            found[label] = tokens(label, chosen[label], test)
        ours = OURS[-1] if known else OURS[0]
        table = table_of(
            f"{name}: {len(test)} test problems, settings by {len(tuning)} dev problems; LM tokens until solved",
            "decoder", "mean", "median", "solved", f"{ours} over it", f"it minus {ours}", "setting",
        )  # fmt: skip
        for label, values in sorted(found.items(), key=lambda item: item[1].mean()):
            cells = [f"{values.mean():.1f}", f"{np.median(values):.0f}", f"{(values < EFFORTS).mean():.2f}"]
            ratio = found[ours].mean() / values.mean()
            versus = ["", ""] if label == ours else [f"{ratio:.2f}", with_interval(values - found[ours], digits=1)]
            table.add_row(label, *cells, *versus, str(chosen[label]))
            rows.append(row(f"{name}, {label}: until solved", values.mean(), "LM tokens", higher_is_better=False))
        out.print(table)
        best = min((label for label in found if label not in OURS), key=lambda label: found[label].mean())
        ratio = found[ours].mean() / found[best].mean()
        rows.append(row(f"{name}: {ours} over the best other, {best}", ratio, "ratio", 0.5, higher_is_better=False))
    return rows


# -- certificates -----------------------------------------------------------------------------------------------------


def certificates(prompts=20, budgets=(100, 400, 1600), alphas=(0.02, 0.1, 0.3, 1.0)):
    rows, task = [], load_task("sentiment")
    model, q = task.mdp().model, QHeuristic("sentiment")
    test = task.prompts.of("test")[:prompts]
    table = table_of(
        f"{prompts} held-out prompts: mean gap (how many are certified), top-k tree",
        "α", "h", *map(str, budgets),
    )  # fmt: skip
    for alpha in alphas:
        mdp = task.mdp(model=model, logprob_weight=alpha)
        for name, heuristic in (("bound", None), ("Q", q)):
            cells = []
            for budget in progress(budgets, f"α = {alpha}, {name}"):
                plans = AStarPlanner(mdp, heuristic=heuristic).plan_many(test, budget)
                certified = sum(plan.certified for plan in plans)
                cells.append(f"{np.mean([plan.gap for plan in plans]):.3f} ({certified})")
                rows.append(row(f"certified at {budget} tokens, α = {alpha}, {name}", certified, "prompts"))
            table.add_row(f"{alpha:g}", name, *cells)
        table.add_section()
    out.print(table)
    out.print("Q was learned for α = 0.02; with other weights it still orders the search, and U still proves.")
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {function.__name__: function for function in (exact, overhead, duel, ablation, solve, certificates)}
    parser.add_argument("part", choices=parts)
    parser.add_argument("--fair", action="store_true", help="duel: all tasks, three seeds unless --seeds")
    parser.add_argument("--tasks", nargs="+", help="duel, ablation, solve: these tasks")
    parser.add_argument("--budgets", nargs="+", type=int, help="duel, ablation: LM tokens a prompt")
    parser.add_argument("--prompts", type=int, help="duel, ablation, solve: number of test prompts")
    parser.add_argument("--seeds", type=int, help="duel: seeds of decoders that draw")
    parser.add_argument("--folder", help="duel, solve: where what was measured is kept")
    add_json_option(parser)
    arguments = parser.parse_args()
    options = {"names": FAIR_TASKS, "seeds": 3, "folder": "runs/duel-fair"} if arguments.fair else {}
    given = {"names": arguments.tasks, **{k: getattr(arguments, k) for k in ("budgets", "prompts", "seeds", "folder")}}
    options |= {name: value for name, value in given.items() if value is not None}
    known = inspect.signature(parts[arguments.part]).parameters
    if (arguments.fair and arguments.part != "duel") or not options.keys() <= known.keys():
        parser.error(f"{arguments.part} does not take that option")
    rows = parts[arguments.part](**options)
    write(rows, arguments.json)


if __name__ == "__main__":
    main()
