"""Client of a completions API: requests, retries, and the ways in which servers write log-probabilities."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from pydantic import SecretStr

from ...checks import first_line
from ...errors import ConfigurationError, ServerError

if TYPE_CHECKING:
    import urllib3

__all__ = ["APIUsage", "Answer", "CompletionsClient"]

_LONGEST_WAIT = 60  # seconds between two tries, whatever a server asks for
_SHOWN = 200  # characters of a server's message
_RETRIED = (408, 429, 500, 502, 503, 504)
# Settings that leave the distribution of the next token as the model states it, and have tokens named by their ids.
# Strict servers refuse what they do not know, so fewer are sent to them.
_BY_ID = {"return_tokens_as_token_ids": True}
_EXTENSIONS: tuple[Mapping[str, Any], ...] = (
    {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, **_BY_ID},
    _BY_ID,
    {},
)
_KEPT = "what the search has is kept: plan again when the server is back"
_IMPOSSIBLE = -1e30  # nats; llama.cpp writes the smallest float for a probability of 0
_ROUNDING = 1e-3  # by which a probability may exceed 1


@dataclass
class APIUsage:
    """Tokens and requests that a server has charged for.

    Attributes:
        requests: Requests answered.
        retries: Tries beyond the first, of all requests.
        prompt_tokens: Tokens of the prompts.
        cached_tokens: Those of them that the server had in its prefix cache, as far as it says so.
        completion_tokens: Tokens generated.
    """

    requests: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0


class Answer(NamedTuple):
    """The answer to a completion request.

    Attributes:
        ranked: The likeliest first tokens with their log-probabilities, nats, most likely first; empty where the server
            states none.
        tokens: The tokens generated, as far as the server tells their ids.
        text: Their text.
        prompt_tokens: Number of tokens of the prompt; None where the server does not tell.
    """

    ranked: list[tuple[int, float]]
    tokens: list[int]
    text: str
    prompt_tokens: int | None


class CompletionsClient:
    """Sends requests to one server, from any number of threads; connections are kept and bounded.

    Attributes:
        url: The address, without the paths of the API's functions.
        usage: Tokens and requests so far.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None,
        key_hint: str,
        timeout: float,
        retries: int,
        max_connections: int,
        token_id: Callable[[str], int | None],
    ) -> None:
        """Prepare the connections; nothing is sent.

        Args:
            url: The address, such as ``http://127.0.0.1:8080/v1``.
            api_key: Sent as a bearer token; None for none.
            key_hint: Advice for servers that refuse the key.
            timeout: Seconds to wait for an answer, for each try.
            retries: Tries after the first one.
            max_connections: Connections at the same time.
            token_id: Returns the only token with a text; None where there is none, or several.

        Raises:
            ConfigurationError: The address is not one of HTTP, or urllib3 is not installed.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ConfigurationError(f"base_url is an address such as 'http://127.0.0.1:8080/v1', got {url!r}")
        if parts.username is not None:
            raise ConfigurationError("base_url has a user name or password in it; give the key as api_key instead")
        self.url, self.usage = url.rstrip("/"), APIUsage()
        self._api_key = SecretStr(api_key or "")  # shown as stars, wherever it is printed
        self._key_hint, self._token_id = key_hint, token_id
        self._extensions = _EXTENSIONS  # the first is used, until the server refuses it
        self._lock = threading.Lock()
        self._pool = _connections(api_key, timeout, retries, max_connections)

    def models(self) -> list[dict[str, Any]]:
        """Return the server's models as it describes them; empty where it has no list.

        Raises:
            ServerError: The server does not answer, or refuses.
        """
        status, answer = self._request("GET", "models")
        if status == 404:
            return []
        if status != 200:
            raise self._refused(status, answer)
        listed = answer.get("data") if isinstance(answer, dict) else None
        return [model for model in listed if isinstance(model, dict)] if isinstance(listed, list) else []

    def complete(
        self,
        model: str,
        prompt: str | Sequence[int],
        top_k: int,
        *,
        max_tokens: int = 1,
        sampled: int | None = None,
    ) -> Answer:
        """Ask for the ``top_k`` likeliest next tokens of a prompt, and for ``max_tokens`` sampled ones.

        Args:
            model: The model's name on the server.
            prompt: Token ids, or a text.
            top_k: Number of log-probabilities.
            max_tokens: Number of tokens to sample.
            sampled: A token that sampling is to prefer to all others; None for none.

        Raises:
            ServerError: The server does not answer, refuses, or answers with something else.
        """
        body: dict[str, Any] = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "logprobs": top_k}
        body |= {"temperature": 1.0, "top_p": 1.0}
        if sampled is not None:
            body["logit_bias"] = {str(sampled): 100}
        allowed = self._extensions
        for refused, extensions in enumerate(allowed):
            status, answer = self._request("POST", "completions", {**body, **extensions})
            if status not in (400, 422):
                self._extensions = allowed[refused:]
                break
        if status != 200:
            raise self._refused(status, answer)
        try:
            return self._read(answer)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise self._broken(f"its answer has no log-probabilities of tokens ({first_line(error)})") from error

    def _request(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> tuple[int, Any]:
        """Return the status and the JSON value of an answer; other content only with an error's status."""
        import urllib3

        try:
            response = self._pool.request(
                method, f"{self.url}/{path}", body=None if body is None else json.dumps(body).encode()
            )
        except urllib3.exceptions.HTTPError as error:
            cause = getattr(error, "reason", None) or error
            raise self._error(
                f"does not answer ({type(cause).__name__}: {first_line(cause)}); {_KEPT}"
            ) from None  # the connection's own error would repeat headers and addresses
        tries = response.retries.history if response.retries else ()
        try:
            answer = json.loads(response.data)
        except ValueError:
            answer = response.data[:_SHOWN].decode(errors="replace")
            if response.status == 200:
                raise self._broken(f"it is no JSON: {answer!r}") from None
        usage = answer.get("usage") if isinstance(answer, dict) else None
        usage = usage if isinstance(usage, dict) else {}
        details = usage.get("prompt_tokens_details")
        with self._lock:
            self.usage.requests += 1
            self.usage.retries += len(tries)
            self.usage.prompt_tokens += _count(usage, "prompt_tokens")
            self.usage.completion_tokens += _count(usage, "completion_tokens")
            self.usage.cached_tokens += _count(details, "cached_tokens")
        return response.status, answer

    def _read(self, answer: Any) -> Answer:
        choice = answer["choices"][0]
        logprobs, usage = choice["logprobs"], answer.get("usage") or {}
        if logprobs is None or not logprobs.get("content", logprobs.get("top_logprobs", [None])):
            listed, tokens = [], []
        elif "content" in logprobs:  # llama.cpp, and the format of chats
            listed = [(self._id(entry), entry["logprob"]) for entry in logprobs["content"][0]["top_logprobs"]]
            tokens = [entry.get("id") for entry in logprobs["content"]]
        else:
            first = logprobs["top_logprobs"][0]
            listed = [(self._id({"token": token}), logprob) for token, logprob in first.items()]
            tokens = [_numbered(token) for token in logprobs["tokens"]]
        ranked = sorted(((token, _logprob(value)) for token, value in listed), key=lambda entry: (-entry[1], entry[0]))
        if len({token for token, _ in ranked}) < len(ranked):
            raise ValueError("one token is listed twice")
        if sum(math.exp(logprob) for _, logprob in ranked) > 1 + _ROUNDING:
            raise ValueError("their probabilities sum to more than 1")
        known = [token for token in tokens if isinstance(token, int)]
        prompt_tokens = usage.get("prompt_tokens")
        return Answer(
            ranked, known, str(choice.get("text") or ""), prompt_tokens if isinstance(prompt_tokens, int) else None
        )

    def _id(self, entry: Mapping[str, Any]) -> int:
        """Return the id of a token that is listed with its id, as ``token_id:17``, or by its text alone."""
        for found in (entry.get("id"), _numbered(entry["token"])):
            if isinstance(found, int) and not isinstance(found, bool) and found >= 0:
                return found
        token = self._token_id(str(entry["token"]))
        if token is None:
            raise ValueError(f"{entry['token']!r} is the text of no token, or of several; ids are needed")
        return token

    def _refused(self, status: int, answer: Any) -> ServerError:
        said = answer
        for name in ("error", "message", "detail"):
            said = said.get(name, said) if isinstance(said, dict) else said
        what = f"answered with status {status}: {str(said)[:_SHOWN]}"
        if status in (401, 403):
            what += f"; {self._key_hint}"
        elif status in _RETRIED:
            what += f"; {_KEPT}"
        return self._error(what)

    def _broken(self, what: str) -> ServerError:
        return self._error(f"gave an answer that cannot be used: {what}")

    def _error(self, what: str) -> ServerError:
        """Return an error in one line, without the key, which servers may repeat."""
        line = " ".join(f"the server at {self.url} {what}".split())
        key = self._api_key.get_secret_value()
        return ServerError(line.replace(key, "***") if key else line)


