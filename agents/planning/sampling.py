"""Decoders that draw texts: best-of-n with and without replacement, value-augmented sampling, votes, blocks."""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from ...checks import check_integer, check_number
from ...envs import Completion, Finish
from ...logprobs import gumbel_below, log_sum_exp
from ..search.state import NO_EDGES, Edges, IntArray, Search, Status, Values
from .beam import MOST_AT_ONCE, affordable_width
from .decoder import Decoder

__all__ = ["AdaptiveVote", "BlockwiseDecoder", "ILQLDecoder", "MajorityVote", "SamplingDecoder", "UniqueSampler"]


_LARGE = 1e30  # stands in for infinite logits


class SamplingDecoder(Decoder):
    """Sample completions from the top-k distribution and keep the best: best-of-n; with n = 1 ancestral sampling.

    With a heuristic tokens are drawn from π(a | s) · exp(h(s, a) / β), which tilts the language model towards what Q
    expects, as in value-augmented sampling (Han et al. 2024) and controlled decoding (Mudgal et al. 2024).

    Attributes:
        largest_wave: Texts that are drawn together, at most.
        unbudgeted: Texts that are drawn where neither ``n`` nor the budget says how many.
    """

    largest_wave = MOST_AT_ONCE
    unbudgeted = 1

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
        self.n = None if n is None else check_integer("n", n)
        self.temperature = check_number("temperature", temperature, low=0, open_low=True)
        self.seed = check_integer("seed", seed, low=0)
        self.top_p = check_number("top_p", top_p, low=0, high=1, open_low=True)
        self.beta = check_number("beta", beta, low=0, open_low=True)

    def select(self, search: Search) -> Iterator[Edges]:
        """Yield the next token of each of a wave of samples; samples that share a prefix share its cost."""
        rng = generator(self.seed, search)
        cost = max(search.actions_to_come(0) - 1, 1)
        drawn = fruitless = 0
        while self.n is None or drawn < self.n:
            affordable = search.affordable_rows(cost)
            wave = math.inf if math.isinf(affordable) else int(affordable) // cost
            wave = min(wave, (self.n or (self.unbudgeted if math.isinf(wave) else math.inf)) - drawn)
            if wave < 1 and drawn:
                search.stop_reason = "budget"  # until it is resumed with a larger one
                yield NO_EDGES
                continue
            before, count = search.lm_tokens, max(min(int(wave), self.largest_wave), 1)
            drawn += count
            yield from self.draw_texts(search, count, rng)
            # A small tree may be sampled empty long before the budget is.
            fruitless = fruitless + 1 if search.lm_tokens == before else 0
            if fruitless == 20 or self.has_enough(search):
                return

    def draw_texts(self, search: Search, count: int, rng: np.random.Generator) -> Iterator[Edges]:
        """Yield the next token of each of ``count`` texts, and enter the ends in ``search.draws``."""
        rows: IntArray = np.zeros(count, dtype=np.int64)
        while len(rows):
            actions = self.draw(search, rows, rng)
            new = np.unique(np.stack((rows, actions))[:, search.status[rows, actions] == Status.OPEN], axis=1)
            if new.size:
                yield Edges(*new)
            ends = search.finish[rows, actions] != Finish.NO
            search.draws.update(zip(rows[ends].tolist(), actions[ends].tolist(), strict=True))
            rows = search.child[rows, actions]
            rows = rows[rows >= 0]  # the others are finished

    def has_enough(self, search: Search) -> bool:
        """Tell after every wave whether no further text need be drawn."""
        del search
        return False

    def draw(self, search: Search, rows: IntArray, rng: np.random.Generator) -> IntArray:
        """Return the action to take at each of these rows, int64 [n]."""
        # An open action may have any estimate; even at -inf it is drawn before one that is masked.
        logits = np.nan_to_num(self.logits(search, rows), nan=-_LARGE, posinf=_LARGE, neginf=-_LARGE)
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
        logits: Values = search.mdp.logprobs(search.node[rows]) / self.temperature
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
        logprobs = search.mdp.logprobs(search.node[rows])
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


class AdaptiveVote(MajorityVote):
    """Draw one completion after the other until the most frequent text is likely to stay that: adaptive consistency.

    Aggarwal et al. 2023. With v₁ and v₂ draws of the two most frequent texts, the first leads with the probability
    P(p > 1/2) under the posterior Beta(v₁ + 1, v₂ + 1).
    """

    largest_wave = 1
    unbudgeted = 40  # as in the paper

    def __init__(self, env: Any, *, confidence: float = 0.95, **kwargs: Any) -> None:
        """Stop at this ``confidence``; see :class:`SamplingDecoder` for the others.

        Raises:
            ConfigurationError: It is no number from 0 to 1.
        """
        super().__init__(env, **kwargs)
        self.confidence = check_number("confidence", confidence, low=0, high=1)

    def has_enough(self, search: Search) -> bool:
        """See :class:`SamplingDecoder`."""
        votes: Counter[str] = Counter()
        for edge, count in search.draws.items():
            if edge in search.completions:
                votes[search.completions[edge].text.strip()] += count
        first, second = [*(count for _, count in votes.most_common(2)), 0, 0][:2]
        return leads(first, second) >= self.confidence


