"""Actions that are whole steps: sequences of tokens up to a delimiter, drawn from the language model."""

from __future__ import annotations

import inspect
import math
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from ..checks import check_choice, check_integer, check_texts
from ..errors import ConfigurationError
from ..logprobs import gumbel_below, logprob_left
from ..models.base import IntArray
from .mdp import SETTINGS, DecodingMDP, Finish, Values
from .token_tree import GrowRequest

__all__ = ["StepMDP", "StepProposals", "make_process", "process_arguments"]

StepProposals = Literal["sample", "beam"]

_STEP_SETTINGS = ("delimiter", "max_step_tokens", "token_top_k", "step_proposals", "step_seed")


class StepMDP(DecodingMDP):
    """Decoding in which an action is a step: tokens up to a delimiter, such as a line or a sentence.

    The states are those of the process over tokens at which a step ends, and J of a text is the same there. The actions
    of a state are up to k different steps, the likeliest first. Every token of a step is one of the ``token_top_k``
    likeliest that the constraint and ``top_p`` allow, so the texts of steps are some of those of tokens. A step ends
    with the token after which its text has a delimiter in it, with the token that ends the text, or with its
    ``max_step_tokens``-th. So no step of a state begins with another one.

    ``"sample"`` draws steps without replacement from the language model, each token's probabilities normalised: those
    of largest log-probability plus Gumbel noise (Kool et al. 2019), the largest first, so that every token drawn is
    part of a step that is an action. The noise depends on ``step_seed`` and the prefix only. ``"beam"`` keeps the k
    likeliest prefixes of each length; tokens of those that it drops are paid for, too.

    A state costs a LM token for its own prefix and one for each further prefix that its drawing looks at: at most
    1 + k · (``max_step_tokens`` - 1). An end of a step that ends the text costs none.

    Attributes:
        delimiter: Strings that end a step.
        max_step_tokens: Most tokens of a step.
        token_top_k: How many of the likeliest tokens each token of a step is one of.
        step_proposals: How steps are found, ``"sample"`` or ``"beam"``.
        step_seed: Of the noise.
    """

    action = "step"
    _settings = (*SETTINGS, *_STEP_SETTINGS)

    def __init__(
        self,
        *args: Any,
        delimiter: str | Sequence[str] = "\n",
        max_step_tokens: int | None = None,
        token_top_k: int | None = None,
        step_proposals: StepProposals = "sample",
        step_seed: int = 0,
        **kwargs: Any,
    ) -> None:
        """Define the process.

        Args:
            args: See :class:`DecodingMDP`.
            delimiter: Strings that end a step, and belong to it. Many vocabularies write a space at the beginning of a
                word: ``". "`` then ends a step with the first token of the next sentence, and ``"."`` with its own.
            max_step_tokens: Most tokens of a step; None for the horizon.
            token_top_k: How many of the likeliest tokens each token of a step is one of; None for ``top_k``.
            step_proposals: ``"sample"`` or ``"beam"``.
            step_seed: Steps that are drawn depend on it and on the prefix only.
            kwargs: See :class:`DecodingMDP`.

        Raises:
            ConfigurationError: An argument is out of range.
        """
        self.token_top_k = None if token_top_k is None else check_integer("token_top_k", token_top_k)
        super().__init__(*args, **kwargs)
        self.delimiter = check_texts("delimiter", delimiter)
        if not self.delimiter:
            raise ConfigurationError(f"delimiter is a non-empty string or a list of them, got {delimiter!r}")
        given = self.max_new_tokens if max_step_tokens is None else check_integer("max_step_tokens", max_step_tokens)
        self.max_step_tokens = min(given, self.max_new_tokens)
        check_choice("step_proposals", step_proposals, get_args(StepProposals))
        self.step_proposals, self.step_seed = step_proposals, check_integer("step_seed", step_seed, low=0)
        self._drawn: dict[int, _Steps] = {}

    # -- drawing ------------------------------------------------------------------------------------------------------

    def draw(self, nodes: IntArray) -> Iterator[GrowRequest]:
        """See :meth:`DecodingMDP.draw`; the drawings of all states advance together."""
        new = [_Drawing(self, node) for node in dict.fromkeys(nodes.tolist()) if node not in self._drawn]
        if not new:
            return
        self._branch([(drawing, _Branch(0.0, 0.0, 0.0, 0, -1, -1)) for drawing in new], np.array([d.node for d in new]))
        while chosen := [(drawing, branch) for drawing in new for branch in drawing.to_follow()]:
            nodes, ranks = np.array([(branch.node, branch.rank) for _, branch in chosen], dtype=np.int64).T
            yield GrowRequest(self.tree, [], nodes, ranks)
            self._branch(chosen, self.tree.children[nodes, ranks])
        self._drawn.update((drawing.node, drawing.result()) for drawing in new)

    def _branch(self, followed: Sequence[tuple[_Drawing, _Branch]], nodes: IntArray) -> None:
        """Enter the token edges of the nodes that branches have led to."""
        legal, finishes = DecodingMDP.action_mask(self, nodes), DecodingMDP.finishes(self, nodes)
        logprobs = self.tree.logprobs[nodes].astype(np.float64)
        for (drawing, branch), *row in zip(followed, nodes.tolist(), legal, finishes, logprobs, strict=True):
            drawing.enter(branch, *row)

    def ends_step(self, start: int, node: int, rank: int) -> bool:
        """Return whether the text from one node to beyond a token edge has a delimiter in it."""
        ids = [*self.tree.completion_ids(node), int(self.tree.tokens[node, rank])]
        step = self.model.decode_continuation(ids)[len(self.text(start)) :]
        return any(delimiter in step for delimiter in self.delimiter)

    def _evict(self) -> IntArray:
        """Evict as over tokens, but keep what the steps of pinned states end with; the others are drawn again."""
        ends = [self._drawn[node].nodes for node in self.tree.pinned().tolist() if node in self._drawn]
        holder = _Ends(np.concatenate(ends) if ends else np.empty(0, dtype=np.int64))
        self.tree.pin(holder)
        new = super()._evict()
        self.tree.unpin(holder)
        self._drawn = {
            int(new[node]): steps._replace(nodes=new[steps.nodes])
            for node, steps in self._drawn.items()
            if new[node] >= 0 and (new[steps.nodes] >= 0).all()
        }
        return new

    # -- what depends on the actions ----------------------------------------------------------------------------------

    def _of(self, nodes: IntArray, column: str, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Return a column of the steps of ``n`` states, [n, k]."""
        values = [getattr(self._drawn[node], column) for node in nodes.tolist()]
        return np.array(values, dtype=dtype).reshape(len(nodes), self.top_k)

    def _token_edges(self, nodes: IntArray, actions: IntArray) -> tuple[IntArray, IntArray]:
        """See :class:`DecodingMDP`."""
        rows = np.arange(len(nodes))
        return self._of(nodes, "nodes", np.int64)[rows, actions], self._of(nodes, "ranks", np.int64)[rows, actions]

    def logprobs(self, nodes: IntArray) -> Values:
        """See :meth:`DecodingMDP.logprobs`: the sums over the tokens of each step, -inf where there is none."""
        return self._of(nodes, "logprobs", np.float64)

    def omitted_logprobs(self, nodes: IntArray) -> Values:
        """See :meth:`DecodingMDP.omitted_logprobs`: what is left of the probability, once the steps have theirs."""
        return logprob_left(self.logprobs(nodes), self.max_step_tokens * self.model.logprob_error)

    def action_mask(self, nodes: IntArray) -> npt.NDArray[np.bool_]:
        """See :meth:`DecodingMDP.action_mask`."""
        mask: npt.NDArray[np.bool_] = self.logprobs(nodes) > -np.inf
        return mask

    def finishes(self, nodes: IntArray) -> npt.NDArray[np.int8]:
        """See :meth:`DecodingMDP.finishes`."""
        return self._of(nodes, "finishes", np.int8)

    def edge_tokens(self, nodes: IntArray) -> IntArray:
        """See :meth:`DecodingMDP.edge_tokens`."""
        tokens = np.full((len(nodes), self.top_k, self.max_step_tokens), -1, dtype=np.int64)
        row, action = np.nonzero(self.action_mask(nodes))
        steps = self._edge_completions(nodes[row], action)
        for i, a, ids, before in zip(row, action, steps, self.tree.depth[nodes[row]].tolist(), strict=True):
            tokens[i, a, : len(ids) - before] = ids[before:]
        return tokens

    def edge_texts(self, nodes: IntArray, actions: IntArray) -> list[str]:
        """See :meth:`DecodingMDP.edge_texts`."""
        steps, before = self._edge_completions(nodes, actions), self.texts(nodes)
        whole = [self.model.decode_continuation(ids) for ids in steps]
        return [text[len(start) :] for text, start in zip(whole, before, strict=True)]

    def lm_tokens(self, nodes: IntArray) -> IntArray:
        """See :meth:`DecodingMDP.lm_tokens`."""
        return np.array([1 + self._drawn[node].lm_tokens for node in nodes.tolist()], dtype=np.int64)

    def lm_forwards(self, nodes: IntArray) -> int:
        """See :meth:`DecodingMDP.lm_forwards`."""
        return 1 + max((self._drawn[node].forwards for node in nodes.tolist()), default=0)

    @property
    def _tree_top_k(self) -> int:
        """See :class:`DecodingMDP`."""
        if self.token_top_k is None:
            return self.top_k
        most = self.model.vocab_size
        return check_integer("token_top_k", self.token_top_k, high=most, meaning="at most the vocabulary")

    @property
    def most_lm_tokens(self) -> int:
        """See :meth:`DecodingMDP.most_lm_tokens`."""
        return 1 + self.top_k * (self.max_step_tokens - 1)

    def actions_left(self, nodes: IntArray) -> int:
        """See :meth:`DecodingMDP.actions_left`: as many as steps of the mean length of those drawn here."""
        mask = self.action_mask(nodes)
        if not mask.any():  # a dead end of the constraint; users divide by this
            return 1
        lengths = self.tree.depth[self._of(nodes, "nodes", np.int64)] + 1 - self.tree.depth[nodes][:, None]
        return math.ceil(super().actions_left(nodes) / float(lengths[mask].mean()))


def make_process(*args: Any, action: str = "token", **settings: Any) -> DecodingMDP:
    """Return the process of ``gym.make("TokenDecoding-v0", model=…, action=…)``.

    Args:
        args: See :class:`DecodingMDP`.
        action: ``"token"`` or ``"step"``.
        settings: See :class:`DecodingMDP`, and for steps :class:`StepMDP`.

    Raises:
        ConfigurationError: A setting is out of range, or one of steps is given for tokens.
    """
    check_choice("action", action, ("token", "step"))
    if action == "step":
        return StepMDP(*args, **settings)
    if given := [name for name in _STEP_SETTINGS if name in settings]:
        raise ConfigurationError(f'{", ".join(given)}: for steps only; add action="step", or leave it out')
    return DecodingMDP(*args, **settings)


def process_arguments() -> list[str]:
    """Return the names of all arguments of :func:`make_process`."""
    names = [name for cls in (DecodingMDP, StepMDP) for name in inspect.signature(cls).parameters]
    return list(dict.fromkeys(["action", *names]).keys() - {"args", "kwargs"})


# ---------------------------------------------------------------------------------------------------------------------


class _Steps(NamedTuple):
    """The steps of one state, k of them, the likeliest first; there is none where the log-probability is -inf.

    Attributes:
        nodes: int64 [k], with ``ranks`` the token edge that each ends with.
        ranks: int64 [k].
        logprobs: float64 [k], nats.
        finishes: int8 [k].
        lm_tokens: Prefixes that the drawing looked at.
        forwards: Forwards that it took.
    """

    nodes: IntArray
    ranks: IntArray
    logprobs: Values
    finishes: npt.NDArray[np.int8]
    lm_tokens: int
    forwards: int


class _Branch(NamedTuple):
    """The beginning of a step, up to a token edge.

    Attributes:
        value: What it is ranked by.
        weight: Its log-probability with the probabilities of the tokens at hand normalised, nats.
        logprob: Its log-probability, nats.
        length: Its tokens.
        node: Of the edge.
        rank: Of the edge.
        finish: How the edge ends the text.
    """

    value: float
    weight: float
    logprob: float
    length: int
    node: int
    rank: int
    finish: int = Finish.NO


class _Drawing:
    """The drawing of one state's steps, a search for the k branches of largest value that end a step.

    No branch is worth more than the one that it continues. So the k best branches hold the k best steps, and the best
    of them is followed until it ends. A beam follows all of them at a time, and forgets the others.
    """

    def __init__(self, mdp: StepMDP, node: int) -> None:
        self.node, self._mdp, self._forwards = node, mdp, 0
        self._branches: list[_Branch] = []  # the best first
        self._ended: dict[tuple[int, int], bool] = {}
        self._followed = 0
        ids = np.array(mdp.tree.sequence(node), dtype=np.int64)
        self._rng = np.random.default_rng([mdp.step_seed, zlib.crc32(ids.tobytes())])

    def enter(
        self, branch: _Branch, node: int, legal: npt.NDArray[np.bool_], finishes: npt.NDArray[np.int8], logprobs: Values
    ) -> None:
        """Enter the legal token edges of the node that a branch has led to."""
        ranks = np.flatnonzero(legal)
        if not len(ranks):
            return  # the constraint leaves nothing to write
        own = logprobs[ranks]
        weights = branch.weight + own - np.logaddexp.reduce(own)
        values = sums = branch.logprob + own
        if self._mdp.step_proposals == "sample":
            values = weights + self._rng.gumbel(size=len(ranks))
            if branch.length:
                values = gumbel_below(values, branch.value)
        self._branches += [
            _Branch(value, weight, total, branch.length + 1, node, rank, int(finishes[rank]))
            for value, weight, total, rank in zip(*(x.tolist() for x in (values, weights, sums, ranks)), strict=True)
        ]
        self._branches.sort(key=lambda one: -one.value)

    def to_follow(self) -> list[_Branch]:
        """Return the branches to follow next, which are no longer among those kept; none when all steps are found."""
        mdp, k = self._mdp, self._mdp.top_k
        if self._followed == mdp.most_lm_tokens - 1:  # a constraint's dead ends must not make it dearer
            self._branches = [branch for branch in self._branches if self._is_step(branch)]
        going = [branch for branch in self._branches[:k] if not self._is_step(branch)]
        if mdp.step_proposals == "beam":
            self._branches = self._branches[:k]
        else:
            going = going[:1]
        self._branches = [branch for branch in self._branches if branch not in going]
        self._followed += len(going)
        self._forwards += bool(going)
        return going

    def result(self) -> _Steps:
        """Return the steps found."""
        k, steps = self._mdp.top_k, sorted(self._branches[: self._mdp.top_k], key=lambda one: -one.logprob)
        missing = k - len(steps)
        return _Steps(
            np.array([one.node for one in steps] + [self.node] * missing, dtype=np.int64),
            np.array([one.rank for one in steps] + [0] * missing, dtype=np.int64),
            np.array([one.logprob for one in steps] + [-np.inf] * missing),
            np.array([one.finish for one in steps] + [Finish.NO] * missing, dtype=np.int8),
            self._followed,
            self._forwards,
        )

    def _is_step(self, branch: _Branch) -> bool:
        if branch.finish != Finish.NO or branch.length >= self._mdp.max_step_tokens:
            return True
        edge = branch.node, branch.rank
        if edge not in self._ended:
            self._ended[edge] = self._mdp.ends_step(self.node, *edge)
        return self._ended[edge]


class _Ends:
    """Keeps nodes of the token tree; see :meth:`TokenTree.pin`."""

    def __init__(self, node: IntArray) -> None:
        self.node = node
