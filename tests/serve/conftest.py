"""What the tests of the server share: language models that cost nothing, with chats and with parts of characters."""

import json
from collections.abc import Iterator

import numpy as np
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")

from starlette.testclient import TestClient

from qstar_decoding.agents import SearchEngine
from qstar_decoding.models.tabular import TabularLM
from qstar_decoding.serve.app import create_app


class ChatLM(TabularLM):
    """A TabularLM that takes chats: the contents of the messages, one after the other."""

    def encode(self, prompt, **template):
        return super().encode(prompt if isinstance(prompt, str) else "".join(m["content"] for m in prompt))


class ByteLM(ChatLM):
    """A model whose tokens are bytes, so that a character may take several; whatever is no character is shown as �."""

    def decode(self, token_ids):
        parts = [self.pieces[token] for token in token_ids if token not in self.eos_token_ids]
        return b"".join(parts).decode(errors="replace")


def make_lm(kind=ChatLM, size=8, seed=0, pieces=None, concentration=0.3):
    """Return a random model of order 1 with the name ``tiny``."""
    rows = np.random.default_rng(seed).dirichlet(np.full(size, concentration), size=size)
    vocabulary = None if pieces is None else [piece.decode(errors="replace") for piece in pieces]
    lm = kind(np.maximum(rows, 1e-9), name="tiny", vocabulary=vocabulary)
    lm.pieces = pieces
    return lm


def make_engine(lm=None, **settings):
    return SearchEngine(lm or make_lm(), **{"reward": "length", "top_k": 4, "max_new_tokens": 8, **settings})


def events(answer):
    """Return the chunks of a stream, which ends as OpenAI's do."""
    *lines, last = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line.startswith("data: ")]
    assert last == "[DONE]"
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="session")
def engine():
    """The engine of the shared server."""
    return make_engine()


@pytest.fixture(scope="session")
def client(engine) -> Iterator[TestClient]:
    """A client of a server on a tiny language model, whose letters are a to g."""
    with TestClient(create_app(engine)) as client:
        yield client
