"""A language model behind an API: the local model's outputs, faults of servers, secrets, and what is refused."""

from __future__ import annotations

import json
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from qstar_decoding.agents import AStarPlanner, SamplingDecoder
from qstar_decoding.envs import DecodingMDP
from qstar_decoding.errors import ConfigurationError, LanguageModelError, QStarError, ServerError, UnknownNameError
from qstar_decoding.models import (
    OpenAICompatibleLM,
    TabularLM,
    check_language_model,
    load_language_model,
)

from .fake_server import FakeServer, serving
from .tokenizers_of_kinds import byte_level, language_model, word_level

NONE = np.empty(0, dtype=np.int64)
LETTERS = "abcdefgh"


@pytest.fixture(scope="module")
def local() -> TabularLM:
    return TabularLM.random(8, 2, seed=3, concentration=0.5, name="local")


@pytest.fixture
def server(local: TabularLM) -> Iterator[FakeServer]:
    with serving(local) as running:
        yield running


def connect(server: FakeServer, **options: Any) -> OpenAICompatibleLM:
    defaults = {"reader": server.model, "retries": 0, "timeout": 5.0}
    return OpenAICompatibleLM(server.url, **{**defaults, **options})


def reward(prompt: Any, text: str) -> float:
    return text.count("c") / 4 - text.count("a") / 8


def planner(model: Any, **options: Any) -> AStarPlanner:
    return AStarPlanner(
        DecodingMDP(model, reward=reward, top_k=3, max_new_tokens=5, **options), scope="full vocabulary"
    )


@pytest.mark.parametrize("dialect", ["llama.cpp", "vllm", "strict"])
def test_plans_are_those_of_the_local_model(local: TabularLM, dialect: str) -> None:
    model = local
    if dialect == "strict":  # tokens are told by their texts, so all of them need one
        model = TabularLM.random(8, 2, seed=3, vocabulary=list(LETTERS), eos_token_ids=[], name="local")
    with serving(model, dialect=dialect) as server:
        remote = connect(server)
        plan, expected = planner(remote).plan("ab", 60), planner(model).plan("ab", 60)
        assert (plan.text, plan.usage.lm_tokens) == (expected.text, expected.usage.lm_tokens)
        assert [plan.objective, plan.upper_bound] == pytest.approx([expected.objective, expected.upper_bound], abs=1e-2)
        assert plan.upper_bound >= expected.upper_bound - 1e-6  # the server's rounding is allowed for
        assert all(body["temperature"] == 1 and body["top_p"] == 1 for body in server.bodies)


def test_qstar_serve_is_such_a_server() -> None:
    pytest.importorskip("fastapi")
    uvicorn = pytest.importorskip("uvicorn")
    from qstar_decoding.agents import SearchEngine
    from qstar_decoding.serve.app import create_app

    # Two copies: both sides hold their model's lock while they compute.
    model, served = (TabularLM.random(8, 2, seed=3, concentration=0.5, name="local") for _ in range(2))
    with SearchEngine(served, reward="length", top_k=4, max_new_tokens=8) as engine:
        running = uvicorn.Server(uvicorn.Config(create_app(engine), port=0, log_level="critical"))
        thread = threading.Thread(target=running.run, daemon=True)
        thread.start()
        while not running.started:
            time.sleep(0.01)
        try:
            port = running.servers[0].sockets[0].getsockname()[1]
            remote = OpenAICompatibleLM(f"http://127.0.0.1:{port}/v1", "local", reader=model, retries=0)
            plan, expected = planner(remote).plan("ab", 60), planner(model).plan("ab", 60)
            assert (plan.text, plan.usage.lm_tokens) == (expected.text, expected.usage.lm_tokens)
        finally:
            running.should_exit = True
            thread.join()


def test_laws(server: FakeServer) -> None:
    check_language_model(connect(server), prompts=["abc"])


def test_states_are_the_readers_and_each_prefix_is_asked_for_once(server: FakeServer, local: TabularLM) -> None:
    remote = connect(server)
    mdp, expected = (DecodingMDP(lm, reward=reward, top_k=4, max_new_tokens=4) for lm in (remote, local))
    asked = len(server.prompts)
    for process in (mdp, expected):
        tree = process.tree
        nodes = tree.roots([[0, 1], [2]])
        for _ in range(3):
            nodes = tree.expand(np.repeat(nodes, 2)[:4], np.tile([0, 1], 2))
    for column in ("hidden", "tokens", "logprobs", "path_logprob"):
        np.testing.assert_allclose(getattr(mdp.tree, column), getattr(expected.tree, column), atol=1e-6)
    new = server.prompts[asked:]
    assert len(new) == len(set(new)) == len(mdp.tree)
    mdp.tree.evict(1)
    assert len(mdp.tree) < len(expected.tree)


