"""Rewards from classifiers: sequence-classification models of transformers, and profanity by a linear one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Unpack

from ...checks import check_integer, check_number
from ...errors import ConfigurationError
from ..base import Reward
from ..types import Column, RewardOptions, Scores, Texts, TokenIds
from .helpers import library, readable

__all__ = ["Classifier", "Profanity"]


class Classifier(Reward):
    """The score that a sequence-classification model gives a text.

    With several labels the probability of one of them, 0 to 1; with a single output, as reward models have, that
    number, without bounds, or with ``sigmoid=True`` its sigmoid, 0 to 1. The potential is the unfinished text's score.
    """

    name = "classifier"
    reads_token_ids = False

    def __init__(
        self,
        model: Any,
        *,
        label: str | int | None = None,
        tokenizer: Any = None,
        with_prompt: bool = False,
        temperature: float = 1.0,
        sigmoid: bool = False,
        batch_size: int = 32,
        device: str = "cpu",
        **options: Unpack[RewardOptions],
    ) -> None:
        """Load a model, or use one.

        Args:
            model: A local folder, a hub id, or a loaded ``PreTrainedModel`` (then give its tokenizer too).
            label: The label whose probability counts, by name or number; needed where there are several.
            tokenizer: Of a loaded model.
            with_prompt: Whether the prompt is put before the completion; the completion alone otherwise.
            temperature: The logits are divided by it; above 1 is less sure of itself.
            sigmoid: Whether a single output goes through a sigmoid, which bounds it.
            batch_size: Texts a forward.
            device: Where a model given by name is loaded to.
            **options: Those of every reward; see `RewardOptions`.

        Raises:
            ConfigurationError: The model cannot be loaded, has no such label, or is no classifier.
        """
        self.with_prompt = with_prompt
        self.temperature = check_number("temperature", temperature, low=0, open_low=True)
        self.batch_size = check_integer("batch_size", batch_size)
        self._model, self._tokenizer = _loaded(model, tokenizer, device)
        labels = {int(i): str(text) for i, text in self._model.config.id2label.items()}
        self._label = _index(label, labels)
        self._sigmoid = sigmoid and self._label is None
        is_probability = self._label is not None or self._sigmoid
        self.lower, self.upper = (0.0, 1.0) if is_probability else (-math.inf, math.inf)
        super().__init__(**options)

    def score(self, prompts: Texts, completions: Texts, completion_ids: TokenIds = None, **columns: Column) -> Scores:
        """Return the model's answer to each text; one that is too long loses its beginning."""
        import torch

        texts = list(completions)
        if self.with_prompt:
            texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        # A lone surrogate is no text to a tokenizer, and a text without any token is none to a model.
        texts = [readable(text) for text in texts]
        counts = [len(ids) for ids in self._tokenizer(texts)["input_ids"]] if texts else []
        texts = [text if count else self._blank for text, count in zip(texts, counts, strict=True)]
        # Of like lengths together: padding is computed like text.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        scores = [0.0] * len(texts)
        for start in range(0, len(order), self.batch_size):
            part = order[start : start + self.batch_size]
            inputs = self._tokenizer(
                [texts[i] for i in part], return_tensors="pt", padding=True, truncation=True, max_length=self._longest
            ).to(self._model.device)
            with torch.inference_mode():
                logits = self._model(**inputs).logits.float() / self.temperature
            if self._label is not None:
                values = logits.softmax(-1)[:, self._label]
            else:
                values = logits[:, 0].sigmoid() if self._sigmoid else logits[:, 0]
            for i, value in zip(part, values.tolist(), strict=True):
                scores[i] = value
        return scores

    score_prefixes = score

    @property
    def _blank(self) -> str:
        return str(self._tokenizer.unk_token or self._tokenizer.eos_token or self._tokenizer.pad_token)

    @property
    def _longest(self) -> int:
        positions = getattr(self._model.config, "max_position_embeddings", None) or 512
        return min(int(positions), int(self._tokenizer.model_max_length))


def _loaded(model: Any, tokenizer: Any, device: str) -> tuple[Any, Any]:
    if not isinstance(model, (str, Path)):
        if tokenizer is None or not hasattr(getattr(model, "config", None), "id2label"):
            raise ConfigurationError(
                f"a classifier is a folder, a hub id, or a loaded model with tokenizer=…; got {type(model).__name__}"
            )
    else:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(str(model))
            model = AutoModelForSequenceClassification.from_pretrained(str(model)).to(device)
        except (OSError, ValueError) as error:
            raise ConfigurationError(
                f"no classifier can be loaded from {str(model)!r}: {str(error).splitlines()[0]}; give a local folder, "
                "or the id of a sequence-classification model on the hub"
            ) from error
    if tokenizer.pad_token is None:
        raise ConfigurationError("the classifier's tokenizer has no padding token; set tokenizer.pad_token")
    tokenizer.truncation_side = "left"
    return model.eval(), tokenizer


def _index(label: str | int | None, labels: dict[int, str]) -> int | None:
    """Return the number of a label; None for a model with one output."""
    if len(labels) == 1 and label is None:
        return None
    found = [i for i, text in labels.items() if label in (i, text)]
    if not found:
        raise ConfigurationError(f"label is one of {list(labels.values())} or its number, got {label!r}")
    return found[0]


class Profanity(Reward):
    """The probability that the completion is profane or offensive, 0 to 1; to be subtracted.

    alt-profanity-check: a linear support vector machine on bags of words, calibrated, trained on 200,000 labelled
    comments of Wikipedia and tweets. It knows words, not meanings: "damn good" is rude to it, a polite threat is not.
    For toxicity in a wider sense, give a model to ``classifier``. The potential is the probability so far.
    """

    name, lower, upper = "profanity", 0.0, 1.0
    reads_token_ids = False

    def __init__(self, **options: Unpack[RewardOptions]) -> None:
        """Load the classifier; the arguments are those of `Reward`.

        Raises:
            ConfigurationError: The library alt-profanity-check is not installed.
        """
        super().__init__(**options)
        _predict([""])

    def score(self, prompts: Texts, completions: Texts, completion_ids: TokenIds = None, **columns: Column) -> Scores:
        """Return the probability for each completion."""
        return _predict([readable(text) for text in completions])

    score_prefixes = score


def _predict(texts: list[str]) -> list[float]:
    return [float(p) for p in library("profanity_check", "alt-profanity-check", "profanity").predict_prob(texts)]
