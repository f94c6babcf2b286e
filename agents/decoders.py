"""The baselines, behind the planner's own interface: the same tree, the same top-k, the same accounting."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..errors import ConfigurationError, UnknownNameError, check_number
from .astar import AStarPlanner
from .heuristics import Heuristic
from .planning import Decoder
from .search import NO_EDGES, Edges, Search, Status

__all__ = ["DECODERS", "BeamSearch", "GreedyDecoder", "SamplingDecoder", "make_decoder"]

_UNBUDGETED_BEAM = 8  # transformers' documentation uses 4 to 10


class GreedyDecoder(Decoder):
    """Take the most likely token each time; with a heuristic, the one with the largest h: arg max Q."""

    def search(self, search: Search) -> Iterator[Edges]:
        """Yield one edge per step, until the text is finished."""
        row = 0
        while row >= 0:
            edge = Edges(*(np.array([i]) for i in (row, int(_legal_priorities(search, row).argmax()))))
            yield edge
            row = int(search.child[edge][0])


class BeamSearch(Decoder):
    """Keep the ``width`` likeliest prefixes of each length; the texts they end in are reranked by J.

    With a heuristic prefixes are kept by f = g + h instead. Edges that finish leave the beam with a completion.
    """

    def __init__(
        self, env: Any, *, width: int | None = None, heuristic: Heuristic | None = None, **kwargs: Any
    ) -> None:
        """Decode with a beam of ``width``, by default the widest that the budget surely pays for."""
        super().__init__(env, heuristic=heuristic, **kwargs)
        if width is not None and width < 1:
            raise ConfigurationError(f"width is an integer >= 1 or None, got {width!r}")
        self.width = width

    def search(self, search: Search) -> Iterator[Edges]:
        """Yield the edges of one level at a time."""
        horizon = search.mdp.max_new_tokens
        width = self.width or (
            _UNBUDGETED_BEAM if math.isinf(search.room) else max(int(search.room) // max(horizon - 1, 1), 1)
        )
        for depth in range(horizon):
            rows = search.at_depth(depth)
            row, action = np.nonzero(search.status[rows] == Status.OPEN)
            best = np.argsort(-search.f[rows[row], action], kind="stable")[:width]
            if not len(best):
                return
            yield Edges(rows[row[best]], action[best])


class SamplingDecoder(Decoder):
    """Sample completions from the top-k distribution and keep the best: best-of-n.

    With a heuristic tokens are drawn from π(a | s) · exp(h(s, a) / β), which tilts the language model towards what Q
    expects, as in value-augmented sampling (Han et al. 2024) and controlled decoding (Mudgal et al. 2024).
    """

    def __init__(
        self,
        env: Any,
        *,
        n: int | None = None,
        temperature: float = 1.0,
        beta: float = 0.05,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        """Draw ``n`` completions, by default as many as the budget surely pays for (1 without a budget).

        Args:
            env: An environment or a :class:`DecodingMDP`.
            n: Number of completions.
            temperature: Of the softmax over the k candidates; below 1 is more careful.
            beta: β, in units of J; how little the heuristic counts.
            seed: Draws depend on the seed and the prompt only.
            kwargs: See :class:`Decoder`.

        Raises:
            ConfigurationError: An argument is out of range.
        """
        super().__init__(env, **kwargs)
        if n is not None and n < 1:
            raise ConfigurationError(f"n is an integer >= 1 or None, got {n!r}")
        if not temperature > 0:
            raise ConfigurationError(f"temperature is a number > 0, got {temperature!r}")
        self.n, self.temperature, self.seed = n, temperature, seed
        self.beta = check_number("beta", beta, low=0, open_low=True)

    def search(self, search: Search) -> Iterator[Edges]:
        """Yield the next token of each of a wave of samples; samples that share a prefix share its cost."""
        rng = np.random.default_rng([self.seed, zlib.crc32(search.prompt.text.encode("utf-8", "surrogatepass"))])
        cost = max(search.mdp.max_new_tokens - 1, 1)
        drawn = fruitless = 0
        while self.n is None or drawn < self.n:
            wave = math.inf if math.isinf(search.room) else int(search.room) // cost
            wave = min(wave, (self.n or (1 if math.isinf(wave) else math.inf)) - drawn)
            if wave < 1 and drawn:
                search.stop_reason = "budget"  # until it is resumed with a larger one
                yield NO_EDGES
                continue
            before, rows = search.lm_tokens, np.zeros(max(int(wave), 1), dtype=np.int64)
            drawn += len(rows)
            while len(rows):
                actions = np.array([self._draw(search, int(row), rng) for row in rows])
                new = np.unique(np.stack((rows, actions))[:, search.status[rows, actions] == Status.OPEN], axis=1)
                if new.size:
                    yield Edges(*new)
                rows = search.child[rows, actions]
                rows = rows[rows >= 0]  # the others are finished
            # A small tree may be sampled empty long before the budget is.
            fruitless = fruitless + 1 if search.lm_tokens == before else 0
            if fruitless == 20:
                return

    def _draw(self, search: Search, row: int, rng: np.random.Generator) -> int:
        logits = search.mdp.tree.logprobs[search.node[row]].astype(np.float64) / self.temperature
        if self.heuristic is not None:
            logits += (search.f[row] - search.g[row]) / self.beta
        logits[search.status[row] == Status.MASKED] = -np.inf
        # The Gumbel-max trick: an exact draw from the softmax, whatever the scale.
        return int((logits + rng.gumbel(size=len(logits))).argmax())


def _legal_priorities(search: Search, row: int) -> Any:
    return np.where(search.status[row] == Status.MASKED, -np.inf, search.f[row])


DECODERS: dict[str, type[Decoder]] = {
    "astar": AStarPlanner,
    "greedy": GreedyDecoder,
    "beam": BeamSearch,
    "sample": SamplingDecoder,
}


def make_decoder(name: str, env: Any, **kwargs: Any) -> Decoder:
    """Return the decoder that is called ``name`` on the command line.

    Raises:
        UnknownNameError: There is none of that name.
    """
    if name not in DECODERS:
        raise UnknownNameError("decoder", name, DECODERS)
    return DECODERS[name](env, **kwargs)