@pytest.mark.parametrize("limit", [None, 4])
def test_constraints_take_the_likeliest_allowed_tokens(local: TabularLM, limit: int | None) -> None:
    with serving(local, limit=limit) as server:
        remote = connect(server)
        masks = [np.isin(np.arange(8), list(kept)) for kept in ({0, 1, 2, 3, 4, 5, 6}, {5, 7}, {1})]
        arguments = ([[0, 1], [0, 1], [3]], NONE, NONE, 3, masks)
        if limit:
            with pytest.raises(ServerError, match="at most 4 logprobs"):
                remote.new_engine().compute(*arguments)
            return
        _, ours = remote.new_engine().compute(*arguments)
        _, expected = local.new_engine().compute(*arguments)
        np.testing.assert_allclose(ours.logprobs, expected.logprobs, atol=1e-6)
        listed = np.isfinite(expected.logprobs)
        np.testing.assert_array_equal(ours.tokens[listed], expected.tokens[listed])
        assert all(len(set(row)) == 3 for row in ours.tokens.tolist())


# ------------------------------------------------------------------------------------------------------------- faults


def test_passing_faults_are_tried_again(server: FakeServer, local: TabularLM) -> None:
    remote = connect(server, retries=4, timeout=0.5)
    server.faults = ["429", "500", "truncated", None, "503", "dead", "slow"]
    plan = planner(remote).plan("ab", 30)
    assert plan.text == planner(local).plan("ab", 30).text
    assert remote.usage.retries >= 5
    assert not server.faults


def with_logprobs(**changes: Any) -> str:
    good = {"content": [{"id": 1, "top_logprobs": [{"id": i, "token": "x", "logprob": -3.0} for i in range(3)]}]}
    return json.dumps({"choices": [{"text": "", "logprobs": {**good, **changes}}]})


def listed(*entries: dict[str, Any]) -> str:
    return with_logprobs(content=[{"id": 1, "top_logprobs": [{"token": "x", "logprob": -3.0, **e} for e in entries]}])


LASTING = {
    "500": "status 500: fault 500",
    "429": "status 429",
    "401": "QSTAR_API_KEY",
    "302": "status 302",
    "400": "fault 400",
    "dead": "does not answer",
    "truncated": "does not answer",
    "no JSON": "no JSON",
    "[]": "no log-probabilities",
    "{}": "no log-probabilities",
    '{"choices": []}': "no log-probabilities",
    '{"choices": [{"text": "a"}]}': "no log-probabilities",
    '{"choices": [{"text": "a", "logprobs": null}]}': "shows 0 log-probabilities",
    '{"choices": [{"text": "a", "logprobs": {"top_logprobs": [null]}}]}': "no log-probabilities",
    with_logprobs(content=[]): "shows 0 log-probabilities",
    listed({"id": 1}, {"id": 2}): "shows 2 log-probabilities where 3",
    listed({"id": 1}, {"id": 1}, {"id": 2}): "listed twice",
    listed({"id": 1}, {"id": 2}, {"id": 99}): "the token 99",
    listed({"id": -1}, {"id": 2}, {"id": 3}): "the text of no token",
    listed({}, {}, {}): "the text of no token",
    listed({"id": 1}, {"id": 2, "logprob": None}, {"id": 3}): "no log-probabilities",
    listed({"id": 1}, {"id": 2, "logprob": "NaN"}, {"id": 3}): "at most 0",
    listed({"id": 1}, {"id": 2, "logprob": 1.5}, {"id": 3}): "at most 0",
    listed(*({"id": i, "logprob": -0.5} for i in range(3))): "sum to more than 1",
}


@pytest.mark.parametrize("fault", LASTING, ids=[f"{i}-{message[:20]}" for i, message in enumerate(LASTING.values())])
def test_lasting_faults_are_errors_in_one_line_and_change_nothing(
    server: FakeServer, local: TabularLM, fault: str
) -> None:
    remote = connect(server)
    astar, expected = planner(remote), planner(local).plan("ab", 40)
    astar.plan("ab", 10)
    nodes = len(astar.mdp.tree)
    server.faults = [fault] * 40
    with pytest.raises((ServerError, LanguageModelError), match=LASTING[fault]) as caught:
        astar.plan("ab", 40)
    assert len(str(caught.value).splitlines()) == 1
    assert len(astar.mdp.tree) == nodes
    server.faults = []
    assert astar.plan("ab", 40).text == expected.text