def leads(first: int, second: int) -> float:
    """Return P(p > 1/2) for p of the distribution Beta(first + 1, second + 1), exactly."""
    draws = first + second + 1
    return float(sum(math.comb(draws, i) for i in range(first + 1)) / 2**draws)


class UniqueSampler(SamplingDecoder):
    """Draw completions without replacement and keep the best: no text of the same tokens is drawn twice.

    Stochastic beam search (Kool et al. 2019): every prefix has the logarithm of its probability plus Gumbel noise, the
    largest of its continuations' values, and the ``n`` largest are kept. A further wave draws from what is left, the
    probability of the texts drawn before being taken out (UniqueRandomizer, Shi et al. 2020). So the order of the draws
    is that of sampling one by one without replacement. ``top_p`` is not used.
    """

    def draw_texts(self, search: Search, count: int, rng: np.random.Generator) -> Iterator[Edges]:
        """See :class:`SamplingDecoder`."""
        left = self._left(search)
        # Values, rows and actions of the beam; an action of -1 goes on, another ends the text.
        beam = [(float(rng.gumbel() + log_sum_exp(left[0])), 0, -1)] if np.isfinite(left[0]).any() else []
        while any(action < 0 for _, _, action in beam):
            grown = [entry for entry in beam if entry[2] >= 0]
            for value, row, action in beam:
                if action < 0:
                    noisy = left[row] + rng.gumbel(size=len(left[row]))
                    moved = gumbel_below(noisy, value)  # so that the largest is the prefix's own value
                    grown += [(moved[a], row, int(a)) for a in np.flatnonzero(np.isfinite(left[row]))]
            grown.sort(key=lambda entry: -entry[0])
            beam = grown[:count]
            edges = Edges(*np.array([(row, action) for _, row, action in beam], dtype=np.int64).T)
            new = search.status[edges] == Status.OPEN
            if new.any():
                yield Edges(edges.rows[new], edges.actions[new])
            left = self._left(search)
            children = search.child[edges]
            ends = search.finish[edges] != Finish.NO
            beam = [
                entry if end else (entry[0], int(child), -1)
                for entry, child, end in zip(beam, children, ends, strict=True)
                if end or (child >= 0 and np.isfinite(left[child]).any())
            ]
        for _, row, action in beam:
            search.draws[row, action] += 1

    def _left(self, search: Search) -> Values:
        """Return the logarithms of the probabilities below each edge that are not drawn yet, float64 [rows, k]."""
        rows = np.arange(search.size)
        logits = np.clip(np.nan_to_num(self.logits(search, rows), nan=-_LARGE), -_LARGE, _LARGE)
        left = np.where(search.status[rows] != Status.MASKED, logits, -np.inf)
        left -= np.nan_to_num(log_sum_exp(left), neginf=0.0)[:, None]
        depths = range(1, int(search.depth[rows].max()) + 1)
        levels = [(level, search.parent[level]) for level in map(search.at_depth, depths)]
        taken = [(search.child[parents] == level[:, None]).argmax(axis=1) for level, parents in levels]
        for (level, parents), actions in zip(levels, taken, strict=True):
            left[level] += left[parents, actions][:, None]
        if search.draws:
            left[tuple(np.array(list(search.draws)).T)] = -np.inf
        for (level, parents), actions in zip(reversed(levels), reversed(taken), strict=True):
            left[parents, actions] = log_sum_exp(left[level])
        return left


class BlockwiseDecoder(SamplingDecoder):
    """Draw ``n`` blocks of ``block`` tokens, keep the one of highest f, and go on from there: blockwise best-of-n.

    Blockwise controlled decoding (Mudgal et al. 2024). f is what the heuristic expects after the block, or J where the
    text is finished. Where the budget allows, another text is made in the same way.
    """

    def __init__(self, env: Any, *, n: int | None = None, block: int = 4, **kwargs: Any) -> None:
        """Draw ``n`` blocks at a time, by default as many as the budget surely pays for (4 without one)."""
        super().__init__(env, n=n, **kwargs)
        self.block = check_integer("block", block)

    def select(self, search: Search) -> Iterator[Edges]:
        """Yield the next token of each block."""
        rng, unlimited = generator(self.seed, search), math.isinf(search.affordable_rows(search.actions_to_come(0)))
        n = self.n or (4 if unlimited else affordable_width(search))
        fruitless = 0
        while fruitless < 20 and not (unlimited and search.completions):
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
                continuing = search.f[rows].max(axis=1) if len(rows) else np.empty(0)
                best_done = max((value for value in done if not math.isnan(value)), default=-math.inf)
                start = int(rows[continuing.argmax()]) if continuing.max(initial=-np.inf) > best_done else -1
            fruitless = fruitless + 1 if search.size + len(search.completions) == before else 0

    def logits(self, search: Search, rows: IntArray) -> Values:
        """Return log π / temperature: the blocks are drawn from the language model."""
        logits: Values = search.mdp.logprobs(search.node[rows]) / self.temperature
        return logits


def generator(seed: int, search: Search) -> np.random.Generator:
    """Return the random numbers of one prompt's search."""
    return np.random.default_rng([seed, zlib.crc32(search.prompt.text.encode("utf-8", "surrogatepass"))])
