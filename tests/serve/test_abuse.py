"""Abuse: whatever clients send, in whatever way, the server stays up, answers clearly, and mixes nothing up."""

import asyncio
import contextlib
import dataclasses
import gc
import json
import random
import socket
import time
from pathlib import Path

import psutil
import pytest

from qstar_decoding.serve.guard import Limits

from .conftest import make_engine
from .live import BODY, live, parsed, receive_all, request

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "ab"}], "max_tokens": 4, "seed": 0}
PATHS = {"/v1/completions": BODY, "/v1/chat/completions": CHAT}
LONG = {"model": "astar/tiny", "prompt": "a", "max_tokens": 900, "qstar": {"top_k": 8, "budget": 9000}}
LIMITS = Limits(body_bytes=20_000, send_seconds=2.0, live=600, requests=600)
GUARD = {"limits": LIMITS, "keys": ["right", "other"], "hosts": ["127.0.0.1"]}


@pytest.fixture(scope="module")
def server():
    with live(make_engine(), **GUARD) as server:
        yield server


@pytest.fixture(scope="module")
def hasty():
    """A server that waits half a second for what clients have to say."""
    guard = {**GUARD, "limits": dataclasses.replace(LIMITS, body_seconds=0.5)}
    with live(make_engine(), silence_seconds=0.5, **guard) as server:
        yield server


KEY = {"Authorization": "Bearer right"}


def still_works(server):
    """Check that a plain request is answered as ever, and that nothing of others is left."""
    assert server.settled() == (0, 0, 0)
    status, answer = server.post(BODY, headers=KEY)
    assert status == 200
    return answer["choices"][0]["text"]


# -- one table of cases: docs/serve.md shows it ----------------------------------------------------------------------

DEEP = b'{"model": "tiny", "prompt": ' + b"[" * 9000 + b"]" * 9000 + b"}"
REGEX = json.dumps({**BODY, "qstar": {"constraint": {"regex": "("}}}).encode()
# what is sent, the body or None for BODY, changed headers, the status
CASES = [
    ("an empty body", b"", {}, 400),
    ("no JSON", b"model=tiny", {}, 400),
    ("half of a JSON object", b'{"model": "tiny", "prompt": "a', {}, 400),
    ("bytes that are no UTF-8", b'{"model": "tiny", "prompt": "\xff\xfe"}', {}, 400),
    ("half of a surrogate pair", b'{"model": "tiny", "prompt": "\\ud800"}', {}, 400),
    ("a list", b"[]", {}, 400),
    ("a number", b"1e999", {}, 400),
    ("NaN", b'{"model": "tiny", "prompt": "a", "temperature": NaN}', {}, 400),
    ("an integer of 5,000 digits", b'{"model": "tiny", "prompt": "a", "seed": ' + b"9" * 5000 + b"}", {}, 400),
    ("9,000 nested lists", DEEP, {}, 400),
    ("a field twice", b'{"model": "tiny", "prompt": "a", "prompt": "b", "max_tokens": 1}', {}, 200),
    ("an unknown field", json.dumps({**BODY, "promt": "a"}).encode(), {}, 400),
    ("no prompt", b'{"model": "tiny"}', {}, 400),
    ("an unknown model", json.dumps({**BODY, "model": "../../etc/passwd"}).encode(), {}, 404),
    ("a path as a reward", json.dumps({**LONG, "qstar": {"reward": "/etc/passwd"}}).encode(), {}, 400),
    ("code as a reward", json.dumps({**LONG, "qstar": {"reward": "__import__('os')"}}).encode(), {}, 400),
    ("a regular expression that cannot be compiled", REGEX, {}, 400),
    ("a body over the limit", json.dumps({**BODY, "prompt": "a" * 30_000}).encode(), {}, 413),
    ("a false length over the limit", None, {"Content-Length": "99999999999"}, 413),
    ("a length that is no number", None, {"Content-Length": "many"}, 400),
    ("a negative length", None, {"Content-Length": "-1"}, 400),
    ("a prompt over the context", json.dumps({**BODY, "prompt": "a" * 5000}).encode(), {}, 400),
    ("10,000 texts", json.dumps({**BODY, "n": 10_000}).encode(), {}, 400),
    ("a wrong key", None, {"Authorization": "Bearer wrong"}, 401),
    ("no key", None, {"Authorization": None}, 401),
    ("an empty key", None, {"Authorization": "Bearer "}, 401),
    ("a key of 10,000 letters", None, {"Authorization": "Bearer " + "x" * 10_000}, 401),
    ("a key that is no ASCII", None, {"Authorization": "Bearer caf\u00e9"}, 401),
    ("another scheme", None, {"Authorization": "Basic right"}, 401),
    ("a foreign Host", None, {"Host": "elsewhere.example"}, 403),
    ("no Host", None, {"Host": None}, 400),
    ("a foreign Origin", None, {"Origin": "https://elsewhere.example"}, 403),
    ("an Origin of a file", None, {"Origin": "null"}, 403),
    ("a page of another site", None, {"Sec-Fetch-Site": "cross-site"}, 403),
    ("a form", None, {"Content-Type": "text/plain"}, 415),
    ("no content type", None, {"Content-Type": None}, 415),
    ("headers of 1 MB", None, {"X-Long": "x" * 1_000_000}, 400),
]


