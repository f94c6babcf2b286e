"""Bodies: what a request may say, field by field, and what an error answers, both in OpenAI's shapes.

Every field of OpenAI's is here: those that are supported, and the values of the others that ask for nothing.
All else is an error that names the field.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from starlette.responses import JSONResponse

from ..checks import first_line
from ..errors import (
    CheckpointError,
    ConfigurationError,
    ConstraintError,
    DeadlineError,
    EngineClosedError,
    PromptError,
    QStarError,
    QueueFullError,
    UnknownNameError,
)
from ..rewards.types import RESERVED_COLUMNS

__all__ = [
    "ApiError",
    "Body",
    "ChatBody",
    "CompletionBody",
    "Format",
    "Limits",
    "QStarBody",
    "as_api_error",
    "busy",
    "invalid",
    "read_body",
]

# By kind of an unknown name, the field that names it.
_FIELDS = {"reward": "qstar.reward", "decoder": "qstar.decoder"}
_MOST_STOPS, _MOST_PROMPTS = 16, 128

# Fields that are not supported, with the values that ask for nothing. None asks for nothing anywhere.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": ("none",),
    "functions": ([],),
    "metadata": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "prompt_cache_key": (),
    "prompt_cache_retention": (),
    "reasoning_effort": (),
    "safety_identifier": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}
# The same for the fields of a message.
_NEUTRAL_IN_MESSAGES: dict[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "name": (),
    "reasoning_content": (),
    "refusal": (),
    "tool_calls": ([],),
}


# -- errors ---------------------------------------------------------------------------------------------------------


class ApiError(Exception):
    """Raised when a request is refused or fails; its body is what the ``openai`` clients expect."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
        headers: dict[str, str] | None = None,
    ) -> None:
        """Describe the error.

        Args:
            status: The HTTP status.
            message: In one line: the cause, the expected value and the remedy.
            param: The field at fault.
            code: OpenAI's code, such as ``"model_not_found"``.
            kind: OpenAI's type.
            headers: Further headers of the response.
        """
        super().__init__(message)
        self.status, self.headers = status, headers or {}
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> JSONResponse:
        """Return the response."""
        return JSONResponse(self.body, self.status, headers=self.headers)


def invalid(param: str | None, message: str, *, code: str | None = None) -> ApiError:
    """Return the error of a field that cannot be met, status 400; the message begins with the field."""
    return ApiError(400, f"{param}: {message}" if param else message, param=param, code=code)


def busy(message: str, seconds: int = 1) -> ApiError:
    """Return the error of a server that has too much to do, status 429."""
    headers = {"Retry-After": str(seconds)}
    return ApiError(429, message, code="rate_limit_exceeded", kind="rate_limit_error", headers=headers)


def as_api_error(error: Exception, param: str | None = None) -> ApiError:
    """Return any error as one of the server's; ``param`` is the field that was being read."""
    message = " ".join(str(error).split())
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        return busy("too many requests wait already; ask again later")
    if isinstance(error, DeadlineError):
        return ApiError(503, message, code="too_late", kind="server_error", headers={"Retry-After": "5"})
    if isinstance(error, EngineClosedError):
        return ApiError(503, "the server is shutting down", kind="server_error", headers={"Retry-After": "5"})
    if isinstance(error, UnknownNameError):
        return ApiError(400, message, param=_FIELDS.get(error.kind, param))
    if isinstance(error, (ConfigurationError, PromptError, ConstraintError, CheckpointError)):
        return ApiError(400, message, param=param)
    if isinstance(error, QStarError):
        return ApiError(500, message, kind="server_error")
    return ApiError(500, f"{type(error).__name__}: {first_line(error)}"[:500], kind="server_error")


# -- fields ---------------------------------------------------------------------------------------------------------


