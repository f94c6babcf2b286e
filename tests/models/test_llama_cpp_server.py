"""llama.cpp's own server, with the embedded model, behind :class:`OpenAICompatibleLM`."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator

import numpy as np
import pytest

from qstar_decoding.agents import GreedyDecoder
from qstar_decoding.envs import DecodingMDP, Prompt
from qstar_decoding.errors import PromptError, ServerError
from qstar_decoding.models import OpenAICompatibleLM, TransformersLM
from qstar_decoding.models.embedded_model import gguf_path

from .llama_cpp_server import CONTEXT, llama_cpp_server

pytest.importorskip("xllamacpp")
pytestmark = pytest.mark.xdist_group("llama.cpp server")

NONE = np.empty(0, dtype=np.int64)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    gguf = gguf_path("smollm2-135m-instruct")
    if gguf is None:
        pytest.skip("the embedded model's wheel is not installed")
    with llama_cpp_server(gguf) as address:
        yield address


@pytest.fixture(scope="module")
def remote(url: str, lm: TransformersLM) -> OpenAICompatibleLM:
    return OpenAICompatibleLM(url, reader=lm)


def test_what_the_server_states_is_taken_over(remote: OpenAICompatibleLM, lm: TransformersLM) -> None:
    assert (remote.vocab_size, remote.context_length) == (lm.vocab_size, CONTEXT)
    assert remote.eos_token_ids == lm.eos_token_ids
    with pytest.raises(PromptError, match=str(CONTEXT)):
        DecodingMDP(remote, reward="length", max_new_tokens=8).encode(Prompt("word " * 600))


def test_log_probabilities_are_near_those_of_the_same_weights_in_float32(
    remote: OpenAICompatibleLM, lm: TransformersLM
) -> None:
    """llama.cpp multiplies 4-bit weights with 8-bit activations, which moves a log-probability by up to .3 nats."""
    ids = [lm.encode(text) for text in ("The play at the village theatre", "def area(radius):")]
    hidden, logprobs = remote.forward(ids)
    expected_hidden, expected = lm.forward(ids)
    np.testing.assert_allclose(hidden, expected_hidden, atol=1e-3)
    likely = expected > -6
    assert np.abs(logprobs - expected)[likely].max() < 0.6
    np.testing.assert_allclose(np.exp(logprobs).sum(axis=1), 1, atol=1e-3)
    _, outputs = remote.new_engine().compute(ids, NONE, NONE, 8)
    # The server may round otherwise in another batch.
    np.testing.assert_allclose(outputs.logprobs, -np.sort(-logprobs, axis=1)[:, :8], atol=0.1)


def test_greedy_texts_are_the_servers_own(url: str, remote: OpenAICompatibleLM) -> None:
    decoder = GreedyDecoder(DecodingMDP(remote, reward="length", top_k=2, max_new_tokens=12))
    for text in ("The capital of France is", "Yesterday's dinner at the harbour"):
        body = {"prompt": remote.encode(text), "max_tokens": 12, "temperature": 0}
        request = urllib.request.Request(f"{url}/completions", json.dumps(body).encode())
        with urllib.request.urlopen(request) as response:
            expected = json.load(response)["choices"][0]["text"]
        assert decoder.plan(text).text == expected


def test_parts_of_characters_have_log_probabilities_too(remote: OpenAICompatibleLM) -> None:
    """llama.cpp's server states none where the token that it sampled ends within a character."""
    ids = remote.encode("🦜🦜🦜🦜🦜🦜")
    prefixes = [ids[:length] for length in range(len(ids) - 4, len(ids) + 1)]
    assert any(remote.decode(prefix).endswith("\ufffd") for prefix in prefixes)
    _, outputs = remote.new_engine().compute(prefixes, NONE, NONE, 4)
    assert np.isfinite(outputs.logprobs).all()


def test_a_search_goes_on_when_the_server_is_back(lm: TransformersLM) -> None:
    gguf = gguf_path("smollm2-135m-instruct")
    if gguf is None:
        pytest.skip("the embedded model's wheel is not installed")
    with llama_cpp_server(gguf) as address:
        remote = OpenAICompatibleLM(address, reader=lm, retries=1)
        decoder = GreedyDecoder(DecodingMDP(remote, reward="length", top_k=2, max_new_tokens=6))
        decoder.plan("Once upon a time")
    with pytest.raises(ServerError, match="plan again when the server is back"):
        decoder.plan("The capital of France is")
    with llama_cpp_server(gguf, port=int(address.rpartition(":")[2].removesuffix("/v1"))):
        assert decoder.plan("The capital of France is").text
        paid = remote.usage.requests
        assert decoder.plan("Once upon a time").text
        assert remote.usage.requests == paid  # the finished plan's prefixes are kept