@pytest.mark.parametrize(("name", "body", "headers", "status"), CASES, ids=[case[0] for case in CASES])
def test_a_case_of_the_table(server, name, body, headers, status):
    raw = json.dumps(BODY).encode() if body is None else body
    found, answer = parsed(server.send(request(raw, server.port, headers={**KEY, **headers})))
    assert found == status, answer
    if status >= 400 and isinstance(answer, dict):
        assert set(answer["error"]) == {"message", "type", "param", "code"}
        assert len(answer["error"]["message"].splitlines()) == 1
    assert still_works(server)


def test_the_docs_show_the_table():
    rows = [f"| {name} | {status} |" for name, _, _, status in CASES]
    page = (Path(__file__).parents[2] / "docs" / "serve.md").read_text(encoding="utf-8")
    assert "\n".join(rows) in page, "put this table into docs/serve.md:\n" + "\n".join(rows)


# -- every field with every type -------------------------------------------------------------------------------------

FIELDS = [
    "model", "prompt", "messages", "max_tokens", "max_completion_tokens", "n", "best_of", "stop", "seed", "temperature",
    "top_p", "presence_penalty", "frequency_penalty", "logit_bias", "stream", "stream_options", "user", "logprobs",
    "top_logprobs", "echo", "response_format", "suffix", "tools", "tool_choice", "functions", "metadata", "store",
    "service_tier", "reasoning_effort", "modalities", "audio", "prediction", "qstar",
]  # fmt: skip
QSTAR = [
    "decoder", "reward", "q", "budget", "seconds", "reward_calls", "gap", "target", "patience", "logprob_weight",
    "top_k", "n", "constraint", "columns", "improvements",
]  # fmt: skip
VALUES = [
    None, True, False, 0, 1, -1, 3, 1.5, -0.0, 1e308, 10**40, "", "a", "ab\n", "\x00", "ü🙂", "tiny", [], [1], ["a"],
    [[1]], [[]], [None], {}, {"a": 1}, {"type": "text"}, {"role": "user", "content": "a"}, {"regex": "a+"}, "x" * 3000,
]  # fmt: skip


def test_every_field_with_every_type_is_answered(server):
    rng, seen = random.Random(0), set()
    for path, body in PATHS.items():
        cases = [({**body, field: value}, field) for field in FIELDS for value in VALUES]
        model = {**body, "model": "astar/tiny"}
        cases += [({**model, "qstar": {"budget": 5, field: value}}, field) for field in QSTAR for value in VALUES]
        for case, field in rng.sample(cases, 200):
            status, answer = server.post(case, path, KEY)
            seen.add(status)
            assert status in (200, 400, 404), (field, case, status, answer)
            if status != 200:
                assert len(answer["error"]["message"].splitlines()) == 1
    assert seen >= {200, 400}
    assert still_works(server)