class Strict(BaseModel):
    """A part of a body: no unknown fields, and no text where a number is meant."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


def _stop(value: Any) -> Any:
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or not all(isinstance(string, str) and string for string in strings):
        raise ValueError("a non-empty string or a list of them is needed")
    if len(strings) > _MOST_STOPS:
        raise ValueError(f"at most {_MOST_STOPS} strings are taken, got {len(strings)}")
    return tuple(strings)


def _columns(value: Any) -> Any:
    if taken := sorted(RESERVED_COLUMNS & value.keys()):
        raise ValueError(f"a reward has an argument of the name {taken[0]!r}; rename it, as to 'data_{taken[0]}'")
    return value


def _prompts(value: Any) -> Any:
    """Return a list of prompts, each a string or a list of token ids."""
    is_ids = isinstance(value, list) and bool(value) and all(type(item) is int for item in value)
    prompts = [value] if isinstance(value, str) or is_ids else value
    good = isinstance(prompts, list) and all(
        isinstance(prompt, str) or (isinstance(prompt, list) and prompt and all(type(item) is int for item in prompt))
        for prompt in prompts
    )
    if not good or not prompts:
        raise ValueError("a string, a list of strings, a list of token ids, or a list of lists of token ids is needed")
    if len(prompts) > _MOST_PROMPTS:
        raise ValueError(f"at most {_MOST_PROMPTS} prompts are taken, got {len(prompts)}")
    return prompts


def _bias(value: Mapping[str, float]) -> dict[int, float]:
    if not all(token.isascii() and token.isdecimal() and len(token) < 10 for token in value):
        raise ValueError("the keys are token ids, such as {'50': -100}")
    if not all(-100 <= number <= 100 for number in value.values()):
        raise ValueError("the values are numbers from -100 to 100")
    return {int(token): number for token, number in value.items()}


def _content(value: Any) -> Any:
    """Return a message's content as one text."""
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list):
        raise ValueError("a string or a list of parts {'type': 'text', 'text': …} is needed")
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else part
        if kind != "text" or set(part) != {"type", "text"} or not isinstance(part["text"], str):
            raise ValueError(
                f"only parts {{'type': 'text', 'text': …}} are supported, got one of type {str(kind)[:40]!r}"
            )
        texts.append(part["text"])
    return "\n".join(texts)


class Message(Strict):
    """A message of a chat; the model continues the last one if it is the assistant's."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_content)]


class Schema(Strict):
    """The JSON schema of a ``response_format``."""

    name: str = ""
    description: str | None = None
    strict: bool | None = None
    schema_: dict[str, Any] = Field(alias="schema")


class Format(Strict):
    """What the text has to be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: Schema | None = None


class Limits(Strict):
    """Conditions on the text, all of which hold.

    Attributes:
        regex: The whole text matches.
        json_schema: The whole text is JSON that follows the schema.
        grammar: The whole text is a sentence of this grammar, in Lark's notation or in GBNF.
        banned: None of these strings appears.
        forced: Each of these strings appears.
        min_tokens: The least number of tokens.
    """

    regex: str | None = Field(default=None, min_length=1, max_length=2000)
    json_schema: dict[str, Any] | None = None
    grammar: str | None = Field(default=None, min_length=1, max_length=20_000)
    banned: list[str] | None = Field(default=None, min_length=1, max_length=100)
    forced: list[str] | None = Field(default=None, min_length=1, max_length=20)
    min_tokens: int | None = Field(default=None, ge=1)


class QStarBody(Strict):
    """What is searched for, and how; None leaves a setting as the model's name has it.

    Attributes:
        decoder: A name of ``qstar decoders``.
        reward: A weighted sum of registered rewards.
        q: A Q-function of the server's, or ``"none"``.
        budget: LM tokens.
        seconds: A deadline.
        reward_calls: The most texts that are scored.
        gap: Stop once UB - LB is at most this.
        target: Stop once J is at least this.
        patience: Stop after so many LM tokens without a better text.
        logprob_weight: α.
        top_k: Number k of next tokens considered.
        n: Of samplers, how many texts are drawn; of others, how many of the best are searched for.
        constraint: Conditions on the text.
        columns: Fields of the prompt that rewards read, such as ``keywords`` or ``answer``.
        improvements: Whether better texts are sent as events while the search goes on.
    """

    decoder: str | None = None
    reward: str | None = Field(default=None, min_length=1, max_length=1000)
    q: str | None = None
    budget: int | None = Field(default=None, ge=1)
    seconds: float | None = Field(default=None, gt=0)
    reward_calls: int | None = Field(default=None, ge=1)
    gap: float | None = Field(default=None, ge=0)
    target: float | None = None
    patience: int | None = Field(default=None, ge=1)
    logprob_weight: float | None = Field(default=None, ge=0)
    top_k: int | None = Field(default=None, ge=1, le=64)
    n: int | None = Field(default=None, ge=1, le=1024)
    constraint: Limits | None = None
    columns: Annotated[dict[str, Any], AfterValidator(_columns)] | None = None
    improvements: bool | None = None


