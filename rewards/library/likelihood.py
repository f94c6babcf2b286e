"""Rewards from the likelihood of a text under a language model: fluency, and mutual information with the prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Unpack

import numpy as np

from ...checks import check_integer, check_number
from ...errors import ConfigurationError
from ..base import Reward
from ..checking import shown
from ..types import Column, FloatArray, RewardOptions, Scores, Texts, TokenIds
from .helpers import readable

if TYPE_CHECKING:
    import torch

    from ...models import TransformersLM

__all__ = ["Coherence", "PointwiseMutualInformation", "Reader"]

_LONGEST = 128  # tokens that are read of a prompt, from its end, and of a completion, from its beginning


class Reader(Reward):
    """A reward that rests on what a causal language model of transformers says of prompt and completion.

    It reads 128 tokens of each at most: the end of the prompt, the beginning of the completion.
    """

    reads_token_ids = False

    def __init__(self, model: Any, batch_size: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.batch_size = check_integer("batch_size", batch_size)
        self._model = model
        self._lm()

    def _lm(self) -> TransformersLM:
        """Return the language model; one that has a name is the process's own, and not pickled with the reward."""
        from ...models import TransformersLM, load_language_model

        loaded = load_language_model(str(self._model)) if isinstance(self._model, (str, Path)) else self._model
        if not isinstance(loaded, TransformersLM):
            raise ConfigurationError(
                "model is a causal language model of transformers, by name or loaded by load_language_model; "
                f"got {loaded!r}"
            )
        return loaded

    def _tokens(self, prompts: Sequence[str], completions: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        """Return what is read of each prompt and of its completion, as token ids."""
        lm = self._lm()
        start = lm.encode("")[:1] or [min(lm.eos_token_ids, default=0)]  # what stands for an empty prompt
        most = min(_LONGEST, lm.context_length // 2)
        pairs = []
        for prompt, completion in zip(prompts, completions, strict=True):
            before = lm.encode(readable(prompt)) or start
            after = [int(t) for t in lm.tokenizer(readable(completion), add_special_tokens=False)["input_ids"]]
            pairs.append((before[-most:], after[:most]))
        return pairs

    def _batches(self, sequences: Sequence[Sequence[int]]) -> Iterator[_Batch]:
        """Yield sequences of like lengths together, padded on the right, which causal models do not see."""
        import torch

        device = self._lm().device
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
        position = 0
        while position < len(order):
            # As many as `batch_size` sequences, fewer long ones: what counts is the padded size.
            rows = order[position : position + self.batch_size]
            rows = rows[: max(self.batch_size * 64 // len(sequences[rows[-1]]), 1)]
            position += len(rows)
            lengths = torch.tensor([len(sequences[i]) for i in rows])
            mask = torch.arange(int(lengths.max()))[None] < lengths[:, None]
            ids = torch.zeros(mask.shape, dtype=torch.long)
            ids[mask] = torch.tensor([token for i in rows for token in sequences[i]])
            yield _Batch(rows, ids.to(device), mask.long().to(device), lengths)

    def _logprobs(self, prompts: Sequence[str], completions: Sequence[str]) -> list[FloatArray]:
        """Return the log-probabilities of each completion's tokens after its prompt, in nats; float64 [tokens] each."""
        import torch

        pairs = self._tokens(prompts, completions)
        found = [np.zeros(len(after)) for _, after in pairs]
        # A search asks for texts that differ in their last tokens: what a longer text begins with is read with it.
        read = {i: (*before, *after[:-1]) for i, (before, after) in enumerate(pairs) if after}
        longest: tuple[int, ...] = ()
        texts: dict[tuple[int, ...], list[int]] = {}
        for i in sorted(read, key=lambda i: read[i], reverse=True):
            longest = longest if longest[: len(read[i])] == read[i] else read[i]
            texts.setdefault(longest, []).append(i)
        sequences = list(texts)
        for batch in self._batches(sequences):
            with torch.inference_mode():
                logits = self._lm().model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits
            for row, said in zip(batch.rows, logits, strict=True):
                logprobs = said.float().log_softmax(-1)
                for i in texts[sequences[row]]:
                    before, after = pairs[i]
                    positions = torch.arange(len(after)) + len(before) - 1
                    found[i] = logprobs[positions, torch.tensor(after)].double().cpu().numpy()
        return found


class _Batch(NamedTuple):
    """Some of the sequences: which ones, int64 [n, longest] ids and mask, and lengths, int64 [n]."""

    rows: list[int]
    ids: torch.Tensor
    mask: torch.Tensor
    lengths: torch.Tensor


class Coherence(Reader):
    """The mean log-probability of the completion's tokens after the prompt, in nats, cut off at ``floor``: floor to 0.

    Minus the logarithm of the perplexity, under any causal language model: another one than the model that decodes is
    a second opinion of fluency. Texts repeat themselves where this alone is sought (Holtzman et al. 2020): subtract
    ``repetition`` or ``semantic_repetition``. An empty completion has ``floor``. A text costs a forward of all of it:
    there is no potential: it would cost as much as decoding does.
    """

    name, upper = "coherence", 0.0

    def __init__(
        self,
        model: Any = "smollm2-135m-instruct",
        *,
        floor: float = -10.0,
        batch_size: int = 16,
        **options: Unpack[RewardOptions],
    ) -> None:
        """Load a language model.

        Args:
            model: What :func:`~qstar_decoding.envs.load_language_model` takes, or what it returned.
            floor: The least score, in nats a token; bounds need one.
            batch_size: Texts a forward.
            **options: Those of every reward; see `RewardOptions`.

        Raises:
            ConfigurationError: ``floor`` is above -0.1, or the model is none.
            UnknownNameError: There is no such model.
        """
        lower = check_number("floor", floor, high=-0.1)
        super().__init__(model, batch_size, lower=lower, **options)

    def score(self, prompts: Texts, completions: Texts, completion_ids: TokenIds = None, **columns: Column) -> Scores:
        """Return the mean for each completion."""
        means = [of.mean() if len(of) else self.lower for of in self._logprobs(prompts, completions)]
        scores: list[float] = np.clip(means, self.lower, 0.0).tolist()
        return scores


class PointwiseMutualInformation(Reader):
    """How much likelier the prompt makes the completion: the mean of log p(y_t | x, y_<t) - log p(y_t | y_<t), in nats.

    Li et al. 2016, "A Diversity-Promoting Objective Function for Neural Conversation Models" (MMI-antiLM, with λ = 1),
    a token. p(y) is the mean of p(y | x') over ``references``, prompts without a topic. A token counts for ``limit`` at
    most, either way: otherwise one word that fits the prompt's grammar alone pays for a phrase that suits any prompt.
    Such a phrase has little, and a text that goes on about its prompt has more. The words of the prompt are made
    likely, too: subtract ``keyword_overlap``. An empty completion has 0. There is no potential, as with `Coherence`; a
    text costs a forward of itself after its prompt and after each reference.
    """

    name = "pointwise_mutual_information"

    def __init__(
        self,
        limit: float = 2.0,
        *,
        references: Sequence[str] = ("The product", "The place", "The story", "They"),
        model: Any = "smollm2-135m-instruct",
        batch_size: int = 16,
        **options: Unpack[RewardOptions],
    ) -> None:
        """Load a language model.

        Args:
            limit: The largest absolute score of a token, in nats, and of a text.
            references: Prompts without a topic; by default three nouns and a pronoun.
            model: What :func:`~qstar_decoding.envs.load_language_model` takes, or what it returned.
            batch_size: Texts a forward.
            **options: Those of every reward; see `RewardOptions`.

        Raises:
            ConfigurationError: ``limit`` is below 0.1, there is no reference or one is no string, or the model is none.
            UnknownNameError: There is no such model.
        """
        limit = check_number("limit", limit, low=0.1)
        texts = [] if isinstance(references, str) else list(references)
        if not texts or not all(isinstance(text, str) for text in texts):
            raise ConfigurationError(
                f"references are several prompts; for a single one give [prompt]; got {shown(references)}"
            )
        self._references = texts
        super().__init__(model, batch_size, **{"lower": -limit, "upper": limit, **options})

    def score(self, prompts: Texts, completions: Texts, completion_ids: TokenIds = None, **columns: Column) -> Scores:
        """Return the information of each pair."""
        after = [*prompts, *(reference for reference in self._references for _ in completions)]
        logprobs = self._logprobs(after, [*completions] * (1 + len(self._references)))
        scores: list[float] = []
        for i, given in enumerate(logprobs[: len(completions)]):
            # log of the mean over the references of p(y_<=t), and its increments: log p(y_t | y_<t) of the mixture
            mixture = np.logaddexp.reduce([of.cumsum() for of in logprobs[i + len(completions) :: len(completions)]])
            information = given - np.diff(mixture, prepend=np.log(len(self._references)))
            scores.append(float(np.clip(information, self.lower, self.upper).mean()) if len(given) else 0.0)
        return scores
