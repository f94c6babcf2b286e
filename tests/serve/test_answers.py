"""What the endpoints answer: shapes, fields, and that each field does what it says."""

import pytest

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
