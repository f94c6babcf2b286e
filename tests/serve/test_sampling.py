"""Draws of the sampler: what a part of the vocabulary decides is what all of it decides."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

import qstar_decoding.serve.sampling as sampling
from qstar_decoding.serve.app import create_app
from qstar_decoding.serve.sampling import Drawing, _draw

from .conftest import make_engine


@settings(max_examples=300)
@given(
    seed=st.integers(0, 10_000),
    scale=st.sampled_from([0.5, 2.0, 6.0]),
    temperature=st.sampled_from([0.2, 0.7, 1.0]),
    top_p=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    uniform=st.floats(0, 1, exclude_max=True),
    looked_at=st.sampled_from([1, 4, 16]),
)
def test_a_part_decides_as_the_whole_does_or_not_at_all(seed, scale, temperature, top_p, uniform, looked_at):
    logits = np.random.default_rng(seed).normal(size=40) * scale
    logprobs = np.sort(logits - np.log(np.exp(logits).sum()))[::-1].astype(np.float32).astype(np.float64)
    tokens = np.arange(40)
    drawing = Drawing((0,), 5, temperature=temperature, top_p=top_p)
    whole = _draw(drawing, uniform, {}, tokens, logprobs, is_all=True)
    part = _draw(drawing, uniform, {}, tokens[:looked_at], logprobs[:looked_at], is_all=False)
    assert part in (None, whole)
    # The whole is the inverse of the distribution function.
    p = np.exp(logprobs / temperature)
    p /= p.sum()
    kept = int(np.searchsorted(p.cumsum(), top_p * p.sum())) if top_p < 1 else 39
    expected = int(np.searchsorted(p.cumsum(), uniform * p[: kept + 1].sum(), side="right"))
    assert abs(whole - expected) <= 1  # rounding at an edge


def test_most_draws_are_decided_by_a_part():
    rng = np.random.default_rng(0)
    logprobs = np.log(1 / np.arange(1, 1001) ** 1.5)
    logprobs -= np.log(np.exp(logprobs).sum())
    undecided = sum(
        _draw(Drawing((0,), 5), rng.random(), {}, np.arange(50), logprobs[:50], is_all=False) is None
        for _ in range(1000)
    )
    assert undecided / 1000 == pytest.approx(1 - np.exp(logprobs[:50]).sum(), abs=0.04)  # 4 standard errors


def test_nothing_follows_where_nothing_may():
    logprobs = np.full(4, -np.inf)
    assert _draw(Drawing((0,), 5), 0.5, {}, np.arange(4), logprobs, is_all=True) is None


@pytest.mark.parametrize("fields", [{}, {"temperature": 0.8, "top_p": 0.9}, {"temperature": 1.5}], ids=str)
def test_a_text_is_the_same_however_many_tokens_are_looked_at(monkeypatch, fields):
    texts = []
    for looked_at in (1, 2, 3, 8, 512):
        monkeypatch.setattr(sampling, "_LOOKED_AT", looked_at)
        with TestClient(create_app(make_engine())) as client:
            body = {"model": "tiny", "prompt": "ab", "max_tokens": 30, "seed": 3, "n": 4, **fields}
            answer = client.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            texts.append([choice["text"] for choice in answer.json()["choices"]])
    assert all(text == texts[0] for text in texts)
    assert len(set(texts[0])) > 1
