"""Decoders that keep or draw texts from left to right: the same tree, the same top-k, the same accounting as A*."""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..envs import Completion, Finish
from ..errors import ConfigurationError, check_integer, check_number
from .heuristics import Heuristic
from .planning import Decoder
from .search import NO_EDGES, Edges, IntArray, Search, Status, Values

__all__ = [
    "ARGSDecoder",
    "BeamSearch",
    "BlockwiseDecoder",
    "DiverseBeamSearch",
    "GreedyDecoder",
    "ILQLDecoder",
    "MajorityVote",
    "SamplingDecoder",
]

_UNBUDGETED_BEAM = 8  # transformers' documentation uses 4 to 10


class GreedyDecoder(Decoder):
    """Take the most likely token each time; with a heuristic, the one with the largest h: arg max Q."""

    def search(self, search: Search) -> Iterator[Edges]:
        """Yield one edge per step, until the text is finished."""
        row = 0
        while row >= 0 and (search.status[row] != Status.MASKED).any():  # a constraint may leave nothing to take
            edge = Edges(*(np.array([i]) for i in (row, int(self.preferences(search, row).argmax()))))
            yield edge
            row = int(search.child[edge][0])

    def preferences(self, search: Search, row: int) -> Values:
        """Return what the actions of a row are chosen by, float64 [k], -inf for those that are none."""
        values: Values = np.where(search.status[row] == Status.MASKED, -np.inf, search.f[row])
        return values


class ARGSDecoder(GreedyDecoder):
    """Take the token with the largest log π(a | s) + w · φ(s·a) each time, φ being the reward of the prefix it makes.

    ARGS (Khanov, Burapacheep & Li 2024), greedy version. Every candidate's prefix is scored, k reward calls a token; it
    needs no further token of the language model for that, as the text is known.
    """

    def __init__(self, env: Any, *, reward_weight: float = 1.0, **kwargs: Any) -> None:
        """Weigh the prefix's reward by ``reward_weight``, in nats per unit of reward.

        Raises:
            ConfigurationError: The reward has no potential, so it cannot score prefixes.
        """
        super().__init__(env, **kwargs)
        self.reward_weight = check_number("reward_weight", reward_weight)
        if not self.mdp.reward.has_potential:
            raise ConfigurationError(
                f"ARGS scores prefixes, and the reward {self.mdp.reward.name!r} has no potential that could"
            )

    def preferences(self, search: Search, row: int) -> Values:
        """See :class:`GreedyDecoder`."""
        mdp, node = search.mdp, search.node[row]
        legal = np.flatnonzero(search.status[row] != Status.MASKED)
        search.reward_calls += len(legal)
        values = np.full(mdp.top_k, -np.inf)
        values[legal] = mdp.tree.logprobs[node, legal] + self.reward_weight * mdp.edge_potentials(
            search.prompt, int(node), legal
        )
        return values


class BeamSearch(Decoder):
    """Keep the ``width`` likeliest prefixes of each length; the texts they end in are reranked by J.

    With a heuristic prefixes are kept by f = g + h instead. Edges that finish leave the beam with a completion.
    """

    def __init__(
        self,
        env: Any,
        *,
        width: int | None = None,
        rerank: bool = True,
        heuristic: Heuristic | None = None,
        **kwargs: Any,
    ) -> None:
        """Decode with a beam.

        Args:
            env: An environment or a :class:`DecodingMDP`.
            width: Prefixes of each length, by default as many as what is left of the budget surely pays for: what texts
                that end early do not need makes the rest of the beam wider.
            rerank: Whether the reward is asked to choose among the finished texts; if not, the one of highest f is
                proposed, without a heuristic the likeliest.
            heuristic: See the class.
            kwargs: See :class:`Decoder`.

        Raises:
            ConfigurationError: An argument is out of range.
        """
        super().__init__(env, heuristic=heuristic, **kwargs)
        if width is not None and width < 1:
            raise ConfigurationError(f"width is an integer >= 1 or None, got {width!r}")
        self.width = width
        if not rerank:
            self.score = "q"

    def search(self, search: Search) -> Iterator[Edges]:
        """Yield the edges of one level at a time."""
        width = self.width or 1
        for depth in range(search.mdp.max_new_tokens):
            width = self.width or max(width, affordable_width(search, depth))
            rows = search.at_depth(depth)
            row, action = np.nonzero(search.status[rows] == Status.OPEN)
            best = np.argsort(-search.f[rows[row], action], kind="stable")[:width]
            if not len(best):
                return
            yield Edges(rows[row[best]], action[best])


