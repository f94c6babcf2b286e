"""The likeliest tokens and their log-probabilities by the full softmax, in numpy; llama.cpp is not needed here."""

import numpy as np
import pytest

from qstar_decoding.models.llama_cpp.softmax import top_logprobs


def random_logits(rows, size):
    return np.random.default_rng(size).standard_normal((rows, size)).astype(np.float32) * 4


def log_softmax(logits):
    exact = logits.astype(np.float64)
    return exact - np.log(np.exp(exact).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("size", [1, 7, 1000, 5000, 49_152, 50_001])
def test_top_logprobs_are_those_of_the_whole_softmax(size):
    logits = random_logits(3, size)
    exact = log_softmax(logits)
    for k in {1, min(5, size), min(400, size), size if size < 9000 else 8}:
        tokens, logprobs = top_logprobs(logits.copy(), k)
        np.testing.assert_array_equal(tokens, np.argsort(-logits, axis=1, kind="stable")[:, :k])
        np.testing.assert_allclose(logprobs, np.take_along_axis(exact, tokens, axis=1), atol=1e-5)
        assert (tokens.dtype, logprobs.dtype) == (np.int64, np.float32)


def test_only_allowed_tokens_are_listed():
    logits, allowed = random_logits(4, 3000), np.zeros((4, 3000), dtype=bool)
    allowed[0] = True
    allowed[1, ::7] = True
    allowed[2, [5, 9]] = True  # fewer than k
    tokens, logprobs = top_logprobs(logits.copy(), 6, allowed)
    assert allowed[:2][np.arange(2)[:, None], tokens[:2]].all()
    assert sorted(tokens[2, :2].tolist()) == [5, 9]
    assert np.isneginf(logprobs[2, 2:]).all()
    assert np.isneginf(logprobs[3]).all()
    listed = np.isfinite(logprobs)
    exact = np.take_along_axis(log_softmax(logits), tokens, axis=1)
    np.testing.assert_allclose(logprobs[listed], exact[listed], atol=1e-5)


def test_equal_logits_are_listed_the_same_in_every_batch():
    logits = np.round(random_logits(8, 5000) / 4) + np.float32(0)  # a few values only, no -0
    together = top_logprobs(logits.copy(), 6)[0]
    alone = [top_logprobs(logits[i : i + 1].copy(), 6)[0][0] for i in range(8)]
    np.testing.assert_array_equal(together, alone)
    np.testing.assert_array_equal(np.take_along_axis(logits, together, axis=1), -np.sort(-logits, axis=1)[:, :6])


def test_nan_is_not_hidden():
    logits = random_logits(2, 5000)
    logits[1, 77] = np.nan
    logprobs = top_logprobs(logits, 4)[1]
    assert np.isfinite(logprobs[0]).all()
    assert np.isnan(logprobs[1]).all()