class StreamOptions(Strict):
    """Options of a stream."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Body(Strict):
    """The fields that both endpoints have."""

    model: str = Field(min_length=1, max_length=300)
    max_tokens: int | None = Field(default=None, ge=0)
    n: int | None = Field(default=None, ge=1, le=128)
    stop: Annotated[Any, AfterValidator(lambda value: () if value is None else _stop(value))] = ()
    seed: int | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: Annotated[dict[str, float], AfterValidator(_bias)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(default=None, max_length=1000)
    qstar: QStarBody | None = None

    @property
    def choices(self) -> int:
        """How many texts are asked for, of each prompt."""
        return self.n or 1

    @property
    def bias(self) -> dict[int, float]:
        """The logit bias by token."""
        given: Any = self.logit_bias or {}
        return dict(given)


class ChatBody(Body):
    """The body of ``/v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    response_format: Format | None = None


class CompletionBody(Body):
    """The body of ``/v1/completions``."""

    prompt: Annotated[Any, AfterValidator(_prompts)]
    best_of: int | None = Field(default=None, ge=1)
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=20)
    return_tokens_as_token_ids: bool | None = None


_Kind = TypeVar("_Kind", bound=Body)


def read_body(kind: type[_Kind], raw: bytes) -> _Kind:
    """Return the body of a request.

    Raises:
        ApiError: It is no JSON object, or a field is unknown, not supported, or out of range; the first is named.
    """
    try:
        content = json.loads(raw, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ApiError(400, f"the body is not JSON: {reason}") from None
    if not isinstance(content, dict):
        raise ApiError(400, "the body is a JSON object")
    content = _without_neutral(content, _NEUTRAL, "")
    if kind is ChatBody and isinstance(content.get("messages"), list):
        content["messages"] = [
            _without_neutral(message, _NEUTRAL_IN_MESSAGES, f"messages.{place}.")
            if isinstance(message, dict)
            else message
            for place, message in enumerate(content["messages"])
        ]
    try:
        body = kind.model_validate(content)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            message = "there is no such field here"
        raise invalid(place, message) from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None
    _check(body)
    return body


def _check(body: Body) -> None:
    """Refuse fields that contradict each other."""
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options", "it is for streams; set stream to true")
    if isinstance(body, ChatBody):
        if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
            raise invalid("max_completion_tokens", "it differs from max_tokens, its old name; give one of them")
        if body.top_logprobs and not body.logprobs:
            raise invalid("top_logprobs", "it needs logprobs to be true")
        if body.max_tokens == 0:
            raise invalid("max_tokens", "at least 1 is needed")
        asked = body.response_format
        if asked is not None and (asked.type == "json_schema") != (asked.json_schema is not None):
            raise invalid("response_format.json_schema", "it is given with the type 'json_schema', and with no other")
    if isinstance(body, CompletionBody) and body.best_of not in (None, body.choices):
        raise invalid("best_of", "it is not supported; the models best-of-n/… draw several texts and keep the best")


def _without_neutral(content: Mapping[str, Any], neutral: Mapping[str, tuple[Any, ...]], place: str) -> dict[str, Any]:
    """Return an object without the unsupported fields that ask for nothing.

    Raises:
        ApiError: One asks for something.
    """
    for name, values in neutral.items():
        value = content.get(name)
        if value is not None and not any(type(value) is type(other) and value == other for other in values):
            raise invalid(place + name, "it is not supported; leave it out")
    return {name: value for name, value in content.items() if name not in neutral}


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
