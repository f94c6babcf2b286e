"""The result of a search: the proposed text, the bounds, the other texts found."""

from __future__ import annotations

import html
import importlib
import itertools
import math
import re
import sys
import tempfile
import webbrowser
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...checks import check_integer, check_number
from ...envs.mdp import Completion
from ...errors import ConfigurationError, ConstraintError
from .budget import TracePoint, Usage
from .loop import ActiveSearch, turn
from .problem import Scope
from .snapshot import SearchTree
from .state import Search, Status

__all__ = ["Plan", "make_plan"]

_RUNNERS_UP = 4  # texts beside the best in a notebook


@dataclass(frozen=True, repr=False)
class Plan:
    """What a decoder found for one prompt.

    Attributes:
        prompt: The prompt's text.
        text: The best completion; where the budget did not pay for one, the most promising unfinished one.
        token_ids: Its tokens, an end-of-sequence token included.
        objective: Its J = α · logprob + reward; NaN if it is unfinished. With ``score="q"`` its estimate f = g + h.
        reward: Its reward; NaN if it is unfinished, or was not asked for (``score="q"``).
        logprob: Its log-probability, nats.
        stop: How it ended: ``"eos"``, ``"stop"``, ``"length"``, or ``"partial"`` if it is unfinished.
        lower_bound: LB, the best J found; -inf if none.
        upper_bound: UB, which no completion of the scope can exceed, whatever the heuristic; inf where the reward has
            no upper bound.
        certified: Whether the gap is at most epsilon, that is: this completion is the best there is.
        scope: What the upper bound speaks of: ``"top-k tree"`` or ``"full vocabulary"``.
        usage: What it took.
        stop_reason: ``"certified"``, ``"budget"``, ``"gap"``, ``"target"``, ``"patience"`` (see :class:`Budget`),
            ``"interrupted"`` (Ctrl-C, a handle's ``stop``), ``"cancelled"`` (a stream was closed), ``"exhausted"``
            (nothing left that could be better in this scope, without a certificate) or ``"finished"`` (the decoder had
            nothing more to try).
        completions: Every completion that was scored, the best first.
        trace: LB and UB after each step.
        tree: What the search saw.
    """

    prompt: str
    text: str
    token_ids: tuple[int, ...]
    objective: float
    reward: float
    logprob: float
    stop: str
    lower_bound: float
    upper_bound: float
    certified: bool
    scope: Scope
    usage: Usage
    stop_reason: str
    completions: list[Completion]
    trace: list[TracePoint]
    tree: SearchTree = field(repr=False)
    _active: ActiveSearch | None = field(default=None, repr=False, compare=False)

    @property
    def gap(self) -> float:
        """UB - LB: by how much at most a better completion could exceed this one."""
        return self.upper_bound - self.lower_bound if math.isfinite(self.upper_bound) else math.inf

    def best(self, n: int, *, diversity: float = 0.0) -> list[Completion]:
        """Return up to ``n`` of the completions found, no two with the same text, the best first.

        With a diversity penalty each one after the first is the best of J - diversity · overlap: maximal marginal
        relevance (Carbonell & Goldstein 1998). The overlap, from 0 to 1, is the mean of the shares of its words and of
        its word pairs that the ones before it have (ROUGE-1 and ROUGE-2 precision, Lin 2004).

        Args:
            n: How many. Give the planner the same ``n``, so that it searches for them.
            diversity: What a text that only repeats earlier ones loses, in units of J.
        """
        check_integer("n", n)
        check_number("diversity", diversity, low=0)
        left = list({completion.text.strip(): completion for completion in reversed(self.completions)}.values())[::-1]
        left.sort(key=lambda completion: -completion.objective)
        chosen: list[Completion] = []
        seen: set[tuple[str, ...]] = set()
        while left and len(chosen) < n:
            worth = [c.objective - diversity * _overlap(c.text, seen) for c in left]
            chosen.append(left.pop(int(np.argmax(worth))))
            seen.update(*_word_grams(chosen[-1].text))
        return chosen

    def sample(self, n: int = 1, *, temperature: float, seed: int | None = None) -> list[Completion]:
        """Draw ``n`` of the completions found, with replacement, in proportion to exp(J / temperature).

        Args:
            n: How many.
            temperature: τ, in units of J: near 0 always the best, large ones any.
            seed: Of the draw.

        Raises:
            ConfigurationError: An argument is out of range, or nothing was finished.
        """
        check_integer("n", n)
        check_number("temperature", temperature, low=0, open_low=True)
        if not self.completions:
            raise ConfigurationError("no completion was finished, so there is none to draw; plan with a larger budget")
        objectives = np.array([completion.objective for completion in self.completions])
        is_best = objectives == objectives.max()  # their difference from the best is 0, even where J is infinite
        with np.errstate(invalid="ignore"):
            weights = np.exp(np.where(is_best, 0.0, objectives - objectives.max()) / temperature)
        drawn = np.random.default_rng(seed).choice(len(weights), size=n, p=weights / weights.sum())
        return [self.completions[i] for i in drawn]

    def __repr__(self) -> str:
        """Return the text, J and the bounds, in one line."""
        text = self.text if len(self.text) <= 60 else f"{self.text[:59]}…"
        facts = ", ".join(f"{name} {value}" for name, value in _facts(self).items())
        return f"Plan({text!r}, {facts})"

    def _repr_html_(self) -> str:
        """Return the text, J, the bounds and the runners-up as a table, for Jupyter."""
        rows = [
            f"<tr><th>{name}</th><td colspan=2>{html.escape(value)}</td></tr>" for name, value in _facts(self).items()
        ]
        others = [c for c in self.completions if c.token_ids != self.token_ids][:_RUNNERS_UP]
        rows += [
            f"<tr><th>{'also' if i == 0 else ''}</th><td>J {c.objective:.3f}</td>"
            f"<td style='text-align:left'>{html.escape(c.text)}</td></tr>"
            for i, c in enumerate(others)
        ]
        shown = f"{html.escape(self.prompt)}<b>{html.escape(self.text)}</b>"
        return f"<div><p style='white-space:pre-wrap'>{shown}</p><table>{''.join(rows)}</table></div>"

    def show(self, *, height: int = 480) -> None:
        """Show the searched tree with its bounds and candidates: within a notebook, or else in a web browser.

        Args:
            height: Of the picture in a notebook, in pixels.
        """
        page = self.tree.to_html(facts=_facts(self))
        if "IPython" in sys.modules and sys.modules["IPython"].get_ipython() is not None:
            notebook: Any = importlib.import_module("IPython.display")
            style = f"width:100%;height:{int(height)}px;border:0"
            notebook.display(
                notebook.HTML(f'<div><iframe srcdoc="{html.escape(page)}" style="{style}"></iframe></div>')
            )
            return
        with tempfile.NamedTemporaryFile("w", suffix=".html", delete=False, encoding="utf-8") as file:
            file.write(page)
        webbrowser.open(Path(file.name).as_uri())

    def __getstate__(self) -> dict[str, Any]:
        """Pickle everything but the search itself, which is tied to this process's token tree."""
        return {**vars(self), "_active": None}