def test_a_search_goes_on_when_the_server_is_back(local: TabularLM) -> None:
    whole = FakeServer(local)
    whole.start()
    reference = connect(whole)
    before = len(whole.prompts)
    expected = planner(reference).plan("ab", 60)
    uninterrupted = len(whole.prompts) - before
    whole.stop()
    with serving(local) as server:
        remote = connect(server, max_connections=1)  # no other answer is lost as the server dies
        before = len(server.prompts)
        astar = planner(remote)
        server.dies_after = 11  # in the middle of a step
        with pytest.raises(ServerError, match="plan again when the server is back"):
            astar.plan("ab", 60)
        server.stop()
        with pytest.raises(ServerError, match="does not answer"):
            astar.plan("ab", 60)
        server.dies_after = None
        server.start()
        plan = astar.plan("ab", 60)
        assert (plan.text, plan.objective) == (expected.text, expected.objective)
        assert len(server.prompts) - before == uninterrupted  # no prefix that was answered is paid for twice


# ------------------------------------------------------------------------------------------------------ many requests


def test_requests_of_a_step_run_at_the_same_time_and_are_bounded(server: FakeServer, local: TabularLM) -> None:
    remote = connect(server, max_connections=3)
    server.seconds = 0.02
    best = SamplingDecoder(DecodingMDP(remote, reward=reward, top_k=3, max_new_tokens=4))
    best.plan("ab", 40)
    assert 1 < server.most_at_once <= 3


def test_tokens_and_costs_are_counted(server: FakeServer) -> None:
    remote = connect(server, prices=(1e6, 2e6))
    before = remote.usage.requests, remote.usage.prompt_tokens, remote.usage.completion_tokens
    paid = remote.cost
    remote.new_engine().compute([[0, 1, 2], [3]], NONE, NONE, 2)
    after = remote.usage.requests, remote.usage.prompt_tokens, remote.usage.completion_tokens
    assert tuple(np.subtract(after, before)) == (2, 4, 2)
    assert remote.cost - paid == 4 + 2 * 2


# ------------------------------------------------------------------------------------------------------------ secrets


def test_keys_stay_out_of_everything_that_is_shown_or_stored(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.key = secret = "sk-very-secret-0815"
    with pytest.raises(ServerError, match="401"):
        connect(server)
    remote = connect(server, api_key=secret)
    dumped = pickle.dumps(remote)
    shown = [repr(remote), str(vars(remote)), str(vars(remote._client)), repr(dumped), repr(remote._recipe)]
    server.key = "another"
    with pytest.raises(ServerError, match=r"wrong key \*\*\*") as caught:
        remote.ask([0], 2)
    shown += [str(caught.value), repr(caught.value)]
    assert not [text for text in shown if secret in text]
    server.key = secret
    with pytest.raises(ServerError, match="QSTAR_API_KEY"):
        pickle.loads(dumped)
    monkeypatch.setenv("QSTAR_API_KEY", secret)
    again = pickle.loads(dumped)
    assert again.ask([0], 2) == remote.ask([0], 2)


# ------------------------------------------------------------------------------------------------------------ refusals


def renormalised(answer: dict[str, Any]) -> None:
    for place in answer["choices"][0]["logprobs"]["content"]:
        total = np.logaddexp.reduce([entry["logprob"] for entry in place["top_logprobs"]])
        for entry in place["top_logprobs"]:
            entry["logprob"] -= total


def cut(answer: dict[str, Any]) -> None:
    answer["usage"]["prompt_tokens"] -= 1


def other_text(answer: dict[str, Any]) -> None:
    answer["choices"][0]["text"] = "Zürich" + answer["choices"][0]["text"]


def other_reading(answer: dict[str, Any]) -> None:
    answer["usage"]["prompt_tokens"] = 4


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (renormalised, "not those of the full softmax"),
        (cut, "read [0-9]+ tokens of a prompt of"),
        (other_text, "give the server's tokenizer as `tokenizer`"),
    ],
)
def test_servers_that_would_be_silently_wrong_are_refused(
    server: FakeServer, change: Callable[[dict[str, Any]], None], reason: str
) -> None:
    server.change = change
    with pytest.raises(LanguageModelError, match=reason):
        connect(server)


def test_a_server_with_another_tokenizer_is_refused() -> None:
    words = language_model(word_level())
    with serving(language_model(byte_level())) as server, pytest.raises(QStarError, match="token"):
        OpenAICompatibleLM(server.url, reader=words, retries=0)