class DiverseBeamSearch(Decoder):
    """Beam search in groups, each of which is kept from repeating the tokens that those before it chose at this step.

    Vijayakumar et al. 2018, with Hamming diversity; the penalty is in units of J.
    """

    def __init__(
        self, env: Any, *, width: int | None = None, groups: int = 4, diversity: float = 0.05, **kwargs: Any
    ) -> None:
        """Decode with ``width`` prefixes of each length, by default as for :class:`BeamSearch`, in ``groups``."""
        super().__init__(env, **kwargs)
        self.width = None if width is None else check_integer("width", width)
        self.groups = check_integer("groups", groups)
        self.diversity = check_number("diversity", diversity, low=0)

    def search(self, search: Search) -> Iterator[Edges]:
        """Yield the edges of one level at a time, of all groups together."""
        width = self.width or affordable_width(search)
        groups = min(self.groups, width)
        members: list[IntArray] = [np.zeros(1, dtype=np.int64)] * groups
        for depth in range(search.mdp.max_new_tokens):
            width = self.width or max(width, affordable_width(search, depth))
            sizes = [len(part) for part in np.array_split(np.arange(width), groups)]
            chosen: list[Edges] = []
            said: Counter[int] = Counter()
            taken: set[tuple[int, int]] = set()
            for rows, size in zip(members, sizes, strict=True):
                row, action = np.nonzero(search.status[rows] == Status.OPEN)
                row = rows[row]
                tokens = search.mdp.tree.tokens[search.node[row], action]
                worth = search.f[row, action] - self.diversity * np.array([said[t] for t in tokens.tolist()])
                ranked = [i for i in np.argsort(-worth, kind="stable") if (row[i], action[i]) not in taken][:size]
                chosen.append(Edges(row[ranked], action[ranked]))
                said.update(tokens[ranked].tolist())
                taken.update(zip(row[ranked], action[ranked], strict=True))
            if not taken:
                return
            yield Edges(*(np.concatenate(part) for part in zip(*chosen, strict=True)))
            members = [search.child[edges] for edges in chosen]
            members = [children[children >= 0] for children in members]


