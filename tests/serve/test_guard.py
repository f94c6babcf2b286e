"""Who may ask, how much, and what happens when a client goes away or the server is told to end."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import pytest
import uvicorn
from starlette.testclient import TestClient

from qstar_decoding.cli.serve import _keys, _named
from qstar_decoding.errors import ConfigurationError
from qstar_decoding.rewards import as_reward
from qstar_decoding.serve.app import create_app
from qstar_decoding.serve.guard import Limits
from qstar_decoding.serve.listening import LOOPBACK, PatientProtocol

from .conftest import ChatLM, make_engine, make_lm

BODY = {"model": "tiny", "prompt": "ab", "max_tokens": 2}


def post(client, body=BODY, **headers):
    return client.post("/v1/completions", json=body, headers=headers)


# -- who may ask ------------------------------------------------------------------------------------------------------


def test_a_key_is_needed_where_there_are_keys(engine):
    with TestClient(create_app(engine, keys=["one", "zwei-ü"])) as client:
        for given in (None, "Bearer wrong", "Bearer ", "Basic one", "one", "Bearer one two"):
            answer = post(client, **({} if given is None else {"Authorization": given}))
            assert answer.status_code == 401, given
            assert answer.json()["error"]["code"] == "invalid_api_key"
        assert client.get("/v1/models").status_code == client.get("/metrics").status_code == 401
        assert client.get("/health").status_code == 200
        assert post(client, Authorization="Bearer one").status_code == 200
        assert post(client, Authorization=b"bearer zwei-\xc3\xbc").status_code == 200


def test_foreign_hosts_and_origins_are_refused(engine):
    with TestClient(create_app(engine, hosts=LOOPBACK), base_url="http://localhost:8000") as client:
        assert post(client).status_code == 200
        assert post(client, Host="[::1]:8000").status_code == 200
        assert post(client, Origin="http://localhost:8000").status_code == 200
        for host in ("evil.example", "localhost.evil.example", "evil.example:8000", ""):
            assert post(client, Host=host).status_code == 403, host
        for origin in ("http://evil.example", "null", "http://localhost:9000", "http://[", "https://localhost"):
            refused = post(client, Origin=origin)
            assert refused.status_code == 403, origin
            assert refused.json()["error"]["code"] == "foreign_origin"
        assert post(client, **{"Sec-Fetch-Site": "cross-site"}).status_code == 403


def test_keys_come_from_a_file_and_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("QSTAR_API_KEY", raising=False)
    assert _keys(None) == []
    path = tmp_path / "keys"
    path.write_text("first\n\n  second  \n")
    monkeypatch.setenv("QSTAR_API_KEY", "third")
    assert sorted(_keys(path)) == ["first", "second", "third"]
    monkeypatch.delenv("QSTAR_API_KEY")
    path.write_text("\n")
    for wrong in (path, tmp_path / "none"):
        with pytest.raises(ConfigurationError, match="api-key-file"):
            _keys(wrong)
    assert _named("mine=runs/my-q") == ("mine", "runs/my-q")
    for option in ("mine", "=folder", "my q=folder", "mine="):
        with pytest.raises(ConfigurationError, match="NAME=FOLDER"):
            _named(option)


# -- how much ---------------------------------------------------------------------------------------------------------


def test_limits_are_kept(engine):
    limits = Limits(body_bytes=500, prompt_tokens=5, max_tokens=4, texts=3)
    with TestClient(create_app(engine, limits=limits)) as client:
        assert post(client, {**BODY, "user": "x" * 1000}).status_code == 413
        chunks = (b" " * 100 for _ in range(10))  # no length is stated
        answer = client.post("/v1/completions", content=chunks, headers={"Content-Type": "application/json"})
        assert answer.status_code == 413
        for fields, param in (
            ({"prompt": "ababab"}, "prompt"),
            ({"prompt": [[0] * 6]}, "prompt"),
            ({"max_tokens": 5}, "max_tokens"),
            ({"n": 4}, "n"),
        ):
            refused = post(client, {**BODY, **fields})
            assert refused.status_code == 400
            assert refused.json()["error"]["param"] == param
        longest = client.post(
            "/v1/chat/completions", json={"model": "tiny", "messages": [{"role": "user", "content": "a"}]}
        )
        assert longest.json()["usage"]["completion_tokens"] <= 4


class SlowLM(ChatLM):
    """A language model that waits before every forward, and counts them."""

    forwards, pause = 0, 0.02

    def forward(self, sequences):
        self.forwards += 1
        time.sleep(self.pause)
        return super().forward(sequences)


@pytest.fixture
def served():
    """A function from limits to a running server's port, language model and service."""
    servers = []

    def start(**limits):
        lm = make_lm(SlowLM)
        lm.eos_token_ids = frozenset()
        reward = as_reward(lambda prompt, completion: 0.5, lower=0, upper=1)
        app = create_app(make_engine(lm, reward=reward), limits=Limits(max_tokens=1000, **limits))
        listener = socket.create_server(("127.0.0.1", 0))
        config = uvicorn.Config(app, http=PatientProtocol, log_level="critical", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        servers.append((server, thread, app.state.service))
        return listener.getsockname()[1], lm, app.state.service

    yield start
    for server, thread, service in servers:
        server.should_exit = True
        thread.join()
        service.close()


STREAM = {"prompt": "ab", "max_tokens": 900, "stream": True}
LONG = {
    "plain": {"model": "tiny", "prompt": "ab", "max_tokens": 900},
    "stream": {"model": "tiny", **STREAM},
    "search": {"model": "astar/tiny", "prompt": "ab", "max_tokens": 30, "qstar": {"budget": 5000}},
    "search stream": {
        "model": "beam/tiny",
        "prompt": "ab",
        "max_tokens": 900,
        "stream": True,
        "qstar": {"budget": 5000},
    },
}


def begin(port, body):
    """Send a request and return the connection, its answer unread."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    return connection


def until(condition):
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    pytest.fail("it did not come to that")


@pytest.mark.parametrize("kind", LONG)
def test_a_client_that_goes_away_frees_its_work(served, kind):
    port, lm, service = served()
    connection = begin(port, LONG[kind])
    until(lambda: lm.forwards > 2)
    connection.sock.close()
    connection.close()
    tools = service.tools
    until(lambda: not (service.turnstile.total or tools.engine.live or tools.sampler.live))
    done = lm.forwards
    time.sleep(0.2)
    assert lm.forwards == done
    assert 'status="gone"' in urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()


def test_too_many_requests_are_told_when_to_come_again(served):
    port, _, service = served(live=2, requests=3)
    busy = [begin(port, LONG["plain"]) for _ in range(2)]
    until(lambda: service.turnstile.total == 2)
    answer = begin(port, LONG["plain"]).getresponse()
    assert answer.status == 429
    assert int(answer.headers["Retry-After"]) >= 1
    assert json.load(answer)["error"]["code"] == "rate_limit_exceeded"
    for connection in busy:
        connection.close()


def test_half_open_connections_and_slow_bodies_are_closed(served, monkeypatch):
    monkeypatch.setattr(PatientProtocol, "silence_seconds", 0.3)
    port, _, service = served(body_seconds=0.3)
    for begun in (b"", b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(begun)
            assert connection.recv(1000) == b""
    lines = ["POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json", "Content-Length: 50"]
    head = "\r\n".join([*lines, "", ""]).encode()
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(head + b"{")
        assert connection.recv(1000).startswith(b"HTTP/1.1 408")
    until(lambda: not service.turnstile.total)


# -- the end ----------------------------------------------------------------------------------------------------------


SERVE = [sys.executable, "-m", "qstar_decoding.cli", "serve", "--model", "toy", "--port", "0"]


@pytest.fixture
def process(tmp_path):
    """A function that starts ``qstar serve`` on the toy model and returns the process and its port."""
    started = []

    def start(*options):
        env, pipe = {**os.environ, "QSTAR_API_KEY": "secret"}, subprocess.PIPE
        popen = subprocess.Popen([*SERVE, *options], stdout=pipe, stderr=pipe, text=True, env=env, cwd=tmp_path)
        started.append(popen)
        line = popen.stdout.readline()
        assert line.startswith("serving http://127.0.0.1:"), (line, popen.stderr.read())
        return popen, int(line.split("/v1")[0].rpartition(":")[2])

    yield start
    for popen in started:
        popen.kill()
        popen.communicate()


def test_sigterm_finishes_what_runs_and_refuses_what_is_new(process):
    popen, port = process("--drain-seconds", "600")
    headers = {"Content-Type": "application/json", "Authorization": "Bearer secret"}

    def ask(body):
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("POST", "/v1/completions", json.dumps(body), headers)
        return connection

    def live():
        request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers=headers)
        return re.search(rb"qstar_texts_live (\d+)", urllib.request.urlopen(request).read())[1]

    # Without an end-of-sequence token the texts are as long as they may be.
    body = {"model": "toy", "prompt": "ab", "max_tokens": 400, "n": 8, "logit_bias": {"7": -100}}
    running = ask(body)
    until(lambda: live() == b"8")
    popen.send_signal(signal.SIGTERM)
    status = 200
    while status == 200:  # the signal has not arrived yet
        answer = ask({**body, "n": 1, "max_tokens": 1}).getresponse()
        status = answer.status
    assert status == 503
    assert answer.headers["Retry-After"]
    answer = running.getresponse()
    assert answer.status == 200
    assert json.load(answer)["usage"]["completion_tokens"] == 3200
    assert popen.wait(600) == 0


def test_what_does_not_end_in_time_is_ended(process):
    popen, port = process("--drain-seconds", "0.2")
    headers = {"Content-Type": "application/json", "Authorization": "Bearer secret"}
    running = http.client.HTTPConnection("127.0.0.1", port)
    body = {"model": "toy", "prompt": ["ab"] * 64, "max_tokens": 1000, "logit_bias": {"7": -100}, "stream": True}
    running.request("POST", "/v1/completions", json.dumps(body), headers)
    assert running.getresponse().status == 200  # the stream has begun
    popen.send_signal(signal.SIGTERM)
    assert popen.wait(600) == 0


def test_the_network_needs_a_key(tmp_path):
    env = {name: value for name, value in os.environ.items() if name != "QSTAR_API_KEY"}
    called = subprocess.run([*SERVE, "--host", "0.0.0.0"], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert called.returncode == 2
    assert "--api-key-file" in called.stderr
