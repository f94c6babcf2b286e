"""Catalogue of the models that a server offers: the language model itself, decoders on it, and searches with a Q."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..agents.heuristics import BoundHeuristic, Heuristic
from ..agents.learning.checkpoints import pretrained_names
from ..agents.learning.online.learner import OnlineLearner
from ..agents.learning.q_heuristic import QHeuristic, carried_weight
from ..agents.planning.decoder import Decoder
from ..agents.planning.engine import SearchEngine
from ..agents.planning.registry import DECODERS, by_command, decoder_options, make_decoder
from ..agents.planning.sampling import SamplingDecoder
from ..agents.search.budget import Budget
from ..envs.constraints import (
    BannedStrings,
    Constraint,
    ForcedStrings,
    GrammarConstraint,
    JSONConstraint,
    MinTokens,
    RegexConstraint,
)
from ..errors import QStarError
from ..rewards import registry, reward_names
from ..rewards.specs import Call, Made, Terms, parse_spec
from ..tasks import load_task
from .bodies import ApiError, Body, Format, Limits, QStarBody, as_api_error, invalid

__all__ = ["Catalogue", "Entry", "Search", "constraints_of"]

_BUDGET = 200  # LM tokens, where a request names none
_BEST_OF_N = "best-of-n"  # the field's name of the decoder that is called "sample" here
# Rewards whose arguments can only be words and numbers. Those of others may name folders or models.
_WITH_SAFE_ARGUMENTS = ("distinct", "forbidden_words", "length", "repetition", "short_sentences")
_CONSTRAINTS: dict[str, Callable[[Any], Constraint]] = {
    "regex": RegexConstraint,
    "json_schema": JSONConstraint,
    "grammar": GrammarConstraint,
    "banned": lambda strings: BannedStrings(*strings),
    "forced": lambda strings: ForcedStrings(*strings),
    "min_tokens": MinTokens,
}


@dataclass(frozen=True)
class Entry:
    """One model of the catalogue.

    Attributes:
        id: Its name.
        description: In one sentence.
        decoder: The decoder; None draws tokens as the language model has them.
        q: The name of the Q-function that orders the search; None for none.
        settings: Settings of the process, such as the reward.
        planner: Arguments of the planner.
        learner: Learns from its searches, where they are by ``decoder`` with ``q``; None for none.
    """

    id: str
    description: str
    decoder: str | None = None
    q: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    planner: Mapping[str, Any] = field(default_factory=dict)
    learner: OnlineLearner | None = None


@dataclass(frozen=True)
class Search:
    """A search, checked and ready to begin.

    Attributes:
        decoder: The decoder, with all settings.
        name: The decoder's name.
        budget: When it stops.
        columns: Fields of the prompt that rewards read.
        improvements: Whether better texts are reported on the way.
    """

    decoder: Decoder
    name: str
    budget: Budget
    columns: Mapping[str, Any]
    improvements: bool


class Catalogue:
    """The models that a server offers."""

    def __init__(
        self,
        engine: SearchEngine,
        *,
        q: Mapping[str, str] | None = None,
        learner: OnlineLearner | None = None,
        budget: int,
        seconds: float,
    ) -> None:
        """List them.

        Args:
            engine: Runs the searches; its process has the settings of searches that name none.
            q: Q-functions of the operator's, by name: folders, or what :class:`QHeuristic` takes.
            learner: Learns from the searches of the model ``qstar-learned``; None for no such model.
            budget: The most LM tokens of a search.
            seconds: The most seconds of a search.

        Raises:
            QStarError: A Q-function of the operator's cannot be loaded, or belongs to another language model.
        """
        self.engine, self.created = engine, int(time.time())
        self._most_budget, self._most_seconds, self.learner = budget, seconds, learner
        self._heuristics: dict[str, Callable[[], Heuristic]] = {}  # by the name of the Q
        model = engine.mdp.model.name
        self._entries = {model: Entry(model, "The language model: each token is drawn from all of its vocabulary.")}
        for name in sorted(pretrained_names()):
            self._add_shipped(name)
        for name, source in (q or {}).items():
            self._add(name, QHeuristic(source), f"A* with the Q-function {name!r} of this server.", {}, {})
        if learner is not None:
            text = f"A* with a Q that learns from every search for {engine.mdp.reward.name!r}."
            self._before = self._given()
            self._entries["qstar-learned"] = Entry("qstar-learned", text, "astar", "learned", learner=learner)
            self._heuristics["learned"] = learner.newest
        for name in [*DECODERS, _BEST_OF_N]:
            command = "sample" if name == _BEST_OF_N else name
            source = by_command(command).source
            entry = Entry(f"{name}/{model}", f"{by_command(command).kind.__name__} ({source}).", command)
            self._entries[entry.id] = entry

    def _given(self) -> Heuristic:
        """Return the shipped Q that knows most of the engine's own reward; the bound where none knows any of it."""
        weights = {
            name: carried_weight(self._entries[f"qstar-{name}"].settings["reward"], self.engine.mdp.reward)
            for name in pretrained_names()
            if name in self._heuristics
        }
        for name in sorted((name for name in weights if weights[name]), key=lambda name: -weights[name]):
            with contextlib.suppress(QStarError):  # it was trained for another k
                heuristic = self._heuristics[name]()
                assert isinstance(heuristic, QHeuristic)
                heuristic.check(self.engine.mdp)
                return heuristic
        return BoundHeuristic()

    def _add_shipped(self, name: str) -> None:
        task = load_task(name)
        names = ("reward", "top_k", "max_new_tokens", "stop", "logprob_weight", "constraint")
        settings = {key: task.env[key] for key in names if key in task.env}
        try:
            self._add(name, QHeuristic(name), f"A* with the shipped Q: {task.description}", settings, task.planner)
        except QStarError:
            return  # it belongs to another language model, or its reward needs a library that is not there

    def _add(
        self, name: str, heuristic: QHeuristic, description: str, settings: dict[str, Any], planner: Mapping[str, Any]
    ) -> None:
        trained = heuristic.q.spec
        if "top_k" not in settings and trained is not None:
            settings = {**settings, "top_k": trained.top_k}
        heuristic.check(self.engine.decoder.processes.get(**settings))
        self._heuristics[name] = lambda: heuristic
        self._entries[f"qstar-{name}"] = Entry(f"qstar-{name}", description, "astar", name, settings, planner)

    @property
    def entries(self) -> list[Entry]:
        """All models, the language model first."""
        return [*self._entries.values()]

    def find(self, name: str) -> Entry:
        """Return a model.

        Raises:
            ApiError: There is none of that name, status 404.
        """
        if name not in self._entries:
            known = ", ".join(self._entries)
            message = f"model: there is no {name[:100]!r}; there are {known}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return self._entries[name]

    def search(self, entry: Entry, body: Body, most: int | None, constraints: tuple[Constraint, ...]) -> Search | None:
        """Return the search that a request asks for; None where it asks for none.

        Args:
            entry: The model.
            body: The request.
            most: The most tokens of a text; None for as many as the model's settings say.
            constraints: Conditions on the text.

        Raises:
            ApiError: A field cannot be met.
        """
        asked = body.qstar
        if asked is None and entry.decoder is None:
            return None
        asked = asked or QStarBody()
        command = self._command(entry, asked)
        _refuse_sampling(body, command)
        heuristic, planner = self._heuristic(entry, asked, command)
        if asked.budget is not None and asked.budget > self._most_budget:
            raise invalid(
                "qstar.budget", f"at most {self._most_budget:,} LM tokens are spent here, got {asked.budget:,}"
            )
        if asked.seconds is not None and asked.seconds > self._most_seconds:
            raise invalid("qstar.seconds", f"at most {self._most_seconds:g} are allowed here, got {asked.seconds:g}")
        if asked.n is not None and asked.n < body.choices:
            raise invalid("qstar.n", f"it is at least n, {body.choices}, got {asked.n}")
        if asked.reward is not None:
            check_reward(asked.reward)
        options = decoder_options(command, planner, heuristic, _seed(body))
        learner = entry.learner if asked.q is None and command == entry.decoder else None
        if learner is not None:
            options |= {"heuristic": self._before, "learn": learner}
        if issubclass(DECODERS[command], SamplingDecoder):
            given = {"temperature": body.temperature, "top_p": body.top_p}
            options |= {name: value for name, value in given.items() if value is not None}
        changes: dict[str, Any] = {**entry.settings}
        changes |= {"reward": asked.reward or changes.get("reward"), "top_k": asked.top_k or changes.get("top_k")}
        if asked.logprob_weight is not None:
            changes["logprob_weight"] = asked.logprob_weight
        if most is not None:
            changes["max_new_tokens"] = most
        if body.stop:
            changes["stop"] = body.stop
        if constraints:
            changes["constraint"] = list(constraints)
        try:
            decoder = make_decoder(command, self.engine.mdp, **options)
            decoder.processes = self.engine.decoder.processes  # so that equal settings share their trees
        except QStarError as error:
            raise as_api_error(error, "qstar") from error
        try:
            decoder = decoder.with_changes(**changes)
        except QStarError as error:
            raise as_api_error(error, _field_of(decoder, changes, body)) from error
        try:
            if learner is not None and not learner.fits(decoder.mdp):
                # Another reward, α, k or constraint: its searches teach nothing.
                decoder = decoder.with_changes(heuristic=learner.newest())
            tokens = asked.budget or min(max(_BUDGET, 8 * decoder.mdp.max_new_tokens), self._most_budget)
            decoder = decoder.with_changes(n=asked.n or _texts(decoder, body.choices, tokens))
        except QStarError as error:
            raise as_api_error(error, "qstar") from error
        limits = {name: getattr(asked, name) for name in ("seconds", "reward_calls", "gap", "target", "patience")}
        budget = Budget(lm_tokens=tokens, **limits)
        return Search(decoder, command, budget, asked.columns or {}, bool(asked.improvements))

    def _command(self, entry: Entry, asked: QStarBody) -> str:
        name = asked.decoder
        if name is None:
            return entry.decoder or "astar"
        command = "sample" if name == _BEST_OF_N else name
        if command not in DECODERS:
            known = ", ".join([*DECODERS, _BEST_OF_N])
            raise invalid("qstar.decoder", f"there is no {name[:100]!r}; there are {known}")
        if entry.decoder not in (None, command) and entry.q is None:
            raise invalid("qstar.decoder", f"the model {entry.id!r} names another decoder, {entry.decoder!r}")
        return command

    def _heuristic(self, entry: Entry, asked: QStarBody, command: str) -> tuple[Heuristic | None, Mapping[str, Any]]:
        """Return the heuristic of a search, and the planner's arguments that were chosen for it."""
        name = entry.q if asked.q is None else None if asked.q == "none" else asked.q
        if name is not None and name not in self._heuristics:
            known = ", ".join([*self._heuristics, "none"])
            raise invalid("qstar.q", f"there is no {name[:100]!r}; there are {known}")
        if by_command(command).uses != "q":
            if asked.q not in (None, "none"):
                raise invalid("qstar.q", f"the decoder {command!r} uses no Q-function")
            return None, {}
        if name is None:
            return BoundHeuristic(), {}
        # What was chosen for a task holds for its own reward.
        planner = entry.planner if asked.reward is None and name == entry.q else {}
        return self._heuristics[name](), planner


