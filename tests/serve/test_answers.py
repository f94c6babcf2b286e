"""What the endpoints answer: shapes, fields, and that each field does what it says."""

from collections import Counter

import numpy as np
import pytest
from starlette.testclient import TestClient

from qstar_decoding.agents import AStarPlanner, QHeuristic, SearchEngine
from qstar_decoding.serve.app import create_app
from qstar_decoding.tasks import load_task

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def chat(client, **fields):
    body = {"model": "tiny", "messages": [{"role": "user", "content": "ab"}], "max_tokens": 8, "seed": 0, **fields}
    return client.post(CHAT, json=body)


def complete(client, **fields):
    return client.post(COMPLETIONS, json={"model": "tiny", "prompt": "ab", "max_tokens": 8, "seed": 0, **fields})


def test_a_chat_is_answered_in_openais_shape(client):
    answer = chat(client)
    assert answer.status_code == 200, answer.text
    content = answer.json()
    assert content["object"] == "chat.completion"
    [choice] = content["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["finish_reason"] in ("stop", "length")
    usage = content["usage"]
    assert usage["prompt_tokens"] == 2
    assert usage["total_tokens"] == 2 + usage["completion_tokens"]


@pytest.mark.parametrize("model", ["astar/tiny", "beam/tiny", "best-of-n/tiny", "greedy/tiny", "mcts/tiny"])
def test_a_search_carries_its_certificate(client, engine, model):
    answer = complete(client, model=model, qstar={"reward": "length", "budget": 100})
    assert answer.status_code == 200, answer.text
    [choice] = answer.json()["choices"]
    report = choice["qstar"]
    assert report["objective"] == pytest.approx(report["reward"] + report["logprob_weight"] * report["logprob"])
    assert report["lower_bound"] <= report["upper_bound"]
    assert answer.json()["usage"]["search"]["lm_tokens"] > 0


def test_a_search_finds_what_the_planner_finds(client, engine):
    answer = complete(client, model="astar/tiny", qstar={"reward": "pangram", "budget": 100}, max_tokens=6)
    [choice] = answer.json()["choices"]
    plan = engine.decoder.plan("ab", 100, reward="pangram", max_new_tokens=6)
    assert choice["text"] == plan.text
    assert choice["qstar"]["objective"] == pytest.approx(plan.objective)


# -- fields -----------------------------------------------------------------------------------------------------------


def test_a_seed_repeats_and_n_choices_differ(client):
    first, again, other = (complete(client, n=4, max_tokens=20, seed=seed).json() for seed in (7, 7, 8))
    texts = [choice["text"] for choice in first["choices"]]
    assert texts == [choice["text"] for choice in again["choices"]]
    assert texts != [choice["text"] for choice in other["choices"]]
    assert len(set(texts)) > 1
    assert [choice["index"] for choice in first["choices"]] == [0, 1, 2, 3]
    assert first["usage"]["completion_tokens"] <= 80


def test_tokens_are_drawn_as_often_as_they_are_likely(client, engine):
    """Temperature, nucleus, bias and penalties against the softmax, of the whole vocabulary."""
    lm = engine.mdp.model
    [logprobs] = lm.forward([lm.encode("ab")])[1].astype(float)

    def shares(**fields):
        content = complete(client, n=128, max_tokens=1, **fields).json()["choices"]
        more = complete(client, n=128, max_tokens=1, **{**fields, "seed": 1}).json()["choices"]
        counts = Counter(choice["text"] for choice in content + more)
        return np.array([counts[text] / 256 for text in lm.vocabulary])

    def softmax(logits):
        p = np.exp(logits - logits.max())
        return p / p.sum()

    bias = {"2": 3.0, "3": -100}
    changed = logprobs + np.array([0, 0, 3, -100, 0, 0, 0, 0])
    nucleus = softmax(logprobs)
    order = np.argsort(-nucleus)
    kept = order[: int(np.searchsorted(nucleus[order].cumsum(), 0.7)) + 1]
    inside = np.where(np.isin(np.arange(8), kept), logprobs, -np.inf)
    for fields, logits in (
        ({"temperature": 1}, logprobs),
        ({"temperature": 2}, logprobs / 2),
        ({"temperature": 0.5}, logprobs / 0.5),
        ({"logit_bias": bias}, changed),
        ({"top_p": 0.7}, inside),
    ):
        assert np.abs(shares(**fields) - softmax(logits)).max() < 0.11, fields  # 256 draws: 3.5 standard errors
    assert shares(temperature=0).max() == shares(top_p=0).max() == 1


def test_penalties_keep_tokens_from_coming_again(client):
    texts = [complete(client, max_tokens=6, temperature=0, presence_penalty=p).json() for p in (0, 2)]
    plain, varied = (content["choices"][0]["text"] for content in texts)
    often = [complete(client, max_tokens=6, temperature=0, frequency_penalty=p).json() for p in (-2, 2)]
    assert len(set(varied)) >= len(set(plain))
    assert len({content["choices"][0]["text"] for content in often}) == 2


@pytest.mark.parametrize("model", ["tiny", "astar/tiny", "greedy/tiny"])
def test_stop_and_length_end_a_text(client, model):
    whole = complete(client, model=model, temperature=0, max_tokens=6).json()["choices"][0]
    assert whole["finish_reason"] in ("stop", "length")
    for stop in ("c", ["d", "e"]):
        choice = complete(client, model=model, temperature=0, max_tokens=6, stop=stop).json()["choices"][0]
        assert not set(choice["text"]) & set(stop)
    if model == "tiny":
        assert complete(client, model=model, max_tokens=1).json()["usage"]["completion_tokens"] == 1


@pytest.mark.parametrize("model", ["tiny", "astar/tiny"])
def test_logprobs_are_those_of_the_language_model(client, engine, model):
    lm = engine.mdp.model
    choice = complete(client, model=model, prompt=["ab"], max_tokens=5, logprobs=3, echo=True).json()["choices"][0]
    shown = choice["logprobs"]
    assert choice["text"].startswith("ab")
    assert shown["tokens"][:2] == ["a", "b"]
    assert "".join(shown["tokens"]) == choice["text"]
    assert shown["token_logprobs"][0] is shown["top_logprobs"][0] is None
    assert shown["text_offset"] == list(range(len(choice["text"])))
    ids = lm.encode(choice["text"])
    for place in range(1, len(ids)):
        [expected] = lm.forward([ids[:place]])[1]
        assert shown["token_logprobs"][place] == pytest.approx(float(expected[ids[place]]), abs=1e-5)
        best = np.sort(expected)[::-1][:3]
        listed = sorted(shown["top_logprobs"][place].values(), reverse=True)
        assert listed[:3] == pytest.approx(best.tolist(), abs=1e-5)
        assert lm.vocabulary[ids[place]] in shown["top_logprobs"][place] or ids[place] in lm.eos_token_ids


def test_a_prompt_is_scored_as_lm_eval_asks_for_it(client, engine):
    lm, ids = engine.mdp.model, [[0, 1, 2, 3], [4, 5, 6]]
    both = complete(client, prompt=ids, echo=True, max_tokens=0, logprobs=1).json()
    one_more = complete(client, prompt=ids, echo=True, max_tokens=1, logprobs=1, temperature=0).json()
    for tokens, choice, longer in zip(ids, both["choices"], one_more["choices"], strict=True):
        shown = choice["logprobs"]["token_logprobs"]
        assert len(shown) == len(tokens)
        assert longer["logprobs"]["token_logprobs"][: len(tokens)] == shown
        expected = [float(lm.forward([tokens[:i]])[1][0][tokens[i]]) for i in range(1, len(tokens))]
        assert shown[1:] == pytest.approx(expected, abs=1e-5)
    assert both["usage"]["completion_tokens"] == 0


def test_a_chat_has_its_tokens_with_their_bytes(client):
    content = chat(client, logprobs=True, top_logprobs=2, max_tokens=4).json()["choices"][0]
    for token in content["logprobs"]["content"]:
        assert bytes(token["bytes"]).decode() == token["token"]
        assert len(token["top_logprobs"]) == 2
        assert token["logprob"] <= max(other["logprob"] for other in token["top_logprobs"]) + 1e-6


@pytest.mark.parametrize("model", ["tiny", "astar/tiny", "beam/tiny"])
def test_constraints_hold(client, model):
    pytest.importorskip("llguidance")
    for constraint, holds in (
        ({"regex": "[ab]{2,4}"}, lambda text: set(text) <= {*"ab"} and 2 <= len(text) <= 4),
        ({"grammar": 'start: "a" ("b" | "c")+'}, lambda text: text[0] == "a" and set(text[1:]) <= {*"bc"}),
        ({"banned": ["a", "c"]}, lambda text: not set(text) & {*"ac"}),
        ({"forced": ["g"], "min_tokens": 2}, lambda text: "g" in text and len(text) >= 2),
    ):
        if model == "tiny" and "regex" not in constraint:
            continue
        answer = complete(client, model=model, max_tokens=6, qstar={"constraint": constraint, "reward": "length"})
        assert answer.status_code == 200, answer.text
        assert holds(answer.json()["choices"][0]["text"])


def test_n_choices_of_a_search_are_the_best(client, engine):
    choices = complete(client, model="astar/tiny", n=3, max_tokens=5, qstar={"budget": 300}).json()["choices"]
    plan = engine.decoder.plan("ab", 300, n=3, max_new_tokens=5)
    assert [choice["text"] for choice in choices] == [completion.text for completion in plan.best(3)]
    assert [choice["qstar"]["certified"] for choice in choices[1:]] == [False, False]
    drawn = complete(client, model="best-of-n/tiny", n=3, max_tokens=5, qstar={"budget": 300, "n": 20}).json()
    objectives = [choice["qstar"]["objective"] for choice in drawn["choices"]]
    assert objectives == sorted(objectives, reverse=True)


@pytest.mark.parametrize(
    ("limit", "reason"), [({"gap": 10.0}, "gap"), ({"target": -10.0}, "target"), ({"patience": 1}, "patience")]
)
def test_a_search_stops_when_it_is_good_enough(client, limit, reason):
    qstar = {"reward": "3 * pangram", "budget": 500, **limit}
    [choice] = complete(client, model="best-of-n/tiny", qstar={**qstar, "n": 200}).json()["choices"]
    assert choice["qstar"]["stop_reason"] == reason


def test_parts_of_a_reward_add_up(client):
    qstar = {"reward": "0.5 * length + 0.25 * forbidden_words('c', 'd')", "logprob_weight": 0.1}
    [choice] = complete(client, qstar=qstar).json()["choices"]  # a plain model: A* by default
    report = choice["qstar"]
    assert report["decoder"] == "astar"
    assert len(report["parts"]) == 2
    assert report["objective"] == pytest.approx(report["reward"] + 0.1 * report["logprob"])


def test_columns_reach_the_reward(client):
    asked = {"model": "astar/tiny", "max_tokens": 4}
    qstar = {"reward": "keywords", "columns": {"keywords": ["abc"]}}
    assert complete(client, **asked, qstar=qstar).json()["choices"][0]["qstar"]["reward"] is not None
    refused = complete(client, **asked, qstar={"reward": "keywords"})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "qstar"
    assert "keywords" in refused.json()["error"]["message"]


def test_the_models_are_listed_and_found(client):
    listed = [model["id"] for model in client.get("/v1/models").json()["data"]]
    assert listed[0] == "tiny"
    assert {"astar/tiny", "beam/tiny", "best-of-n/tiny"} <= {*listed}
    assert client.get("/v1/models/astar/tiny").json()["id"] == "astar/tiny"
    assert client.get("/v1/models/none").status_code == 404


def test_health_and_metrics(client):
    assert client.get("/health").json() == {"status": "ok"}
    complete(client)
    text = client.get("/metrics").text
    assert 'qstar_requests_total{endpoint="completions",status="200"}' in text
    assert "qstar_searches_live 0.0" in text


def test_a_shipped_q_is_a_model_on_its_language_model():
    with TestClient(create_app(SearchEngine("toy", reward="length"))) as client:
        listed = [model["id"] for model in client.get("/v1/models").json()["data"]]
        assert [name for name in listed if name.startswith("qstar-")] == ["qstar-toy"]
        body = {"model": "qstar-toy", "prompt": "ab", "qstar": {"budget": 24}}
        [choice] = client.post(COMPLETIONS, json=body).json()["choices"]
        expected = AStarPlanner(load_task("toy").mdp(), heuristic=QHeuristic("toy")).plan("ab", 24)
        assert choice["text"] == expected.text
        assert choice["qstar"]["objective"] == pytest.approx(expected.objective)
        by_field = {"model": "astar/toy", "prompt": "ab", "max_tokens": 8}
        by_field["qstar"] = {"budget": 24, "q": "toy", "reward": "3 * pangram", "top_k": 4, "logprob_weight": 0.05}
        assert client.post(COMPLETIONS, json=by_field).json()["choices"][0]["text"] == expected.text
        wrong = client.post(COMPLETIONS, json={**by_field, "qstar": {"q": "toy", "top_k": 3}})
        assert wrong.status_code == 400
        assert wrong.json()["error"]["param"] == "qstar.top_k"


# -- refusals ---------------------------------------------------------------------------------------------------------


NEUTRAL = {
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "logit_bias": None,
    "n": 1,
    "temperature": 1,
    "top_p": 1,
    "stream": False,
    "user": "me",
    "stop": None,
}


def test_what_clients_send_by_default_is_taken(client):
    of_chats = {"tools": None, "tool_choice": "none", "parallel_tool_calls": True, "store": False, "metadata": {}}
    of_chats |= {"response_format": {"type": "text"}, "service_tier": "auto", "functions": [], "logprobs": False}
    assert chat(client, **NEUTRAL, **of_chats).status_code == 200
    assert complete(client, **NEUTRAL, suffix=None, best_of=1, echo=False, logprobs=None).status_code == 200
    message = {"role": "assistant", "content": "ab", "refusal": None, "tool_calls": None, "annotations": []}
    for content in ("ab", [{"type": "text", "text": "ab"}]):
        messages = [{"role": "user", "content": content}, message, {"role": "user", "content": "c"}]
        assert chat(client, messages=messages).status_code == 200


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"nonsense": 1}, "nonsense"),
        ({"top_k": 5}, "top_k"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**9}, "max_tokens"),
        ({"max_tokens": 4, "max_completion_tokens": 5}, "max_completion_tokens"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"seed": "x"}, "seed"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"999": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"messages": []}, "messages"),
        ({"messages": "ab"}, "messages"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "ab", "tool_calls": [1]}]}, "messages.0.tool_calls"),
        ({"messages": [{"role": "user", "content": "é"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "a" * 2000}]}, "messages"),
        ({"qstar": {"nonsense": 1}}, "qstar.nonsense"),
        ({"qstar": {"budget": 0}}, "qstar.budget"),
        ({"qstar": {"columns": {"completions": "x"}}}, "qstar.columns"),
        ({"qstar": {"budget": 10**6}}, "qstar.budget"),
        ({"qstar": {"seconds": 10**6}}, "qstar.seconds"),
        ({"qstar": {"decoder": "nonsense"}}, "qstar.decoder"),
        ({"qstar": {"reward": "nonsense"}}, "qstar.reward"),
        ({"qstar": {"reward": "classifier('/tmp')"}}, "qstar.reward"),
        ({"qstar": {"reward": "relevance('user/model')"}}, "qstar.reward"),
        ({"qstar": {"reward": "coherence(model='/tmp')"}}, "qstar.reward"),
        ({"qstar": {"reward": "length * preference('/etc')"}}, "qstar.reward"),
        ({"qstar": {"reward": "min(length, static_relevance('gpt2'))"}}, "qstar.reward"),
        ({"qstar": {"reward": "length('a' * 10)"}}, "qstar.reward"),
        ({"qstar": {"reward": "__import__('os')"}}, "qstar.reward"),
        ({"qstar": {"q": "../runs"}}, "qstar.q"),
        ({"qstar": {"improvements": True}}, "qstar.improvements"),
        ({"qstar": {"n": 1}, "n": 2}, "qstar.n"),
        ({"qstar": {}, "temperature": 0.7}, "temperature"),
        ({"qstar": {}, "top_p": 0.7}, "top_p"),
        ({"qstar": {}, "logit_bias": {"1": 1}}, "logit_bias"),
        ({"qstar": {}, "frequency_penalty": 1}, "frequency_penalty"),
        ({"qstar": {"decoder": "sample"}, "temperature": 0}, "temperature"),
        ({"qstar": {"decoder": "sample"}, "top_p": 0}, "top_p"),
        ({"qstar": {"top_k": 9}}, "qstar.top_k"),
        ({"qstar": {"logprob_weight": 1e300}}, "qstar.logprob_weight"),
        ({"qstar": {"reward": "length('x')"}}, "qstar.reward"),
        ({"qstar": {"constraint": {"min_tokens": 99}}, "max_tokens": 6}, "qstar.constraint"),
        ({"qstar": {"constraint": {"regex": "z"}}}, "qstar.constraint"),
        ({"qstar": {}, "response_format": {"type": "json_object"}}, "response_format"),
        ({"model": "beam/tiny", "qstar": {"decoder": "astar"}}, "qstar.decoder"),
        ({"model": "beam/tiny", "qstar": {"q": "none"}}, None),
    ],
    ids=str,
)
def test_a_field_that_cannot_be_met_is_named(client, fields, param):
    answer = chat(client, **fields)
    if param is None:
        assert answer.status_code == 200
        return
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert "\n" not in error["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [[999]]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": ["ab", 1]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": ["ab"] * 129}, "prompt"),
        ({"prompt": ["ab"] * 128, "n": 3}, "n"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 0, "echo": True, "qstar": {}}, "max_tokens"),
        ({"messages": []}, "messages"),
    ],
    ids=str,
)
def test_a_field_of_completions_that_cannot_be_met_is_named(client, fields, param):
    answer = complete(client, **fields)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_a_body_that_is_no_json_is_refused(client):
    json_type = {"Content-Type": "application/json"}
    for body in (
        b"",
        b"{",
        b"[]",
        b"null",
        b"NaN",
        b'{"a": Infinity}',
        b"[" * 100_000,
        b"\xff",
        b'{"n": 1' + b"0" * 5000,
    ):
        answer = client.post(CHAT, content=body, headers=json_type)
        assert answer.status_code == 400, body[:20]
        assert answer.json()["error"]["type"] == "invalid_request_error"
    assert client.post(CHAT, content=b"{}", headers={"Content-Type": "text/plain"}).status_code == 415
    assert client.post(CHAT, json={}).json()["error"]["param"] == "model"
    assert client.get(CHAT).status_code == 405
    assert client.get("/v1/nothing").json()["error"]["message"]
    missing = chat(client, model="gpt-4o")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"