def _facts(plan: Plan) -> dict[str, str]:
    """Return what matters of a plan, by name."""
    if plan.stop == "partial":
        facts = {"unfinished": f"the budget paid for {len(plan.token_ids)} tokens of it"}
    else:
        parts = "" if math.isnan(plan.reward) else f" (reward {plan.reward:.3f}, log-prob {plan.logprob:.2f})"
        facts = {"J": f"{plan.objective:.3f}{parts}"}
    bounds = "certified best" if plan.certified else f"gap {plan.gap:.3f}"
    facts["bounds"] = f"{plan.lower_bound:.3f} to {plan.upper_bound:.3f}, {bounds} in the {plan.scope}"
    facts["used"] = f"{plan.usage.lm_tokens} LM tokens, {plan.usage.seconds:.1f} s"
    return facts | {"stopped": plan.stop_reason}


def make_plan(active: ActiveSearch, choose: Callable[[Search], Completion | None]) -> Plan:
    """Return the result of a search.

    Args:
        active: The search.
        choose: Returns the completion to propose; None where there is none.

    Raises:
        ConstraintError: The constraint left nothing to write.
    """
    with turn([active.search]):
        plan = _make_plan(active, choose)
        if active.search.is_over:  # its nodes are looked up again if it is resumed
            active.search.mdp.tree.unpin(active.search)
        return plan


def _make_plan(active: ActiveSearch, choose: Callable[[Search], Completion | None]) -> Plan:
    search = active.search
    scored = [completion for completion in search.completions.values() if not math.isnan(completion.objective)]
    if not search.completions and not search.can_improve:
        raise ConstraintError(_dead_end(search))
    proposed = choose(search) or _partial(search)
    return Plan(
        prompt=search.prompt.text,
        **proposed._asdict(),
        lower_bound=search.lower_bound,
        upper_bound=search.upper_bound,
        certified=search.is_certified and proposed is search.best,
        scope=search.scope,
        usage=search.usage,
        stop_reason=search.stop_reason,
        completions=sorted(scored, key=lambda completion: -completion.objective),
        trace=list(search.trace),
        tree=SearchTree.from_search(search, None if proposed.stop == "partial" else proposed.token_ids),
        _active=active if search.shared is None else None,
    )


def _dead_end(search: Search) -> str:
    """Say where a constraint left nothing to write."""
    dead = np.flatnonzero((search.status[: search.size] == Status.MASKED).all(axis=1))
    row = dead[search.depth[dead].argmin()]
    return (
        f"no text of the searched tree after {search.prompt.text!r} satisfies the constraint: no token is left at "
        f"position {search.depth[row]}, after {search.mdp.text(int(search.node[row]))!r}, and every other branch ends "
        "so too; allow more, or raise top_k or max_new_tokens"
    )


def _partial(search: Search) -> Completion:
    """Return the deepest prefix of highest priority, for when nothing was finished."""
    mdp, deepest = search.mdp, search.at_depth(int(search.depth[: search.size].max()))
    node = int(search.node[deepest[np.argmax(search.f[deepest].max(axis=1))]])
    ids = tuple(mdp.tree.completion_ids(node))
    return Completion(mdp.text(node), ids, float(mdp.tree.path_logprob[node]), math.nan, math.nan, "partial")


def _word_grams(text: str) -> tuple[set[tuple[str, ...]], set[tuple[str, ...]]]:
    """Return the words of a text and the pairs of neighbours, without case and punctuation."""
    words = re.findall(r"\w+(?:['’]\w+)*", text.casefold())
    return {(word,) for word in words}, set(itertools.pairwise(words))


def _overlap(text: str, seen: set[tuple[str, ...]]) -> float:
    """Return the mean share of a text's words and word pairs that are in ``seen``."""
    shares = [len(grams & seen) / len(grams) for grams in _word_grams(text) if grams]
    return sum(shares) / len(shares) if shares else 0.0
