"""Settled text: the beginning that every text has which a search can still propose.

A stream is append-only, so a token goes out once no text can win that does not begin with it. Three kinds of texts can
win: the best finished text, texts below an open edge, and, while nothing is finished, the unfinished text that a spent
budget would leave.

* An open edge counts if its bound U is not below the J of the best text. U is sound, whatever the heuristic promises,
  so what is left out cannot win. Where J is not asked for (``score="q"``, a majority vote), every
  open edge and every finished text counts.
* A greedy decoder, a beam, and a sampler of one text never return to a depth that they have left. There only edges at
  the greatest depth count.

The searched tree has one deepest node that leads to all of these. Its text is settled, less a tail that later tokens
may still change: half of a character, what may become a stop string (it would be cut off), and white space (which some
tokenizers drop at an end).
"""

from __future__ import annotations

import heapq
import math

import numpy as np

from ..agents.planning.beam import BeamSearch, DiverseBeamSearch
from ..agents.planning.decoder import Decoder
from ..agents.planning.greedy import GreedyDecoder
from ..agents.planning.sampling import ILQLDecoder, MajorityVote, SamplingDecoder
from ..agents.search.loop import turn
from ..agents.search.state import IntArray, Search
from ..envs.constraints import StopStrings

__all__ = ["settled_text"]

_TOLERANCE = 1e-6  # by which a text may exceed its bound; see Search


def settled_text(search: Search, decoder: Decoder) -> str:
    """Return the beginning of all texts that a search can still propose.

    Args:
        search: The search, between two steps.
        decoder: The decoder that advances it.
    """
    with turn([search]):
        row = _common(search, _candidates(search, decoder))
        text = search.mdp.text(int(search.node[row])) if row else ""
    return StopStrings(search.mdp.stop).settled(text).rstrip()


def _candidates(search: Search, decoder: Decoder) -> IntArray:
    """Return the rows that lead to every text that can still be proposed."""
    open_bound, depth = search.open_bound[: search.size], search.depth[: search.size]
    is_deepest = depth == depth.max()
    needed = search.incumbent if search.score == "reward" and not isinstance(decoder, MajorityVote) else -math.inf
    candidates = (open_bound >= needed - _TOLERANCE) & (open_bound > -math.inf)
    if _never_returns(search, decoder):
        candidates &= is_deepest
    completions = search.completions.items()
    candidates[[row for (row, _), completion in completions if not completion.objective < needed]] = True
    if search.best is None:  # the budget may end before a text does
        candidates |= is_deepest
    return np.flatnonzero(candidates)


def _never_returns(search: Search, decoder: Decoder) -> bool:
    if search.budget.seconds is not None:  # it finishes one text first, and begins anew then
        return False
    draws_one = type(decoder) in (SamplingDecoder, ILQLDecoder) and getattr(decoder, "n", None) == 1
    return draws_one or isinstance(decoder, (GreedyDecoder, BeamSearch, DiverseBeamSearch))


def _common(search: Search, rows: IntArray) -> int:
    """Return the deepest row that leads to all of ``rows``; a row's parent has a smaller number."""
    if not len(rows):
        return 0
    left = {int(row) for row in rows}
    heap = [-row for row in left]
    heapq.heapify(heap)
    while len(left) > 1:
        if 0 in left:
            return 0
        row = -heapq.heappop(heap)
        left.remove(row)
        parent = int(search.parent[row])
        if parent not in left:
            left.add(parent)
            heapq.heappush(heap, -parent)
    return left.pop()
