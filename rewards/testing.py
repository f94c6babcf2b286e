"""Laws of rewards as a check: ``check_reward(my_reward)``, the counterpart of ``check_env``."""

from __future__ import annotations

import copy
import math
import pickle
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import ConfigurationError, RewardCheckError, RewardError
from .base import Reward
from .functions import RewardSpec, as_reward

__all__ = ["check_reward"]

_TOLERANCE = 1e-6
_SLOW = 0.05  # seconds a text; a step of 16 environments takes about as long

_COMPLETIONS = (
    "",
    " ",
    "\n",
    " yes.",
    " The dog caught a ball in the garden, and everybody was happy!",
    " I hate this terrible, awful day. Why would anyone do that?",
    " 42",
    "no space before, no full stop after",
    " 🐕🎾👩‍👩‍👧 smörgåsbord 自然言語 שלום",
    " broken \ud83d unicode \udc00",
    " \x00\x1b[31m control",
    " <script>alert('x')</script> {\"a\": 1} \\ % {0}",
    " word" * 2000,
    "x" * 10_000,
)
_COLUMNS: dict[str, Any] = {"answer": "42", "keywords": ["dog", "ball"]}


def check_reward(
    reward: RewardSpec,
    *,
    prompts: Sequence[str] = ("The movie was", "Add up: 40 + 2 =", ""),
    completions: Sequence[str] = (),
    columns: Mapping[str, Any] | None = None,
) -> None:
    """Check that a reward keeps the laws that environments, agents and certificates rest on.

    For texts of all kinds, the empty one, a very long one and broken unicode among them: one finite number within the
    bounds per text (or None); the same alone, in a batch, in another order and again; arguments left as they are; a
    finite potential; and a bound for prefixes (``bound_prefixes``) that no continuation exceeds. What is merely unwise
    (slow, no upper bound, not to be pickled) is a warning.

    Args:
        reward: What :func:`as_reward` takes.
        prompts: Prompts to try, each with every completion.
        completions: Further completions to try, such as good and bad ones of the reward's own domain.
        columns: What the prompts' data set would say, one value for each column; ``answer`` and ``keywords`` are there.

    Raises:
        RewardCheckError: A law is broken; the message names it and says what to do.
        ConfigurationError: There is no such reward, or it needs a column that is not there.
    """
    checked = as_reward(reward)
    texts = [(p, c) for p in prompts for c in (*_COMPLETIONS, *completions)]
    given = {**_COLUMNS, **(columns or {})}
    _check_scores(checked, texts, given)
    _check_prefixes(checked, [(p, c) for p, c in texts if c.strip() and len(c) < 1000], given)
    _warn(checked, texts, given)


def _check_scores(reward: Reward, texts: Sequence[tuple[str, str]], columns: Mapping[str, Any]) -> None:
    scores = _ask(reward, reward.score, texts, columns, "score")
    for (prompt, completion), value in zip(texts, scores, strict=True):
        where = f"for the completion {completion[:60]!r} of {prompt!r}"
        if value is None:
            continue
        number = _number(reward, value, where)
        if not reward.lower - _TOLERANCE <= number <= reward.upper + _TOLERANCE:
            raise _broken(
                reward, f"returned {number!r} {where}, outside its bounds [{reward.lower:g}, {reward.upper:g}]",
                "widen lower and upper, or clip the score: certificates rest on them",
            )  # fmt: skip
    again = _ask(reward, reward.score, texts, columns, "score")
    _same(reward, texts, scores, again, "gave another value the second time", "it must depend on its arguments alone")
    order = list(range(len(texts)))[::-1]
    turned = _ask(reward, reward.score, [texts[i] for i in order], columns, "score")
    _same(
        reward, [texts[i] for i in order], [scores[i] for i in order], turned, "depends on the order of the batch",
        "return the values in the order of the completions, each for its own text",
    )  # fmt: skip
    alone = [_ask(reward, reward.score, [text], columns, "score")[0] for text in texts]
    _same(
        reward, texts, scores, alone, "gives another value alone than in a batch",
        "do not normalise over the batch: a text's score must not depend on its neighbours",
    )  # fmt: skip