def _field_of(decoder: Decoder, changes: Mapping[str, Any], body: Body) -> str:
    """Return the field of the first change that cannot be made after those before it."""
    by_format = getattr(body, "response_format", None) is not None
    fields = {
        "top_k": "qstar.top_k",  # first, since a Q-function fits one k only
        "max_new_tokens": "max_tokens",
        "stop": "stop",
        "logprob_weight": "qstar.logprob_weight",
        "reward": "qstar.reward",
        "constraint": "response_format" if by_format else "qstar.constraint",
    }
    made: dict[str, Any] = {}
    for name, place in fields.items():
        made |= {name: changes[name]} if name in changes else {}
        try:
            decoder.with_changes(**made)
        except QStarError:
            return place
    return "qstar"


def _texts(decoder: Decoder, choices: int, tokens: int) -> int | None:
    """Return the library's n: of samplers, the texts that are drawn; of others, how many of the best are wanted."""
    if not isinstance(decoder, SamplingDecoder):
        return choices
    # As many as the budget pays for, which may be more than it seems; but no choice is left out.
    return None if tokens // max(decoder.mdp.max_new_tokens - 1, 1) >= choices else choices


def _seed(body: Body) -> int:
    return (body.seed or 0) % (1 << 63)


def _refuse_sampling(body: Body, command: str) -> None:
    """Refuse fields of plain sampling that a search would ignore."""
    if body.bias:
        raise invalid("logit_bias", "it is for plain sampling; a search takes qstar.constraint")
    for name in ("presence_penalty", "frequency_penalty"):
        if getattr(body, name):
            raise invalid(name, "it is for plain sampling; a search takes the reward 'repetition' or 'distinct'")
    if issubclass(DECODERS[command], SamplingDecoder):
        if body.temperature == 0:
            raise invalid("temperature", f"the decoder {command!r} draws, so it is more than 0")
        if body.top_p == 0:
            raise invalid("top_p", f"the decoder {command!r} draws, so it is more than 0")
        return
    if body.temperature not in (None, 0, 1):
        raise invalid("temperature", f"the decoder {command!r} draws nothing; leave it out, or give 0 or 1")
    if body.top_p not in (None, 1):
        raise invalid("top_p", f"the decoder {command!r} draws nothing; leave it out, or give 1")