def test_damaged_bodies_are_answered(server):
    rng = random.Random(1)
    for path, body in PATHS.items():
        for _ in range(80):
            raw = bytearray(json.dumps({**body, "qstar": {"budget": 9}}).encode())
            for _ in range(rng.randint(1, 4)):
                place = rng.randrange(len(raw))
                change = rng.choice(["flip", "cut", "double", "insert"])
                if change == "flip":
                    raw[place] ^= 1 << rng.randrange(8)
                elif change == "cut":
                    del raw[place : place + rng.randint(1, 9)]
                elif change == "double":
                    raw[place:place] = raw[place : place + rng.randint(1, 9)]
                else:
                    raw[place:place] = bytes(rng.randrange(256) for _ in range(3))
                raw = raw or bytearray(b"{}")
            status, answer = server.post(bytes(raw), path, KEY)
            assert status in (200, 400, 404), (bytes(raw), answer)
    assert still_works(server)


def test_bytes_that_are_no_request(hasty):
    rng = random.Random(2)
    for raw in (
        b"\r\n" * 100,
        b"\x16\x03\x01\x02\x00\x01",
        b"GET /",
        b"A" * 70_000,
        b"GET / HTTP/9.9\r\n\r\n",
        rng.randbytes(5000),
    ):
        status, _ = parsed(hasty.send(raw))
        assert status in (0, 400, 403), raw[:20]
    two_lengths = b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n"
    split = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n" + two_lengths
    assert parsed(hasty.send(split))[0] in (0, 400, 401)
    assert still_works(hasty)


# -- slow and half-open ----------------------------------------------------------------------------------------------


def test_connections_that_say_nothing_or_never_end_are_closed(hasty):
    whole = request(json.dumps(BODY).encode(), hasty.port, headers=KEY)
    beginnings = [b"", b"POST /v1/comp", whole[:-5], whole[: whole.index(b"\r\n\r\n") + 4]]
    connections = [
        socket.create_connection(("127.0.0.1", hasty.port), timeout=20) for _ in range(5) for _ in beginnings
    ]
    for i, connection in enumerate(connections):
        connection.sendall(beginnings[i % len(beginnings)])
    assert hasty.post(BODY, headers=KEY)[0] == 200  # they hold nobody up
    for i, connection in enumerate(connections):
        status, _ = parsed(receive_all(connection))  # ends, for the hasty closes it
        connection.close()
        assert status == (408 if i % len(beginnings) > 1 else 0)
    assert still_works(hasty)


def test_a_request_that_drips_in_is_refused_in_time(hasty):
    raw = request(json.dumps(BODY).encode(), hasty.port, headers=KEY)
    head = raw.index(b"\r\n\r\n") + 4
    with socket.create_connection(("127.0.0.1", hasty.port), timeout=20) as connection:
        connection.sendall(raw[:head])
        with contextlib.suppress(ConnectionError):
            for byte in raw[head:-1]:
                connection.sendall(bytes([byte]))
                time.sleep(0.03)
        assert parsed(receive_all(connection))[0] in (408, 0)
    assert still_works(hasty)


def test_half_closed_and_reset_connections(server):
    raw = request(json.dumps(LONG).encode(), server.port, headers=KEY)
    for _ in range(10):
        connection = socket.create_connection(("127.0.0.1", server.port), timeout=20)
        connection.sendall(raw)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        connection.close()  # a reset
    assert still_works(server)


def test_a_client_that_does_not_read_is_dropped(server):
    body = {**BODY, "n": 100, "max_tokens": 60, "stream": True, "logprobs": 8, "temperature": 2}
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(request(json.dumps(body).encode(), server.port, headers=KEY))
        assert still_works(server)  # once it was dropped


# -- many at once ----------------------------------------------------------------------------------------------------


