"""The Markov decision process of decoding: the one definition that environment, learners and planners share.

One file because every method reads the same columns of one tree.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from enum import IntEnum
from typing import Any, NamedTuple, cast

import gymnasium as gym
import numpy as np
import numpy.typing as npt

from ..checks import check_integer, check_keywords, check_number
from ..columns import GrowableColumns
from ..deprecated import with_old_names
from ..errors import ConfigurationError, ConstraintError, InternalError, PromptError
from ..logprobs import logprob_left
from ..models.base import Engine, IntArray, LanguageModel, free_memory
from ..models.registry import load_language_model
from ..rewards import Reward, as_reward
from .constraints import Rules, StopStrings, make_constraint
from .prompts import Prompt, columns_of
from .token_tree import GrowRequest, TokenTree, grow_together

__all__ = ["SETTINGS", "Completion", "DecodingMDP", "Finish", "grow_processes", "mdp_of"]

Values = npt.NDArray[np.float64]

_NOTHING = np.empty(0, dtype=np.int64)
_BOUND_RULES = 256  # prompts whose rules are kept, beside those in the tree
# The arguments that the processes of one language model may differ in.
SETTINGS = ("reward", "top_k", "top_p", "max_new_tokens", "stop", "logprob_weight", "max_prefixes", "constraint")


class Finish(IntEnum):
    """Reason why an edge finishes its completion."""

    NO = 0
    EOS = 1
    STOP = 2
    LENGTH = 3


class Completion(NamedTuple):
    """A finished text.

    Attributes:
        text: The completion without end-of-sequence token, cut off where a stop string begins.
        token_ids: All its tokens, an end-of-sequence token included.
        logprob: Sum of the tokens' log-probabilities, nats.
        reward: The reward model's score r; NaN where there is none.
        objective: J = α · logprob + r.
        stop: ``"eos"``, ``"stop"`` or ``"length"``.
    """

    text: str
    token_ids: tuple[int, ...]
    logprob: float
    reward: float
    objective: float
    stop: str


@with_old_names(fresh="with_empty_tree", make_room="evict_if_full", check_going_on="check_can_continue")
class DecodingMDP:
    """Decoding with a finite horizon as a deterministic MDP.

    A state is a node of the :class:`TokenTree`: a prompt and the tokens generated so far. An action is a rank in the
    node's top-k list. An edge that ends the text (end-of-sequence, stop string, horizon) leads to no state and needs no
    language model. Its completion y is scored at once. The undiscounted return from the prompt x is

        J(y | x) = α · Σ_t log π(y_t | x, y_<t) + r(x, y).

    All methods are batched over ``n`` edges or nodes. Actions may be longer than a token (:class:`StepMDP`): such a
    class overrides what depends on the actions.

    Attributes:
        model: The language model π.
        reward: The reward model r.
        tree: The prefixes computed so far, shared by all users of this MDP.
        top_k: Number k of actions.
        max_new_tokens: The horizon T, in tokens.
        logprob_weight: α.
        max_prefixes: Approximate number of prefixes kept in the tree.
        action: What an action is, ``"token"`` or ``"step"``; see :class:`StepMDP`.
    """

    action = "token"
    _settings: tuple[str, ...] = SETTINGS

    def __init__(
        self,
        model: str | os.PathLike[str] | LanguageModel = "smollm2-135m-instruct",
        *,
        reward: Any = "sentiment",
        top_k: int = 8,
        top_p: float = 1.0,
        max_new_tokens: int = 24,
        stop: str | Sequence[str] | None = None,
        logprob_weight: float = 0.02,
        device: str = "auto",
        dtype: str = "auto",
        kv_budget: int | None = None,
        max_prefixes: int | None = None,
        hidden_layers: Sequence[int] = (),
        constraint: Any = None,
        model_kwargs: dict[str, Any] | None = None,
    ) -> None:
        """Define the process; the arguments are those of ``gym.make("TokenDecoding-v0")``.

        Args:
            model: A known name, hub id or local folder (see :func:`load_language_model`), or a model.
            reward: A registered name, a weighted sum, a callable, or a Reward (see :func:`as_reward`).
            top_k: Number of actions.
            top_p: Actions outside the smallest set of tokens with this probability are masked; 1 masks none.
            max_new_tokens: The horizon, in tokens.
            stop: Strings that end a completion where they appear.
            logprob_weight: α, the weight of a nat of log-probability against the reward.
            device: See :func:`load_language_model`.
            dtype: See :func:`load_language_model`.
            kv_budget: Bytes of key-value memory for the tree; None for a share of the free memory. A prefix whose keys
                and values were evicted keeps its outputs. Its keys and values are computed again when it is continued.
            max_prefixes: Approximate number of prefixes whose outputs are kept; the least recently used are evicted.
                None for as many as fit into an eighth of the free memory.
            hidden_layers: Decoder layers, from 0, whose states are observed beside the last one's (see
                :class:`TransformersLM`). They can be chosen for a model given by name only.
            constraint: A :class:`~qstar_decoding.envs.constraints.Constraint` on every completion, or a list of them,
                empty for none; by name, see :func:`~qstar_decoding.envs.constraints.make_constraint`. The actions of a
                state are the likeliest tokens that it allows.
            model_kwargs: Further arguments of ``from_pretrained``.

        Raises:
            ConfigurationError: An argument is out of range, a name is unknown, or the horizon is too long.
        """
        self.max_new_tokens = check_integer("max_new_tokens", max_new_tokens, meaning="the horizon")
        self.top_k = check_integer("top_k", top_k)
        self.top_p = check_number("top_p", top_p, low=0, high=1, open_low=True)
        self.logprob_weight = check_number("logprob_weight", logprob_weight, low=0, high=1e9)
        if not isinstance(model_kwargs or {}, dict):
            raise ConfigurationError(f"model_kwargs is a dict of arguments of the model's loader, got {model_kwargs!r}")
        self._stop = StopStrings(stop)
        self.stop = self._stop.strings
        model = os.fspath(model) if isinstance(model, os.PathLike) else model
        if not isinstance(given := cast("Any", model), (str, LanguageModel)):
            advice = ": wrap it in TransformersLM(model, tokenizer)" if hasattr(given, "generate") else ""
            raise ConfigurationError(
                f"model is a name, a hub id, a local folder or a LanguageModel; got {type(given).__name__}{advice}"
            )
        # The reward is resolved first, so that a misspelt name is reported before a model is loaded.
        self.reward: Reward = as_reward(reward)
        if isinstance(model, str):
            options = {**({"hidden_layers": hidden_layers} if hidden_layers else {}), **(model_kwargs or {})}
            model = load_language_model(model, device, dtype, **options)
        elif hidden_layers and tuple(hidden_layers) != model.hidden_layers:
            raise ConfigurationError("hidden_layers is for a model given by name; give it to TransformersLM")
        self.model: LanguageModel = model
        if self.max_new_tokens >= self.model.context_length:
            room = f"{self.model.name!r} takes {self.model.context_length} tokens in all"
            raise ConfigurationError(f"max_new_tokens is {max_new_tokens}, which leaves no room for a prompt: {room}")
        self._kv_budget = kv_budget
        constraint = make_constraint(constraint)
        self.constraint = None if isinstance(constraint, list) and not constraint else constraint
        self._rules = None if self.constraint is None else Rules(self.constraint, self.model, self._stop)
        least = max((one.least_tokens for one in self._rules.constraints), default=0) if self._rules else 0
        if least > self.max_new_tokens:
            raise ConfigurationError(
                f"the constraint wants at least {least} tokens, and max_new_tokens is {self.max_new_tokens}; raise it"
            )
        self._rules_of: OrderedDict[Any, Rules] = OrderedDict()  # where they differ, by prompt
        self.tree = self._new_tree(self.model.engine(kv_budget=kv_budget))
        if max_prefixes is None:
            max_prefixes = max(free_memory() // 8 // self.tree.node_bytes, 1)
        self.max_prefixes = check_integer("max_prefixes", max_prefixes)
        self._eos = np.array(sorted(self.model.eos_token_ids), dtype=np.int64)
        self._stop_tokens = np.array(sorted(self._stop.token_ids(self.model)), dtype=np.int64)
        self._encoded: dict[tuple[Any, ...], list[int]] = {}
        self._texts: dict[int, str] = {}
        self._potentials = GrowableColumns({"value": ((), np.float64)})  # per node, NaN where unknown
        self._prompts: dict[int, Prompt] = {}  # by root, the prompt that the potentials belong to
        self._token_texts: dict[int, str] = {}

    def with_empty_tree(self) -> DecodingMDP:
        """Return the same process with an empty tree on an engine of its own; model and reward are shared.

        So nothing is computed yet, and nothing that others compute helps it.
        """
        return self._like({}, self.model.new_engine(kv_budget=self._kv_budget))

    def with_changes(self, **changes: Any) -> DecodingMDP:
        """Return the process with other settings, and a tree of its own.

        It shares the language model and its memory: prefixes that both ask for are computed once.

        Args:
            changes: ``reward``, ``top_k``, ``top_p``, ``max_new_tokens``, ``stop``, ``logprob_weight``, ``constraint``
                or ``max_prefixes``; see the constructor.

        Raises:
            ConfigurationError: There is no such setting, or a value is out of range.
        """
        check_keywords("with_changes", changes, self._settings)
        return self._like(changes, self.tree.engine)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle language model and settings: the process that is made of them elsewhere has an empty tree."""
        return functools.partial(type(self), kv_budget=self._kv_budget, **self.settings()), (self.model,)

    def __deepcopy__(self, memo: dict[int, Any]) -> DecodingMDP:
        """Return the process itself; its tree is a cache, which copies of its users share."""
        return self

    def settings(self) -> dict[str, Any]:
        """Return the arguments, by name, that another process on this language model may differ in."""
        return {name: getattr(self, name) for name in self._settings}

    def _like(self, changes: dict[str, Any], engine: Engine) -> DecodingMDP:
        process = type(self)(self.model, **{**self.settings(), **changes}, kv_budget=self._kv_budget)
        if process.tree.engine is not engine:
            process.tree = process._new_tree(engine)
        return process

    def _new_tree(self, engine: Engine) -> TokenTree:
        allowed = None if self._rules is None or self._rules.of_prompt else self._rules.allowed
        return TokenTree(self.model, self._tree_top_k, self._kv_budget, allowed, engine=engine)

    @property
    def _tree_top_k(self) -> int:
        """Next tokens kept at each node of the tree."""
        return self.top_k

    # -- states -------------------------------------------------------------------------------------------------------

    def encode(self, prompt: Prompt) -> list[int]:
        """Return the prompt's token ids.

        Raises:
            PromptError: It is empty, the prompt and the horizon exceed the model's context, or an id is no token.
        """
        is_chat = not isinstance(prompt.content, str)
        key = prompt.token_ids or (is_chat, str(prompt.content), str(prompt.template))
        ids = self._encoded.get(key)  # not looked up again: another thread may evict it
        if ids is None:
            given = prompt.token_ids
            ids = self.model.encode(prompt.content, **prompt.template) if given is None else list(given)
            size, room = self.model.vocab_size, self.model.context_length - self.max_new_tokens
            if not {*map(type, ids)} <= {int, np.int64, np.int32} or not all(0 <= token < size for token in ids):
                raise PromptError(
                    f"token ids of {self.model.name!r} are integers from 0 to {size - 1}, got {ids[:20]} for the "
                    f"prompt {prompt.text[:60]!r}"
                )
            if not 0 < len(ids) <= room:
                raise PromptError(
                    f"the prompt {prompt.text[:60]!r} has {len(ids)} tokens; {self.model.name!r} takes "
                    f"{self.model.context_length}, less {self.max_new_tokens} for the "
                    f"completion: at least 1, at most {room}"
                )
            self._encoded[key] = ids
        return ids

    def roots(self, prompts: Sequence[Prompt]) -> IntArray:
        """Return the initial states of ``n`` prompts, int64 [n]."""
        return self.grow(prompts, _NOTHING, _NOTHING)[0]

    def grow(self, prompts: Sequence[Prompt], nodes: IntArray, actions: IntArray) -> tuple[IntArray, IntArray]:
        """Return the initial states of ``m`` prompts and the successors of ``n`` edges, all in one forward."""
        return grow_processes([(self, prompts, nodes, actions)])[0]

    def expand(self, nodes: IntArray, actions: IntArray) -> IntArray:
        """Return the successors of ``n`` edges, int64 [n]; unseen ones cost a forward together."""
        return self.grow([], nodes, actions)[1]

    def grow_request(self, prompts: Sequence[Prompt], nodes: IntArray, actions: IntArray) -> GrowRequest:
        """Return what :meth:`grow` asks of the tree, for :func:`grow_together`."""
        rules = [self._bound_rules(prompt) for prompt in prompts] if self._rules and self._rules.of_prompt else ()
        return GrowRequest(self.tree, [self.encode(p) for p in prompts], *self._token_edges(nodes, actions), rules)

    def draw(self, nodes: IntArray) -> Iterator[GrowRequest]:
        """Yield what must be grown, one forward after the other, before the actions of ``n`` states are known."""
        del nodes  # tokens are known with the state
        yield from ()

    def _token_edges(self, nodes: IntArray, actions: IntArray) -> tuple[IntArray, IntArray]:
        """Return the edge of the token tree that each action ends with, as its node and rank, int64 [n] each."""
        return nodes, actions

    def _bound_rules(self, prompt: Prompt) -> Rules:
        """Return the rules of one prompt; equal prompts have the same."""
        assert self._rules is not None
        try:  # equal bytes are equal values; of columns that cannot be pickled, only the prompt itself is known
            key: Any = pickle.dumps((prompt.content, prompt.columns, prompt.token_ids, prompt.template))
        except Exception:
            key = prompt
        rules = self._rules_of.pop(key, None) or self._rules.bound_to(prompt)
        self._rules_of[key] = rules
        while len(self._rules_of) > _BOUND_RULES:
            self._rules_of.popitem(last=False)
        return rules

    def _rules_at(self, nodes: IntArray) -> list[Rules]:
        """Return the rules that hold at each of ``n`` states, with a constraint."""
        assert self._rules is not None
        own = cast("dict[int, Rules]", self.tree.rules)
        return [own.get(root, self._rules) for root in self.tree.root[nodes].tolist()]

    def evict_if_full(self) -> None:
        """Evict the least recently used half of the nodes once there are more than ``max_prefixes``.

        Nodes are renumbered. Pinned nodes survive, and their holders get the new numbers (:meth:`TokenTree.pin`).
        """
        if len(self.tree) > self.max_prefixes:
            self._evict()

    def _evict(self) -> IntArray:
        """Evict the least recently used half; return the new number of each node, -1 where it was evicted."""
        new = self.tree.evict(self.max_prefixes // 2)
        self._texts = {int(new[node]): text for node, text in self._texts.items() if new[node] >= 0}
        self._prompts = {int(new[root]): prompt for root, prompt in self._prompts.items() if new[root] >= 0}
        self._potentials.keep(np.flatnonzero(new[: self._potentials.size] >= 0))
        self._encoded.clear()
        return new

    def remaining(self, nodes: IntArray) -> IntArray:
        """Return the number of tokens that may still be generated, int64 [n]."""
        return self.max_new_tokens - self.tree.depth[nodes]

    def action_mask(self, nodes: IntArray) -> npt.NDArray[np.bool_]:
        """Return the legal actions, bool [n, k]; without a constraint the most likely one is always legal."""
        probabilities = np.exp(self.tree.logprobs[nodes])
        mask = probabilities > 0
        if self.top_p < 1:  # with top_p = 1, rounding of the sum could mask tokens that are possible
            mask &= probabilities.cumsum(axis=1) - probabilities < self.top_p
        if self._rules is None:
            mask[:, 0] = True
            return mask
        # A text that the horizon or a stop string ends must satisfy the constraint; forbidden tokens have -inf.
        ends = np.isin(DecodingMDP.finishes(self, nodes), (Finish.LENGTH, Finish.STOP)) & mask
        rules = self._rules_at(nodes)
        for row in np.flatnonzero(ends.any(axis=1)).tolist():
            prefix, tokens = self.tree.completion_ids(int(nodes[row])), self.tree.tokens[nodes[row]].tolist()
            for action in np.flatnonzero(ends[row]).tolist():
                ids = [*prefix, tokens[action]]
                mask[row, action] = rules[row].accepts(self._decode(ids), self._without_end(ids))
        return mask

    def logprobs(self, nodes: IntArray) -> Values:
        """Return the log-probabilities of the actions, float64 [n, k], nats, of the full-vocabulary softmax."""
        return self.tree.logprobs[nodes].astype(np.float64)

    def omitted_logprobs(self, nodes: IntArray) -> Values:
        """Bound the log-probability of any continuation that begins with none of the k actions, float64 [n], nats.

        A token outside the top k is at most as likely as the k-th, and as all of them together. What is left for them
        is 1 less the sum of the others. Each of those, and the omitted token's own log-probability, may be too large by
        :attr:`LanguageModel.logprob_error` and the rounding of a float32.
        """
        if self.top_k >= self.model.vocab_size:
            return np.full(len(nodes), -np.inf)
        logprobs = self.logprobs(nodes)
        return np.minimum(logprobs[:, -1], logprob_left(logprobs, self.model.logprob_error))

    def edge_tokens(self, nodes: IntArray) -> IntArray:
        """Return the tokens of the actions, int64 [n, k], or [n, k, m] for actions of up to m, -1 where there is none.

        Observations describe an action by the mean of its tokens' embeddings.
        """
        return self.tree.tokens[nodes]

    def last_tokens(self, nodes: IntArray, actions: IntArray) -> IntArray:
        """Return the last token that each of ``n`` edges appends, int64 [n]."""
        return self.tree.tokens[self._token_edges(nodes, actions)]

    def edge_texts(self, nodes: IntArray, actions: IntArray) -> list[str]:
        """Return the texts that ``n`` edges append."""
        return [self.token_text(token) for token in self.tree.tokens[nodes, actions].tolist()]

    def lm_tokens(self, nodes: IntArray) -> IntArray:
        """Return the LM tokens that ``n`` states took, int64 [n]: their own prefix, and those that drew their actions.

        Where a state is a prompt, its prefix counts here, too.
        """
        return np.ones(len(nodes), dtype=np.int64)

    def lm_forwards(self, nodes: IntArray) -> int:
        """Return how many forwards ``n`` states took together."""
        del nodes
        return 1

    @property
    def most_lm_tokens(self) -> int:
        """The most LM tokens that a state can take."""
        return 1

    def actions_left(self, nodes: IntArray) -> int:
        """Return how many actions the longest text takes from one of ``n`` states; about, if actions vary in length."""
        return int(self.remaining(nodes).max(initial=0))

    def token_text(self, token: int) -> str:
        """Return the text of one token."""
        if token not in self._token_texts:
            self._token_texts[token] = self.model.decode_continuation([token])
        return self._token_texts[token]

    def text(self, node: int) -> str:
        """Return the completion so far as text."""
        return self.texts(np.array([node]))[0]

    def texts(self, nodes: IntArray) -> list[str]:
        """Return the completions so far of ``n`` states as texts."""
        new = [node for node in nodes.tolist() if node not in self._texts]
        self._texts.update(
            zip(new, map(self._decode, self.tree.completions(np.array(new, dtype=np.int64))), strict=True)
        )
        return [self._texts[node] for node in nodes.tolist()]

    def potential(self, prompts: Sequence[Prompt], nodes: IntArray) -> Values:
        """Return φ, the reward model's score of ``n`` unfinished prefixes, float64 [n]."""
        if not self.reward.has_potential:
            return np.zeros(len(nodes))
        new_rows = self._potentials.append(max(len(self.tree) - self._potentials.size, 0))
        cache = self._potentials["value"]
        cache[new_rows] = np.nan
        values: Values = cache[nodes]
        # Prompts of one text may differ in columns that the reward reads. Only the first one's potentials are cached.
        roots = self.tree.root[nodes].tolist()
        owns = np.array([_same(self._prompts.setdefault(r, p), p) for r, p in zip(roots, prompts, strict=True)], bool)
        unknown = np.flatnonzero(np.isnan(values) | ~owns)
        if len(unknown):
            ids, texts = self.tree.completions(nodes[unknown]), self.texts(nodes[unknown])
            asking = [prompts[i] for i in unknown.tolist()]
            values[unknown] = self.reward.potential([p.text for p in asking], texts, ids, **columns_of(asking))
            cacheable = unknown[owns[unknown]]
            cache[nodes[cacheable]] = values[cacheable]
        return values

    def edge_potentials(self, prompt: Prompt, node: int, actions: IntArray) -> Values:
        """Return φ of the prefixes that ``m`` edges of one state make, float64 [m], without a forward."""
        ids = self._edge_completions(np.full(len(actions), node), actions)
        same = [prompt] * len(ids)
        return self.reward.potential([p.text for p in same], [self._decode(x) for x in ids], ids, **columns_of(same))

    def reward_bound(self, prompts: Sequence[Prompt], nodes: IntArray) -> Values:
        """Return r_max(s), an upper bound of the reward of every completion of each state, float64 [n]."""
        if not self.reward.has_prefix_bounds:
            return np.full(len(nodes), self.reward.upper)
        return self._bound(prompts, self.tree.completions(nodes), self.texts(nodes), self.remaining(nodes).tolist())

    def edge_bounds(self, prompts: Sequence[Prompt], nodes: IntArray) -> Values:
        """Return r_max of the text that each edge makes, float64 [n, k], without a forward.

        Edges that end the text, and masked ones, have the reward's upper bound.
        """
        bounds = np.full((len(nodes), self.top_k), self.reward.upper)
        if not self.reward.has_prefix_bounds:
            return bounds
        row, action = np.nonzero(self.action_mask(nodes) & (self.finishes(nodes) == Finish.NO))
        if len(row):
            ids = self._edge_completions(nodes[row], action)
            remaining, asking = [self.max_new_tokens - len(x) for x in ids], [prompts[i] for i in row.tolist()]
            bounds[row, action] = self._bound(asking, ids, [self._decode(sequence) for sequence in ids], remaining)
        return bounds

    def _bound(
        self, prompts: Sequence[Prompt], ids: Sequence[Sequence[int]], texts: Sequence[str], remaining: list[int]
    ) -> Values:
        settled = [self._stop.settled(text) for text in texts]
        for i, (text, kept) in enumerate(zip(texts, settled, strict=True)):
            written = len(ids[i])
            # Tokens whose text may still be cut off, or stay, count as tokens to come.
            while text != kept and written and len(self._decode(ids[i][:written])) > len(kept):
                written -= 1
                remaining[i] += 1
        return self.reward.upper_bound([p.text for p in prompts], settled, remaining, ids, **columns_of(prompts))

    def check_can_continue(self, nodes: IntArray) -> None:
        """Check that each of ``n`` states has a legal action.

        Raises:
            ConstraintError: The constraint allows none.
        """
        if self._rules is not None and not (alive := self.action_mask(nodes).any(axis=1)).all():
            node = int(nodes[~alive][0])
            raise ConstraintError(
                f"the constraint leaves nothing to write at position {self.tree.depth[node]}, after "
                f"{self.text(node)!r}; allow more, or raise top_k or max_new_tokens"
            )

    # -- edges --------------------------------------------------------------------------------------------------------

    def finishes(self, nodes: IntArray) -> npt.NDArray[np.int8]:
        """Return for every action whether and how it ends the completion: :class:`Finish` as int8 [n, k]."""
        tokens = self.tree.tokens[nodes]
        kinds = np.where((self.remaining(nodes) <= 1)[:, None], Finish.LENGTH, Finish.NO).astype(np.int8)
        kinds = np.broadcast_to(kinds, tokens.shape).copy()
        if self.stop:
            for row, prefix in enumerate(self.tree.completions(nodes)):
                for action, token in enumerate(tokens[row]):
                    if self._stop.cut(self.model.decode_continuation([*prefix, int(token)])) is not None:
                        kinds[row, action] = Finish.STOP
        kinds[np.isin(tokens, self._stop_tokens)] = Finish.STOP
        kinds[np.isin(tokens, self._eos)] = Finish.EOS
        return kinds

    def edge_returns(self, nodes: IntArray) -> Values:
        """Return the edges' own rewards, α · log π(a | s), float64 [n, k]."""
        # α = 0 must give 0 even where a token has probability 0.
        return self.logprob_weight * np.maximum(self.logprobs(nodes), -1e6)

    def path_return(self, nodes: IntArray) -> Values:
        """Return g, the sum of the edges' own rewards since the prompt, float64 [n]."""
        return self.logprob_weight * self.tree.path_logprob[nodes]

    def complete(
        self, prompts: Sequence[Prompt], nodes: IntArray, actions: IntArray, *, score: bool = True
    ) -> list[Completion]:
        """Return the completions that ``n`` finishing edges make; their rewards are NaN unless ``score``.

        Raises:
            RewardError: The reward model did not return one number within its bounds per completion.
            InternalError: A completion breaks the constraint, which the action masks should have prevented.
        """
        if not len(nodes):
            return []
        ids = [tuple(sequence) for sequence in self._edge_completions(nodes, actions)]
        texts = [self._decode(sequence) for sequence in ids]
        rules = self._rules_at(nodes) if self._rules else []
        for rule, text, sequence in zip(rules, texts, ids, strict=bool(rules)):
            if not rule.accepts(text, self._without_end(sequence)):
                raise InternalError(f"the completion {text!r} breaks the constraint; please report this")
        kinds = self.finishes(nodes)[np.arange(len(nodes)), actions]
        ends, last = self._token_edges(nodes, actions)
        logprobs = self.tree.path_logprob[ends] + np.maximum(self.tree.logprobs[ends, last], -1e6)
        rewards = self.rewards(prompts, texts, ids) if score else np.full(len(nodes), np.nan)
        return [
            Completion(x, y, float(lp), float(r), float(self.logprob_weight * lp + r), Finish(int(kind)).name.lower())
            for x, y, lp, r, kind in zip(texts, ids, logprobs, rewards, kinds, strict=True)
        ]

    def rewards(self, prompts: Sequence[Prompt], texts: Sequence[str], ids: Sequence[Sequence[int]]) -> Values:
        """Return the reward model's score of ``n`` texts, float64 [n], NaN where it gives none.

        Raises:
            RewardError: The reward model did not return one number within its bounds per text.
        """
        return self.reward([p.text for p in prompts], list(texts), list(ids), **columns_of(prompts))

    def components(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> dict[str, Values]:
        """Return by name the parts of a composed reward for ``n`` completions, float64 [n] each.

        The completions have been scored already; no reward is called again.
        """
        texts, ids = [c.text for c in completions], [c.token_ids for c in completions]
        return self.reward.components([p.text for p in prompts], texts, ids, **columns_of(prompts))

    # -----------------------------------------------------------------------------------------------------------------

    def _edge_completions(self, nodes: IntArray, actions: IntArray) -> list[list[int]]:
        """Return the token ids of the completions so far that ``n`` edges make."""
        ends, last = self._token_edges(nodes, actions)
        tokens = self.tree.tokens[ends, last].tolist()
        return [[*prefix, token] for prefix, token in zip(self.tree.completions(ends), tokens, strict=True)]

    def _decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of a completion: no end-of-sequence token, cut off where a stop string begins."""
        text = self.model.decode_continuation(self._without_end(token_ids))
        cut = self._stop.cut(text)
        return text if cut is None else cut

    def _without_end(self, token_ids: Sequence[int]) -> list[int]:
        """Return a completion's tokens without the end-of-sequence or stop token."""
        ends = bool(token_ids) and (token_ids[-1] in self.model.eos_token_ids or token_ids[-1] in self._stop_tokens)
        return list(token_ids[:-1] if ends else token_ids)


def grow_processes(
    requests: Sequence[tuple[DecodingMDP, Sequence[Prompt], IntArray, IntArray]],
) -> list[tuple[IntArray, IntArray]]:
    """Do the work of :meth:`DecodingMDP.grow` for several processes, in as few forwards as one of them takes.

    Args:
        requests: Process, prompts, nodes [n] and actions [n] of each.
    """
    grown = grow_together([mdp.grow_request(prompts, at, actions) for mdp, prompts, at, actions in requests])
    nodes: dict[int, list[IntArray]] = {}
    for (mdp, *_), found in zip(requests, grown, strict=True):
        nodes.setdefault(id(mdp), []).extend(found)
    processes = {id(mdp): mdp for mdp, *_ in requests}
    drawing = [processes[key].draw(np.concatenate(found)) for key, found in nodes.items()]
    while drawing:
        asked = [(one, request) for one in drawing if (request := next(one, None)) is not None]
        if asked:
            grow_together([request for _, request in asked])
        drawing = [one for one, _ in asked]
    return grown


def mdp_of(env: Any) -> DecodingMDP:
    """Return the decoding MDP of an environment or of a vector environment; an MDP is returned as it is.

    Raises:
        ConfigurationError: There is none, or a wrapper changes its rewards or its horizon, which the MDP would ignore.
    """
    if isinstance(env, type):
        raise ConfigurationError(
            f"a TokenDecoding environment or a DecodingMDP is needed, got the class {env.__name__}; make one of it"
        )
    layers = [] if isinstance(env, DecodingMDP) else list(_layers(env))
    mdp = env if not layers else next((m for x in layers if isinstance(m := vars(x).get("mdp"), DecodingMDP)), None)
    if any("processes" in vars(layer) for layer in layers):  # SubprocVecEnv, AsyncVectorEnv
        raise ConfigurationError(
            f"the environments of {type(env).__name__} live in other processes, where no planner can search; "
            "use TokenDecodingVecEnv, gym.make_vec or DummyVecEnv"
        )
    if mdp is None and hasattr(env, "get_attr"):
        with contextlib.suppress(AttributeError):
            mdp = env.get_attr("mdp")[0]
    if not isinstance(mdp, DecodingMDP):
        kind = type(getattr(env, "unwrapped", env)).__name__
        raise ConfigurationError(f"a TokenDecoding environment or a DecodingMDP is needed, got {kind}")
    for layer in layers:
        name, limit = type(layer).__name__, getattr(layer, "_max_episode_steps", None)
        if isinstance(layer, _REWARD_WRAPPERS) or getattr(layer, "norm_reward", False) is True:
            raise ConfigurationError(
                f"{name} changes the rewards, so that their sum is no longer J; give the environment without it, and "
                "change the reward model instead (reward=…, logprob_weight=…)"
            )
        if isinstance(layer, gym.wrappers.TimeLimit) and limit is not None and limit < mdp.max_new_tokens:
            raise ConfigurationError(
                f"TimeLimit cuts episodes off after {limit} of {mdp.max_new_tokens} tokens; "
                f"give the environment max_new_tokens={limit} instead, which ends them with a reward"
            )
    return mdp


# VecNormalize of stable-baselines3 is known by its attribute norm_reward: importing it would load torch.
_VECTOR_WRAPPERS = (gym.vector.VectorRewardWrapper, gym.wrappers.vector.NormalizeReward)
_REWARD_WRAPPERS = (gym.RewardWrapper, gym.wrappers.NormalizeReward, *_VECTOR_WRAPPERS)


def _layers(env: Any) -> Iterator[Any]:
    """Yield an environment, those inside its wrappers, and those inside a vector environment of this process."""
    if hasattr(env, "__dict__"):
        yield env
        inside = vars(env)
        several = inside["envs"] if isinstance(inside.get("envs"), (list, tuple)) else ()
        for part in (inside.get("env"), inside.get("venv"), *several):
            yield from _layers(part)


def _same(one: Prompt, other: Prompt) -> bool:
    return one is other or (one.text == other.text and not one.columns and not other.columns)