def check_reward(spec: str) -> None:
    """Check that a reward names nothing but registered rewards: no folder, no model, no code.

    Raises:
        ApiError: It does, or it cannot be read.
    """
    known = [name for name in reward_names() if name not in registry.WITH_ARGUMENTS or name in _WITH_SAFE_ARGUMENTS]
    try:
        terms = parse_spec(spec, known)
    except QStarError as error:
        raise as_api_error(error, "qstar.reward") from None
    _check_terms(terms)


def _check_terms(terms: Terms) -> None:
    for _, term in terms:
        if isinstance(term, Call):
            for inner in term.rewards:
                _check_terms(inner)
        elif isinstance(term, Made):
            plain = all(isinstance(argument, (str, int, float)) for argument in term.arguments)
            if term.name not in _WITH_SAFE_ARGUMENTS or term.options or not plain:
                allowed = ", ".join(_WITH_SAFE_ARGUMENTS)
                raise invalid(
                    "qstar.reward", f"{term.name!r} takes no arguments here; only {allowed} take words or numbers"
                )


def constraints_of(response: Format | None, limits: Limits | None) -> tuple[Constraint, ...]:
    """Return the conditions on the text that a request states.

    Raises:
        ApiError: One cannot be followed.
    """
    asked: list[tuple[str, Callable[[], Constraint]]] = []
    if response is not None and response.json_schema is not None:
        schema = response.json_schema.schema_
        asked.append(("response_format.json_schema.schema", lambda: JSONConstraint(schema)))
    elif response is not None and response.type == "json_object":
        asked.append(("response_format", lambda: JSONConstraint({"type": "object"})))
    for name, make in _CONSTRAINTS.items():
        if limits is not None and (value := getattr(limits, name)) is not None:
            asked.append((f"qstar.constraint.{name}", functools.partial(make, value)))
    found = []
    for param, make_one in asked:
        try:
            found.append(make_one())
        except QStarError as error:
            raise as_api_error(error, param) from None
    return tuple(found)