async def ask(server, body, key="right", path="/v1/completions", read=None):
    """Return the status and the answer; read only some bytes where ``read`` is given, and go away."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    try:
        writer.write(request(json.dumps(body).encode(), server.port, path, {"Authorization": f"Bearer {key}"}))
        await writer.drain()
        raw = await (reader.read() if read is None else reader.read(read))
        return parsed(raw) if read is None else (0, raw)
    finally:
        writer.close()


def mixed(i):
    """Return a request whose answer is known by its number: each client's text begins with its own prompt."""
    prompt = "".join("abcdefg"[(i // 7**j) % 7] for j in range(4))
    body = {
        "model": ("tiny", "astar/tiny", "beam/tiny")[i % 3],
        "prompt": prompt,
        "max_tokens": 4,
        "seed": i,
        "echo": True,
    }
    return body | ({"qstar": {"budget": 12}} if i % 3 else {})


def text_of(answer, streamed):
    if not streamed:
        return answer["choices"][0]["text"]
    lines = [line[6:] for line in answer.decode().split("\n\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return "".join(json.loads(line)["choices"][0]["text"] for line in lines[:-1])


def test_500_requests_at_once_get_their_own_texts(server):
    alone = {i: text_of(server.post(mixed(i), headers=KEY)[1], False) for i in range(0, 500, 25)}

    async def together():
        bodies = [{**mixed(i), "stream": i % 5 == 0} for i in range(500)]
        return await asyncio.gather(*(ask(server, body, ("right", "other")[i % 2]) for i, body in enumerate(bodies)))

    answers = asyncio.run(together())
    assert {status for status, _ in answers} == {200}
    for i, (_, answer) in enumerate(answers):
        text = text_of(answer, i % 5 == 0)
        assert text.startswith(mixed(i)["prompt"])
        assert i not in alone or text == alone[i]
    assert still_works(server)


def test_more_than_the_limits_are_told_to_come_back():
    with live(make_engine(), limits=Limits(live=10, requests=15), keys=["right", "other"]) as server:

        async def together():
            first = [asyncio.create_task(ask(server, LONG, "right", read=1)) for _ in range(10)]
            while server.service.turnstile.total < 10:
                await asyncio.sleep(0.01)
            same = await asyncio.gather(*(ask(server, BODY, "right") for _ in range(20)))
            other = await asyncio.gather(*(ask(server, BODY, "other") for _ in range(3)))
            for task in first:
                task.cancel()
            await asyncio.gather(*first, return_exceptions=True)
            return same, other

        same, other = asyncio.run(together())
        assert [status for status, _ in same] == [429] * 20
        assert all(answer["error"]["code"] == "rate_limit_exceeded" for _, answer in same)
        assert [status for status, _ in other] == [200] * 3
        assert server.settled() == (0, 0, 0)
        assert server.post(BODY, headers=KEY)[0] == 200


def test_clients_that_go_away_in_the_middle_leave_nothing(server):
    rng = random.Random(3)

    async def leave(i):
        body = (
            {**LONG, "stream": True}
            if i % 2
            else {**BODY, "n": 20, "max_tokens": 200, "stream": True, "temperature": 2}
        )
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(rng.uniform(0.01, 0.3)):
                await ask(server, body, read=rng.randint(1, 2000))

    async def together():
        stay = asyncio.gather(*(ask(server, mixed(i)) for i in range(20)))
        await asyncio.gather(*(leave(i) for i in range(60)))
        return await stay

    for i, (status, answer) in enumerate(asyncio.run(together())):
        assert status == 200
        assert answer["choices"][0]["text"].startswith(mixed(i)["prompt"])
    assert still_works(server)


def test_memory_stays_bounded(server):
    """No more is held after the fourth round of the same abuse than after the second, but for what allocators keep."""

    async def round_():
        bodies = [mixed(i) for i in range(60)] + [{**BODY, "prompt": "a" * 15_000}] * 20
        await asyncio.gather(*(ask(server, body) for body in bodies), *(ask(server, LONG, read=0) for _ in range(20)))

    sizes = []
    for _ in range(4):
        asyncio.run(round_())
        assert server.settled() == (0, 0, 0)
        gc.collect()
        sizes.append(psutil.Process().memory_info().rss / 2**20)
    assert sizes[3] - sizes[1] < 40
    assert len(server.engine._waiting) == len(server.engine._live) == 0