def _connections(api_key: str | None, timeout: float, retries: int, most: int) -> urllib3.PoolManager:
    try:
        import urllib3
    except ImportError as error:
        raise ConfigurationError("a model behind an API needs urllib3: pip install 'qstar-decoding[api]'") from error
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    policy = urllib3.Retry(
        total=retries,
        redirect=0,  # a key is sent to no other address
        status_forcelist=_RETRIED,
        allowed_methods=None,  # asking twice for the next token changes nothing
        backoff_factor=0.25,
        backoff_max=_LONGEST_WAIT,
        backoff_jitter=0.1,
        retry_after_max=_LONGEST_WAIT,
        raise_on_status=False,  # the last answer tells why
        raise_on_redirect=False,
    )
    return urllib3.PoolManager(
        maxsize=most,
        block=True,
        headers=headers,
        retries=policy,
        timeout=urllib3.Timeout(connect=min(timeout, 10.0), read=timeout),
    )


def _count(values: Any, name: str) -> int:
    value = values.get(name) if isinstance(values, dict) else None
    return value if isinstance(value, int) else 0


def _numbered(token: Any) -> int | None:
    """Return 17 for ``token_id:17``, as vLLM writes tokens on request."""
    name, _, number = str(token).rpartition(":")
    return int(number) if name == "token_id" and number.isdecimal() else None


def _logprob(value: Any) -> float:
    number = float(value)
    if math.isnan(number) or number > _ROUNDING:
        raise ValueError(f"a log-probability is a number of at most 0, got {number}")
    return -math.inf if number < _IMPOSSIBLE else min(number, 0.0)
