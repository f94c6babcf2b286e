"""What the tests of the server share: a language model with chats that costs nothing, and servers on it."""

from collections.abc import Iterator

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
        if isinstance(prompt, str):
            return super().encode(prompt)
        return super().encode("".join(message["content"] for message in prompt))


def chat_lm(size=8, seed=0, concentration=0.3, **options):
    made = TabularLM.random(size, 2, seed=seed, concentration=concentration)
    weights = made.forward([[a, b] for a in range(size) for b in range(size)])[1]
    table = __import__("numpy").exp(weights.astype(float)).reshape(size, size, size)
    return ChatLM(table, name="tiny", **options)


def make_engine(lm=None, **settings):
    return SearchEngine(lm or chat_lm(), **{"reward": "length", "top_k": 4, "max_new_tokens": 8, **settings})


@pytest.fixture(scope="session")
def engine():
    """The engine of the shared server."""
    return make_engine()


@pytest.fixture(scope="session")
def client(engine) -> Iterator[TestClient]:
    """A client of a server on a tiny language model, whose letters are a to g."""
    with TestClient(create_app(engine)) as client:
        yield client
