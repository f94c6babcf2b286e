"""Whether the answer is right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import ConfigurationError
from .base import OnError, Reward

__all__ = ["ExactAnswer"]


class ExactAnswer(Reward):
    """1 if the completion is the column ``answer``, surrounding white space aside, else 0.

    The score that verifiable rewards give (Lambert et al. 2024, "Tülu 3", section 6). There is no potential: nothing is
    known of an unfinished answer.
    """

    name, lower, upper = "exact_answer", 0.0, 1.0
    reads_token_ids = False

    def __init__(self, *, on_error: OnError = "raise", penalty: float | None = None) -> None:
        """Compare answers; the arguments are those of `Reward`."""
        super().__init__(on_error=on_error, penalty=penalty)

    def score(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Sequence[Any],
    ) -> Sequence[float | None]:
        """Return 1 for each right answer, 0 for a wrong one, None where the prompt has no answer.

        Raises:
            ConfigurationError: No prompt has the column ``answer``.
        """
        if "answer" not in columns:
            raise ConfigurationError(
                "the reward 'exact_answer' needs prompts with the column 'answer', such as "
                "{'prompt': '2+2=', 'answer': '4'}"
            )
        return [
            None if answer is None else float(completion.strip() == str(answer).strip())
            for completion, answer in zip(completions, columns["answer"], strict=True)
        ]
