"""Streams: what is sent is a beginning of the answer, always, and all of it in the end."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from qstar_decoding.agents import Budget
from qstar_decoding.agents.planning.decoder import plan_of
from qstar_decoding.agents.planning.registry import DECODERS, by_command, make_decoder
from qstar_decoding.agents.search.loop import drive
from qstar_decoding.agents.search.request import as_request
from qstar_decoding.envs import DecodingMDP
from qstar_decoding.rewards import as_reward
from qstar_decoding.serve.app import create_app
from qstar_decoding.serve.settling import settled_text

from .conftest import ByteLM, events, make_engine, make_lm

# Letters, a space, an empty text, and the two bytes of é, alone and joined to letters.
PIECES = [b"a", b"b ", b" ", b"\xc3", b"\xa9", b"\xa9c", b"d\xc3", b""]


def spread(prompt, completion):
    """A reward in [0, 1] without any pattern, of which the bounds know nothing."""
    return (sum(map(ord, completion)) * 7919 % 101) / 100


REWARDS = [as_reward(spread, lower=0.0, upper=1.0), as_reward("length"), as_reward("0.1 * length")]


@settings(max_examples=150)
@given(
    seed=st.integers(0, 10_000),
    decoder=st.sampled_from([*DECODERS]),
    reward=st.sampled_from(REWARDS),
    horizon=st.integers(1, 7),
    budget=st.integers(1, 60),
    weight=st.sampled_from([0.0, 0.05, 2.0]),
    stop=st.sampled_from([(), ("é",), ("a ", "dé"), ("b a",)]),
    n=st.sampled_from([None, 1, 3]),
    by_q=st.booleans(),
)
def test_settled_text_begins_the_answer(seed, decoder, reward, horizon, budget, weight, stop, n, by_q):
    lm = make_lm(ByteLM, seed=seed, pieces=PIECES, concentration=0.2)
    changes = {"reward": reward, "max_new_tokens": horizon, "logprob_weight": weight, "stop": stop, "top_k": 3}
    mdp = DecodingMDP(lm, **changes)
    if decoder == "args" and not reward.has_potential:
        return
    options = {}
    if by_q and by_command(decoder).uses == "q":
        options = {"heuristic": lambda mdp, prompts, nodes: mdp.edge_returns(nodes) + 0.1, "score": "q"}
    made = make_decoder(decoder, mdp, **options).with_changes(n=n, seed=seed)
    [active] = made.start_requests([as_request("a", budget)])
    sent = [settled_text(active.search, made)]
    sent += [settled_text(active.search, made) for _ in drive([active])]
    text = plan_of(active).text
    for settled in sent:
        assert text.startswith(settled), (settled, text)


def test_a_greedy_decoder_and_a_beam_settle_text_before_the_end():
    lm = make_lm(ByteLM, seed=5, pieces=PIECES, concentration=0.2)
    for decoder, width in (("greedy", {}), ("beam", {"width": 2})):
        made = make_decoder(decoder, DecodingMDP(lm, reward="length", max_new_tokens=12, top_k=4), **width)
        [active] = made.start_requests([as_request("a", 100)])
        sent = [settled_text(active.search, made) for _ in drive([active])]
        assert len(set(sent)) > 2, decoder


def test_a_deadline_settles_what_the_bound_allows_only():
    lm = make_lm(ByteLM, seed=5, pieces=PIECES, concentration=0.2)
    made = make_decoder("beam", DecodingMDP(lm, reward=REWARDS[0], max_new_tokens=6, top_k=4))
    [active] = made.start_requests([as_request("a", Budget(lm_tokens=60, seconds=60))])
    sent = [settled_text(active.search, made) for _ in drive([active])]
    assert all(plan_of(active).text.startswith(settled) for settled in sent)


@pytest.fixture(scope="module")
def bytes_client():
    """A client of a server on a model of bytes."""
    lm = make_lm(ByteLM, seed=5, pieces=PIECES, concentration=1.0)
    with TestClient(create_app(make_engine(lm, reward=REWARDS[0]))) as client:
        yield client


PLAIN = [{"model": "tiny", "temperature": temperature} for temperature in (0, 0.7, 2)]
SEARCHED = [
    {"model": f"{decoder}/tiny", "qstar": {"budget": 30}}
    for decoder in ("astar", "beam", "greedy", "best-of-n", "majority", "mcts")
]


@pytest.mark.parametrize("asked", [*PLAIN, *SEARCHED], ids=str)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_stream_ends_as_the_whole_answer(bytes_client, path, asked):
    is_chat = path == "/v1/chat/completions"
    for seed, stop, n in zip(range(4), (None, ["é", " a"]) * 2, (1, 1, 2, 2), strict=True):
        body = {**asked, "max_tokens": 7, "seed": seed, "stop": stop, "n": n}
        body |= {"messages": [{"role": "user", "content": "a"}], "logprobs": True, "top_logprobs": 2} if is_chat else {
            "prompt": ["a", [0, 2]], "echo": bool(seed % 2), "logprobs": 2}  # fmt: skip
        whole = bytes_client.post(path, json=body).json()
        answer = bytes_client.post(path, json={**body, "stream": True, "stream_options": {"include_usage": True}})
        *chunks, last = events(answer)
        assert last["choices"] == []
        assert last["usage"].keys() == whole["usage"].keys()
        assert last["usage"]["total_tokens"] == whole["usage"]["total_tokens"]
        for choice in whole["choices"]:
            parts = [part for chunk in chunks for part in chunk["choices"] if part["index"] == choice["index"]]
            assert [part["finish_reason"] for part in parts if part["finish_reason"]] == [choice["finish_reason"]]
            assert parts[-1].get("qstar") == choice.get("qstar")
            logprobs = [part["logprobs"] for part in parts if part["logprobs"] is not None]
            if is_chat:
                assert parts[0]["delta"]["role"] == "assistant"
                assert "".join(part["delta"].get("content", "") for part in parts) == choice["message"]["content"]
                tokens = [token for some in logprobs for token in some["content"]]
                assert tokens == choice["logprobs"]["content"]
            else:
                assert "".join(part["text"] for part in parts) == choice["text"]
                for name, values in choice["logprobs"].items():
                    assert [value for some in logprobs for value in some[name]] == values


def test_plain_tokens_go_out_one_by_one(bytes_client):
    body = {"model": "tiny", "prompt": "a", "max_tokens": 12, "seed": 1, "stream": True}
    texts = [chunk["choices"][0]["text"] for chunk in events(bytes_client.post("/v1/completions", json=body))]
    assert sum(bool(text) for text in texts) > 4


def test_improvements_are_events_of_their_own(client):
    body = {"model": "astar/tiny", "prompt": "ab", "max_tokens": 6, "stream": True}
    body["qstar"] = {"reward": "3 * pangram", "budget": 200, "improvements": True}
    chunks = events(client.post("/v1/completions", json=body))
    improvements = [chunk["qstar"]["improvement"] for chunk in chunks if "qstar" in chunk]
    objectives = [improvement["objective"] for improvement in improvements]
    assert objectives == sorted(objectives)
    assert objectives
    assert objectives[-1] == chunks[-1]["choices"][0]["qstar"]["objective"]