def test_a_larger_k_than_the_server_shows_is_refused(local: TabularLM) -> None:
    with serving(local, limit=5) as server:
        remote = connect(server)
        with pytest.raises(ServerError, match="at most 5 logprobs"):
            DecodingMDP(remote, reward=reward, top_k=6, max_new_tokens=5).tree.roots([[0]])


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"base_url": "127.0.0.1:8080"}, "base_url is an address"),
        ({"base_url": "ftp://127.0.0.1"}, "base_url is an address"),
        ({"base_url": "http://me:secret@127.0.0.1:1/v1"}, "give the key as api_key"),
        ({"reader": None}, "needs a reader or a tokenizer"),
        ({"timeout": 0}, "timeout"),
        ({"retries": -1}, "retries"),
        ({"max_connections": 0}, "max_connections"),
        ({"prices": (1, -1)}, "prices"),
        ({"model": "other"}, "unknown model of the server 'other'"),
        ({"tokenizer": 3}, "tokenizer is one of transformers"),
        ({"tokenizer": "/no/such/folder"}, "unknown tokenizer"),
    ],
)
def test_wrong_arguments(server: FakeServer, arguments: dict[str, Any], reason: str) -> None:
    options = {"base_url": server.url, "reader": server.model, "retries": 0, **arguments}
    with pytest.raises(ConfigurationError, match=reason) as caught:
        OpenAICompatibleLM(options.pop("base_url"), options.pop("model", None), **options)
    assert "me:secret" not in str(caught.value)


def test_the_model_is_named_where_a_server_has_several(server: FakeServer) -> None:
    server.models = [{"id": "one"}, {"id": "two", "max_model_len": 77}]
    with pytest.raises(ConfigurationError, match="2 models"):
        connect(server)
    named = connect(server, model="two")
    assert (named.name, named.context_length) == ("two", 77)
    assert server.bodies[-1]["model"] == "two"
    with pytest.raises(UnknownNameError):
        connect(server, model="three")


def test_models_by_address(server: FakeServer) -> None:
    options = {"reader": server.model, "retries": 0}
    remote = load_language_model(server.url, **options)
    assert remote is load_language_model(server.url, **options)
    with pytest.raises(ConfigurationError, match="no argument 'readr'"):
        load_language_model(server.url, readr=None)


# ---------------------------------------------------------------------------------------------------- another tokenizer


def test_a_reader_with_another_tokenizer_reads_the_text() -> None:
    """The server's model has tokens of bytes, the reader words."""
    served, reader = language_model(byte_level(), name="served"), language_model(word_level(), name="words")
    with serving(served, dialect="vllm") as server:
        server.models = [{"id": "served", "max_model_len": 64}]
        remote = OpenAICompatibleLM(server.url, reader=reader, tokenizer=byte_level(), retries=0)
        ids = remote.encode("hello world")
        assert ids == served.encode("hello world")
        _, outputs = remote.new_engine().compute([ids, ids[:-1]], NONE, NONE, 4)
        texts = [remote.decode(ids), remote.decode(ids[:-1])]
        np.testing.assert_allclose(
            outputs.hidden, reader.forward([reader.encode(text) for text in texts])[0], rtol=0, atol=1e-4
        )
        np.testing.assert_allclose(
            outputs.logprobs, -np.sort(-served.forward([ids, ids[:-1]])[1], axis=1)[:, :4], rtol=0, atol=1e-4
        )
        vectors, known = remote.token_embeddings(), reader.token_embeddings()
        assert vectors.shape == (served.vocab_size, known.shape[1])
        whole = next(t for t in range(remote.vocab_size) if remote.decode([t]) == "the")
        np.testing.assert_allclose(vectors[whole], known[reader.encode("the")[0]], atol=1e-6)
        assert remote.reader is reader


def test_a_q_function_of_the_reader_fits(server: FakeServer, local: TabularLM) -> None:
    from qstar_decoding.agents.learning.q_function import QSpec

    remote = connect(server)
    mdp, expected = (DecodingMDP(lm, reward=reward, top_k=4, max_new_tokens=4) for lm in (remote, local))
    QSpec.of(expected, 4, shaped=False).check(mdp)


def test_without_a_reader_there_is_nothing_to_go_by() -> None:
    with serving(language_model(byte_level())) as server:
        remote = OpenAICompatibleLM(server.url, reader=None, tokenizer=byte_level(), retries=0)
        check_language_model(remote, prompts=["hello world"])
        assert not remote.new_engine().compute([[5, 6]], NONE, NONE, 2)[1].hidden.any()