def _check_prefixes(reward: Reward, texts: Sequence[tuple[str, str]], columns: Mapping[str, Any]) -> None:
    """Check the potential and the bound at every beginning of each text, with its words as tokens."""
    for prompt, completion in texts:
        words = [" " + word for word in completion.split()]
        prefixes = [(prompt, "".join(words[:n])) for n in range(len(words) + 1)]
        ids = [list(range(n)) for n in range(len(prefixes))]
        if reward.has_potential:
            potentials = _ask(reward, reward.score_prefixes, prefixes, columns, "potential", ids)
            for (_, prefix), value in zip(prefixes, potentials, strict=True):
                if value is not None:
                    _number(reward, value, f"as the potential of {prefix[:60]!r}")
        if not reward.has_prefix_bounds:
            continue
        final = _ask(reward, reward.score, prefixes[-1:], columns, "score", ids[-1:])[0]
        if final is None:
            continue
        left = [len(words) - n for n in range(len(prefixes))]
        try:
            bounds = reward.upper_bound(
                [prompt] * len(prefixes), [prefix for _, prefix in prefixes], left, ids, **_repeated(columns, len(left))
            )
        except RewardError as error:
            raise _broken(reward, str(error), "correct bound_prefixes") from error
        for (_, prefix), remaining, bound in zip(prefixes, left, bounds.tolist(), strict=True):
            if float(final) > bound + _TOLERANCE:
                raise _broken(
                    reward,
                    f"says that {prefix!r} with {remaining} tokens to come scores at most {bound:g}, but "
                    f"{prefixes[-1][1]!r} scores {float(final):g}",
                    "bound_prefixes must never be below what a continuation can reach; where in doubt return `upper`",
                )


def _warn(reward: Reward, texts: Sequence[tuple[str, str]], columns: Mapping[str, Any]) -> None:
    if math.isinf(reward.upper):
        warnings.warn(
            f"reward {reward.name!r} has no upper bound, so nothing can be certified; declare `upper`", stacklevel=3
        )
    short = [text for text in texts if len(text[1]) < 200]
    start = time.perf_counter()
    _ask(reward, reward.score, short, columns, "score")
    seconds = (time.perf_counter() - start) / len(short)
    if seconds > _SLOW:
        warnings.warn(f"reward {reward.name!r} takes {seconds * 1000:.0f} ms a text; batch its work", stacklevel=3)
    try:
        pickle.dumps(reward)
    except Exception as error:  # whatever cannot be pickled raises whatever it likes
        warnings.warn(
            f"reward {reward.name!r} cannot be pickled ({type(error).__name__}: {error}), so it cannot go to other "
            "processes; use a function of a module instead of a lambda",
            stacklevel=3,
        )


def _ask(
    reward: Reward,
    method: Callable[..., Sequence[float | None]],
    texts: Sequence[tuple[str, str]],
    columns: Mapping[str, Any],
    what: str,
    ids: Sequence[Sequence[int]] | None = None,
) -> list[float | None]:
    prompts, completions = [prompt for prompt, _ in texts], [completion for _, completion in texts]
    # Of a text's own, so that equal texts have equal ids wherever they stand.
    ids = ids if ids is not None else [[len(word) for word in completion.split()] for completion in completions]
    given: dict[str, Any] = {"prompts": prompts, "completions": completions, "completion_ids": ids}
    given |= _repeated(columns, len(texts))
    before = copy.deepcopy(given)
    try:
        returned = method(**given)
    except ConfigurationError:
        raise
    except Exception as error:
        if len(texts) > 1:
            for text, one in zip(texts, ids, strict=True):
                _ask(reward, method, [text], columns, what, [one])
            raise _broken(
                reward, f"raised {type(error).__name__} for {len(texts)} texts at once, for none alone: {error}",
                "let it score any batch",
            ) from error  # fmt: skip
        raise _broken(
            reward, f"raised {type(error).__name__} for the completion {completions[0][:60]!r}: {error}",
            "return None for a text that cannot be scored",
        ) from error  # fmt: skip
    if given != before:
        changed = [name for name in given if given[name] != before[name]]
        raise _broken(reward, f"changed its argument {changed[0]!r}", "work on a copy, as others get the same lists")
    if not hasattr(returned, "__len__") or isinstance(returned, (str, bytes, Mapping, set)):
        raise _broken(
            reward, f"returned a {type(returned).__name__} as {what}",
            f"return a list of {len(texts)} values, one per completion",
        )  # fmt: skip
    if len(returned) != len(texts):
        raise _broken(
            reward, f"returned {len(returned)} values for {len(texts)} completions",
            "return one per completion, None where one cannot be scored",
        )  # fmt: skip
    return list(returned)


def _same(
    reward: Reward,
    texts: Sequence[tuple[str, str]],
    one: Sequence[float | None],
    other: Sequence[float | None],
    complaint: str,
    remedy: str,
) -> None:
    for (_, completion), a, b in zip(texts, one, other, strict=True):
        if (a is None) != (b is None) or (a is not None and b is not None and abs(float(a) - float(b)) > _TOLERANCE):
            raise _broken(reward, f"{complaint}: {a!r} and {b!r} for {completion[:60]!r}", remedy)


def _number(reward: Reward, value: Any, where: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise _broken(reward, f"returned {value!r} {where}", "return a number, or None") from None
    if not math.isfinite(number):
        raise _broken(reward, f"returned {number} {where}", "return a finite number, or None where there is none")
    return number


def _repeated(columns: Mapping[str, Any], count: int) -> dict[str, list[Any]]:
    return {name: [value] * count for name, value in columns.items()}


def _broken(reward: Reward, complaint: str, remedy: str) -> RewardCheckError:
    return RewardCheckError(f"reward {reward.name!r} {complaint}; {remedy}.")
