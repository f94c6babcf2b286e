"""Laws of language models and their engines: ``check_language_model(my_model)``, and the exactness of a tree mask."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from ..errors import LanguageModelError, PromptError
from .base import FloatArray, LanguageModel, check_outputs
from .tree_engine import TreeEngine, TreeModel

__all__ = ["check_language_model", "tree_mask_error"]

_LENGTHS = (1, 2, 3, 5, 8)  # of the sequences to try
_SHORT_CONTEXT = 512  # tokens; such a model is tried at its full length
_FLOAT32_NOISE = 1e-4  # nats, root mean square


def check_language_model(model: LanguageModel, *, prompts: Sequence[str] = (), tolerance: float = 1e-3) -> None:
    """Check that a language model keeps the laws that environments, planners and certificates rest on.

    The laws: the attributes are there. ``forward`` returns hidden states [n, d] and normalised natural
    log-probabilities [n, V] without NaN, the same again, in another batch and in another order. The engine's outputs
    equal ``forward``'s. Texts are encoded to the model's tokens, and a prefix's text begins the text of what continues
    it.

    Args:
        model: The model.
        prompts: Texts to encode besides the model's own.
        tolerance: Largest difference of a log-probability, nats, between two computations of it.

    Raises:
        LanguageModelError: A law is broken; the message names it.
    """
    _check_attributes(model)
    rng = np.random.default_rng(0)
    ordinary = np.setdiff1d(np.arange(model.vocab_size), list(model.eos_token_ids))
    tokens = ordinary if len(ordinary) else np.arange(model.vocab_size)
    lengths = [length for length in _LENGTHS if length <= model.context_length]
    sequences = [rng.choice(tokens, size=length).tolist() for length in lengths]
    given = [list(sequence) for sequence in sequences]
    hidden, logprobs = check_outputs(model, model.forward(given), len(given))
    if given != sequences:
        raise _broken(model, "forward changed the sequences that it was given")
    shuffled = rng.permutation(len(sequences)).tolist()
    for how, order in (
        ("again", list(range(len(sequences)))),
        ("in another order", shuffled),
        ("the shortest one alone", [0]),
    ):
        other = check_outputs(model, model.forward([sequences[i] for i in order]), len(order))
        for what, ours, theirs in (("hidden states", hidden, other[0]), ("log-probabilities", logprobs, other[1])):
            error = _difference(ours[order], theirs)
            if error > tolerance * (1 if what == "log-probabilities" else max(1.0, float(np.abs(ours).max()))):
                raise _broken(
                    model, f"forward of the same sequences, {how}, returned {what} that differ by {error:.2g}"
                )
    _check_engine(model, sequences, tolerance)
    embeddings = np.asarray(model.token_embeddings())
    if embeddings.ndim != 2 or len(embeddings) != model.vocab_size or not np.isfinite(embeddings).all():
        raise _broken(model, f"token_embeddings returns finite vectors [vocab_size, e], got shape {embeddings.shape}")
    _check_texts(model, sequences, prompts)
    try:
        pickle.dumps(model)
    except Exception as error:
        warnings.warn(
            f"language model {model.name!r} cannot be pickled ({type(error).__name__}: {error}), so it cannot go to "
            "other processes",
            stacklevel=2,
        )


def _broken(model: Any, law: str) -> LanguageModelError:
    return LanguageModelError(f"language model {getattr(model, 'name', model)!r}: {law}")


def _difference(ours: FloatArray, theirs: FloatArray) -> float:
    with np.errstate(invalid="ignore"):  # -inf minus -inf
        return float(np.where(ours == theirs, 0, np.abs(ours - theirs)).max(initial=0))


def _check_attributes(model: LanguageModel) -> None:
    for name in ("vocab_size", "hidden_size", "context_length"):
        value = getattr(model, name, None)
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
            raise _broken(model, f"{name} is a positive integer, got {value!r}; set it in __init__")
    if not isinstance(getattr(model, "name", None), str) or not model.name:
        raise _broken(model, f"name is a non-empty string, got {getattr(model, 'name', None)!r}; set it in __init__")
    ends = getattr(model, "eos_token_ids", None)
    if not isinstance(ends, (set, frozenset)):
        raise _broken(model, f"eos_token_ids is a set of token ids, maybe empty, got {ends!r}; set it in __init__")
    if wrong := [t for t in ends if not isinstance(t, (int, np.integer)) or not 0 <= t < model.vocab_size]:
        raise _broken(model, f"eos_token_ids are from 0 to vocab_size - 1 = {model.vocab_size - 1}, got {wrong}")


def _check_engine(model: LanguageModel, sequences: Sequence[Sequence[int]], tolerance: float) -> None:
    """Grow every sequence of two tokens or more by its engine, token by token, and compare with ``forward``."""
    engine, none = model.new_engine(), np.empty(0, dtype=np.int64)
    chosen = [sequence for sequence in sequences if len(sequence) > 1]
    if not chosen:
        return
    top_k = min(8, model.vocab_size)
    handles, outputs = engine.compute([sequence[:1] for sequence in chosen], none, none, top_k)
    for position in range(1, max(map(len, chosen))):
        alive = [i for i, sequence in enumerate(chosen) if len(sequence) > position]
        tokens = np.array([chosen[i][position] for i in alive], dtype=np.int64)
        handles[alive], outputs = engine.compute([], handles[alive], tokens, top_k)
        _, logprobs = model.forward([chosen[i][: position + 1] for i in alive])
        error = _difference(np.take_along_axis(np.asarray(logprobs), outputs.tokens, axis=1), outputs.logprobs)
        if error > max(tolerance, 2e-3):
            raise _broken(model, f"its engine's log-probabilities differ from those of forward by {error:.2g} nats")


def _check_texts(model: LanguageModel, sequences: Sequence[Sequence[int]], prompts: Sequence[str]) -> None:
    texts = list(prompts)
    for sequence in sequences:
        for name in ("decode", "decode_continuation"):
            if not isinstance(text := getattr(model, name)(list(sequence)), str):
                raise _broken(model, f"{name} returns a string, got {text!r}")
        whole = model.decode_continuation(sequence)
        for length in range(len(sequence)):
            prefix = model.decode_continuation(sequence[:length]).rstrip("\ufffd")
            if not whole.startswith(prefix):
                raise _broken(
                    model,
                    f"the text {prefix!r} of the tokens {list(sequence[:length])} does not begin the text {whole!r} of "
                    f"{list(sequence)}; decode without cleaning up spaces",
                )
        texts.append(model.decode(list(sequence)))
    encoded = 0
    for text in texts:
        try:
            ids = model.encode(text)
        except PromptError:  # a text that this model cannot read
            continue
        except Exception as error:
            raise _broken(
                model,
                f"encode({text!r}) raised {type(error).__name__} ({error}); raise PromptError for what it cannot read",
            ) from error
        encoded += 1
        if not _are_tokens(model, ids) or (text and not ids):
            raise _broken(model, f"encode({text!r}) returns a list of token ids below vocab_size, got {ids!r}")
        if ids and ids[-1] in model.eos_token_ids and not text.endswith(model.decode([ids[-1]]) or "\0"):
            raise _broken(model, f"encode({text!r}) ends with the end-of-sequence token {ids[-1]}, which ends the text")
    if not encoded:
        raise _broken(model, f"encode refuses all of the texts {texts[:3]!r}, …; give prompts=[…] that it can read")


def _are_tokens(model: LanguageModel, ids: Any) -> bool:
    return isinstance(ids, list) and all(isinstance(t, (int, np.integer)) and 0 <= t < model.vocab_size for t in ids)


# ---------------------------------------------------------------------------------------------------------------------


def tree_mask_error(model: TreeModel) -> str | None:
    """Compare the tree engine with uncached forwards on a small random tree; return what is wrong, None if nothing.

    The tree engine is exact where a token's outputs depend on its ancestors only. So they must not depend on the tokens
    after it, nor on how far these reach (as the rotary embeddings of LongRoPE do). The same
    plain forwards, alone and in a batch, tell how large rounding errors are; larger errors of the engine are refused.

    Args:
        model: The model to try.
    """
    rng = np.random.default_rng(0)
    prompts = [rng.integers(model.vocab_size, size=n).tolist() for n in (3, 5)]
    levels = rng.integers(model.vocab_size, size=(3, 4))
    sequences = [[*prompts[i], *levels[:, j].tolist()] for j, i in enumerate((0, 0, 1, 1))]
    try:
        with model.lock:
            reference = model.forward(sequences)[1]
            noise, dtype = _rms(_batched(model, sequences), reference), model.model.dtype
            eps = torch.finfo(dtype).eps
            allowed = 4 * noise + (_FLOAT32_NOISE if dtype == torch.float32 else 2 * eps)
            for what, error, other_shape in _dependences(model, sequences[-1], rng):
                # Kernels round otherwise for another length: in half precision by up to 4 eps (measured).
                if not error <= max(allowed, 16 * eps if other_shape else 0):
                    return f"its outputs at a token depend on {what} (by {error:.2g} nats)"
            engine, none, vocabulary = TreeEngine(model), np.empty(0, dtype=np.int64), model.vocab_size
            rows, _ = engine.compute(prompts, none, none, vocabulary)
            rows = rows[[0, 0, 1, 1]]  # four branches, two of each prompt
            for level in levels:
                rows, outputs = engine.compute([], rows, level, vocabulary)
            error = _rms(outputs.logprobs, np.take_along_axis(reference, outputs.tokens, axis=1))
    except Exception as problem:
        first = (str(problem).splitlines() or [""])[0]
        return f"a tree mask does not work with it ({type(problem).__name__}: {first[:120]})"
    if not error <= allowed:
        return f"with a tree mask its log-probabilities are off by {error:.2g} nats"
    if window := engine.missed_window:
        return f"its attention has a window of {window} tokens that a tree mask does not learn of"
    model.kv_token_bytes = engine.kv_token_bytes
    return None


def _rms(ours: FloatArray, theirs: FloatArray) -> float:
    """Return the root mean square of a difference; equal values, infinite ones too, differ by 0."""
    with np.errstate(invalid="ignore"):
        difference = np.where(ours == theirs, 0, ours.astype(np.float64) - theirs)
    return float(np.sqrt(np.mean(difference**2)))


def _plain(model: TreeModel, batch: Sequence[Sequence[int]], **inputs: Any) -> FloatArray:
    """Return log-probabilities float32 [n, length, V] at all tokens, by an ordinary forward."""
    with torch.inference_mode():
        ids = torch.tensor(batch, device=model.device)
        logits = model.model(input_ids=ids, use_cache=False, **inputs).logits
        return np.asarray(logits.float().log_softmax(-1).cpu().numpy())


def _batched(model: TreeModel, sequences: Sequence[Sequence[int]]) -> FloatArray:
    """Return the log-probabilities after each sequence, [n, V], those of one length computed together."""
    outputs = np.empty((len(sequences), model.vocab_size), dtype=np.float32)
    for length in {len(sequence) for sequence in sequences}:
        members = [i for i, sequence in enumerate(sequences) if len(sequence) == length]
        outputs[members] = _plain(model, [sequences[i] for i in members])[:, -1]
    return outputs


def _dependences(model: TreeModel, sequence: list[int], rng: np.random.Generator) -> Iterator[tuple[str, float, bool]]:
    """Yield what the outputs at a token must not depend on, and by how much they do (nats, root mean square).

    The last value tells whether the two forwards that are compared have different shapes.
    """
    size, length = model.vocab_size, len(sequence)
    last = [*sequence[:-1], (sequence[-1] + 1) % size]
    near, other = (_plain(model, [ids])[0] for ids in (sequence, last))
    yield "the tokens after it", _rms(near[:-1], other[:-1]), False
    positions = torch.arange(length, device=model.device).unsqueeze(0)
    placed = [_plain(model, [sequence], position_ids=positions)[0, :-1]] if (reach := _far_positions(model)) else []
    for position in reach:
        far = positions.clone()
        far[0, -1] = position
        yield (
            "the length of the whole sequence",
            _rms(_plain(model, [sequence], position_ids=far)[0, :-1], placed[0]),
            False,
        )
    # Few models tell lengths by the number of tokens instead; those with a short context are tried at full length.
    count = max(model.context_length, length) if model.context_length <= _SHORT_CONTEXT else length + 5
    longer = [*sequence, *rng.integers(size, size=count - length).tolist()]
    yield "the length of the whole sequence", _rms(_plain(model, [longer])[0, length - 1], near[-1]), True


def _far_positions(model: TreeModel) -> list[int]:
    """Return the last position of the context, and the first after a length at which the configuration switches."""
    config = model.model.config.get_text_config()
    if getattr(config, "max_position_embeddings", None) is None:
        return []
    found = {model.context_length - 1}
    settings = config.to_dict()
    for value in (settings, settings.get("rope_parameters"), settings.get("rope_scaling")):
        switch = value.get("original_max_position_embeddings") if isinstance(value, dict) else None
        if isinstance(switch, int) and 0 < switch < model.context_length:
            found.add(switch)
    return sorted(found)