class SamplingDecoder(Decoder):
    """Sample completions from the top-k distribution and keep the best: best-of-n; with n = 1 ancestral sampling.

    With a heuristic tokens are drawn from π(a | s) · exp(h(s, a) / β), which tilts the language model towards what Q
    expects, as in value-augmented sampling (Han et al. 2024) and controlled decoding (Mudgal et al. 2024).
    """

    def __init__(
        self,
        env: Any,
        *,
        n: int | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        beta: float = 0.05,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        """Draw ``n`` completions, by default as many as the budget surely pays for (1 without a budget).

        Args:
            env: An environment or a :class:`DecodingMDP`.
            n: Number of completions.
            temperature: Of the softmax over the k candidates; below 1 is more careful.
            top_p: Draw from the smallest set of candidates that has this share (Holtzman et al. 2020).
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
        self.top_p = check_number("top_p", top_p, low=0, high=1, open_low=True)
        self.beta = check_number("beta", beta, low=0, open_low=True)

    def search(self, search: Search) -> Iterator[Edges]:
        """Yield the next token of each of a wave of samples; samples that share a prefix share its cost."""
        rng = generator(self.seed, search)
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
                actions = self.draw(search, rows, rng)
                new = np.unique(np.stack((rows, actions))[:, search.status[rows, actions] == Status.OPEN], axis=1)
                if new.size:
                    yield Edges(*new)
                ends = search.finish[rows, actions] != Finish.NO
                search.draws.update(zip(rows[ends].tolist(), actions[ends].tolist(), strict=True))
                rows = search.child[rows, actions]
                rows = rows[rows >= 0]  # the others are finished
            # A small tree may be sampled empty long before the budget is.
            fruitless = fruitless + 1 if search.lm_tokens == before else 0
            if fruitless == 20:
                return

    def draw(self, search: Search, rows: IntArray, rng: np.random.Generator) -> IntArray:
        """Return the action to take at each of these rows, int64 [n]."""
        logits = self.logits(search, rows)
        logits[search.status[rows] == Status.MASKED] = -np.inf
        if self.top_p < 1:
            order = np.argsort(-logits, axis=1, kind="stable")
            ranked = np.take_along_axis(logits, order, axis=1)
            p = np.exp(ranked - ranked[:, :1])
            ranked[p.cumsum(axis=1) - p >= self.top_p * p.sum(axis=1, keepdims=True)] = -np.inf
            np.put_along_axis(logits, order, ranked, axis=1)
        # The Gumbel-max trick: an exact draw from the softmax, whatever the scale.
        actions: IntArray = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
        return actions

    def logits(self, search: Search, rows: IntArray) -> Values:
        """Return the logits of the actions of these rows, float64 [n, k]."""
        logits: Values = search.mdp.tree.logprobs[search.node[rows]].astype(np.float64) / self.temperature
        if self.heuristic is not None:
            logits += (search.f[rows] - search.g[rows, None]) / self.beta
        return logits


class ILQLDecoder(SamplingDecoder):
    """Draw tokens from softmax((log π + (Q - V) / β) / temperature), V being the largest Q: the policy of ILQL.

    Snell et al. 2023, with our Q in the place of theirs, which is learned offline. V cancels in the softmax; what
    differs from :class:`SamplingDecoder` is that the temperature sharpens the sum, not the language model alone.
    """

    def logits(self, search: Search, rows: IntArray) -> Values:
        """See :class:`SamplingDecoder`."""
        h = search.f[rows] - search.g[rows, None]
        legal = search.status[rows] != Status.MASKED
        advantage = h - h.max(axis=1, where=legal, initial=-np.inf, keepdims=True)
        logprobs = search.mdp.tree.logprobs[search.node[rows]].astype(np.float64)
        logits: Values = (logprobs + advantage / self.beta) / self.temperature
        return logits


class MajorityVote(SamplingDecoder):
    """Draw completions and propose the text that was drawn most often: self-consistency (Wang et al. 2023).

    Neither the reward nor a heuristic is asked; among texts drawn equally often the likeliest is proposed.
    """

    def __init__(self, env: Any, **kwargs: Any) -> None:
        """See :class:`SamplingDecoder`."""
        super().__init__(env, **kwargs)
        self.score = "q"

    def choose(self, search: Search) -> Completion | None:
        """Return the likeliest completion of the text drawn most often."""
        votes: Counter[str] = Counter()
        for edge, count in search.draws.items():
            if edge in search.completions:
                votes[search.completions[edge].text.strip()] += count
        return max(search.completions.values(), key=lambda c: (votes[c.text.strip()], c.logprob), default=None)


class BlockwiseDecoder(SamplingDecoder):
    """Draw ``n`` blocks of ``block`` tokens, keep the one of highest f, and go on from there: blockwise best-of-n.

    Blockwise controlled decoding (Mudgal et al. 2024). f is what the heuristic expects after the block, or J where the
    text is finished. Where the budget allows, another text is made in the same way.
    """

    def __init__(self, env: Any, *, n: int | None = None, block: int = 4, **kwargs: Any) -> None:
        """Draw ``n`` blocks at a time, by default as many as the budget surely pays for (4 without one)."""
        super().__init__(env, n=n, **kwargs)
        self.block = check_integer("block", block)

    def search(self, search: Search) -> Iterator[Edges]:
        """Yield the next token of each block."""
        rng, cost = generator(self.seed, search), max(search.mdp.max_new_tokens - 1, 1)
        n = self.n or (4 if math.isinf(search.room) else max(int(search.room) // cost, 1))
        fruitless = 0
        while fruitless < 20 and (math.isfinite(search.room) or not search.completions):
            before, start = search.size + len(search.completions), 0
            while start >= 0:
                rows, ended = np.full(n, start), []
                for _ in range(self.block):
                    actions = self.draw(search, rows, rng)
                    new = np.unique(np.stack((rows, actions))[:, search.status[rows, actions] == Status.OPEN], axis=1)
                    if new.size:
                        yield Edges(*new)
                    ended += list(zip(rows.tolist(), actions.tolist(), strict=True))
                    rows = search.child[rows, actions]
                    rows = rows[rows >= 0]
                    if not len(rows):
                        break
                done = [search.completions[edge].objective for edge in ended if edge in search.completions]
                going_on = search.f[rows].max(axis=1) if len(rows) else np.empty(0)
                best_done = max((value for value in done if not math.isnan(value)), default=-math.inf)
                start = int(rows[going_on.argmax()]) if going_on.max(initial=-np.inf) > best_done else -1
            fruitless = fruitless + 1 if search.size + len(search.completions) == before else 0

    def logits(self, search: Search, rows: IntArray) -> Values:
        """Return log π / temperature: the blocks are drawn from the language model."""
        logits: Values = search.mdp.tree.logprobs[search.node[rows]].astype(np.float64) / self.temperature
        return logits


def affordable_width(search: Search, depth: int = 0) -> int:
    """Return how many prefixes of each length, from this depth on, the rest of the budget surely pays for."""
    if math.isinf(search.room):
        return _UNBUDGETED_BEAM
    return max(int(search.room) // max(search.mdp.max_new_tokens - 1 - depth, 1), 1)


def generator(seed: int, search: Search) -> np.random.Generator:
    """Return the random numbers of one prompt's search."""
    return np.random.default_rng([seed, zlib.crc32(search.prompt.text.encode("utf-8", "surrogatepass"))])
