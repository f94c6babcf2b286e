"""Q-functions go to the Hugging Face hub and come back: a hub on loopback, spoken to by huggingface_hub itself."""

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from huggingface_hub import HfApi, ModelCard

from qstar_decoding.agents import QFunction, QStar, TokenQPolicy
from qstar_decoding.agents.learning.hub import model_card
from qstar_decoding.errors import CheckpointError, ConfigurationError

SHA = "0" * 40
SMALL = {"searches_per_round": 2, "tokens_per_search": 20, "gradient_steps": 4, "policy_kwargs": {"width": 8}}


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a push and a load need; the repository's files are the server's ``files``."""

    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append(self.path)
        if self.headers.get("Authorization") != "Bearer hf_right":
            return self.answer({"error": "Invalid username or password."}, status=401)
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            assert asked["visibility"] == "private" if "visibility" in asked else asked["private"]
            return self.answer({"url": f"{self.server.url}/{asked['organization']}/{asked['name']}"})
        if "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self.answer({"files": files})
        if "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self.answer({"commitUrl": f"{self.server.url}/me/q/commit/{SHA}", "commitOid": SHA, "success": True})
        return self.answer({})

    def do_GET(self):
        self.server.asked.append(self.path)
        if "/resolve/" in self.path:
            content = self.server.files.get(self.path.rpartition("/")[2])
            if content is None:
                return self.answer({"error": "Entry not found"}, status=404)
            headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": SHA}
            return self.answer(content, headers=headers)
        if "/tree/" in self.path:
            return self.answer([
                {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for path, content in self.server.files.items()
            ])  # fmt: skip
        siblings = [{"rfilename": path} for path in self.server.files]
        return self.answer({"id": "me/q", "sha": SHA, "siblings": siblings})

    do_HEAD = do_GET  # noqa: N815 as the server wants it

    def answer(self, content, *, status=200, headers=None):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url, server.files, server.asked = f"http://127.0.0.1:{server.server_port}", {}, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def agent(tabular_env):
    return QStar(TokenQPolicy, tabular_env(candidate_dims=4), seed=0, **SMALL).learn(40)


PUSH = """
import sys
from qstar_decoding.agents import QFunction
q = QFunction.from_pretrained(sys.argv[1])
figures = {"A* on Q, 50": {"reward": 0.86871, "lm_tokens": 50}}
print(q.push_to_hub("me/q", private=True, command="qstar train toy --seed 3", seed=3, held_out=figures))
back = QFunction.from_pretrained("me/q")
print(back.fingerprint() == q.fingerprint(), back.description)
"""


def run_with(hub, tmp_path, folder, token):
    """Where the hub is, and whether it may be asked, huggingface_hub reads once, at its import."""
    changes = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": token}
    return subprocess.run(
        [sys.executable, "-c", PUSH, str(folder)], env={**os.environ, **changes}, capture_output=True, text=True
    )


def test_what_is_pushed_comes_back(agent, hub, tmp_path):
    agent.save(tmp_path / "q", training_state=False)
    found = run_with(hub, tmp_path, tmp_path / "q", "hf_right")
    assert found.returncode == 0, found.stderr[-2000:] + str(hub.asked)
    url, same, *_ = found.stdout.split(maxsplit=2)
    assert url == f"{hub.url}/me/q"
    assert same == "True"
    assert sorted(hub.files) == ["README.md", "config.json", "q_network.safetensors"]
    card = ModelCard(hub.files["README.md"].decode())
    assert card.data.library_name == "qstar-decoding"
    assert "- seed: 3\n" in card.text
    assert "| A\\* on Q, 50 | 0.8687 | 50 |" in card.text

    denied = run_with(hub, tmp_path, tmp_path / "q", "hf_wrong")
    last = denied.stderr.strip().splitlines()[-1]
    assert "CheckpointError: could not write to 'me/q' on the Hugging Face hub: " in denied.stderr
    assert "Log in with `hf auth login`" in last


def test_the_card_says_how_to_use_it_and_what_it_is_good_for(agent):
    q = QFunction.from_pretrained("sentiment")
    card = model_card(q, "me/q-sentiment")
    data = ModelCard(card).data
    assert data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "- command: `qstar train sentiment --steps 100000 --seed 0`" in card
    assert "for `smollm2-135m-instruct` with k = 8 only" in card
    [snippet] = re.findall("```python\n(.*?)```", card, re.DOTALL)
    names = {}
    # As typed, with a folder in the repository's place.
    exec(snippet.replace("me/q-sentiment", "sentiment").replace("budget=200", "budget=30"), names)
    assert names["planner"].heuristic.q.fingerprint() == q.fingerprint()
    # Nothing is known of this one but what it is, and its model is on no hub.
    plain = model_card(agent.q_function(), "me/q")
    assert ModelCard(plain).data.base_model is None
    assert "Its maker has not said how it was trained." in plain


def test_a_push_that_cannot_be_is_one_clear_error(agent, monkeypatch):
    # huggingface_hub is offline here, as conftest.py has set it.
    with pytest.raises(
        CheckpointError, match=r"could not write to 'me/q' .* offline mode .* Log in with `hf auth login`"
    ):
        agent.push_to_hub("me/q")
    with pytest.raises(ConfigurationError, match=r'a repository on the hub is "user/name", got \'q\''):
        agent.q_function().push_to_hub("q")


def test_an_agent_is_pushed_with_what_it_needs_to_go_on(agent, monkeypatch, tmp_path):
    sent = {}

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        sent[repo_id] = sorted(path.name for path in folder_path.iterdir())
        shutil.copytree(folder_path, tmp_path / "there")

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repository, **_: f"hub/{repository}")
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    assert agent.push_to_hub("me/agent", training_state=True, seed=0) == "hub/me/agent"
    assert sent["me/agent"] == [
        "README.md", "config.json", "experience.safetensors", "optimizer.safetensors", "q_network.safetensors",
        "training_state.json",
    ]  # fmt: skip
    again = QStar.from_pretrained(tmp_path / "there", agent.env)
    assert again.num_timesteps == agent.num_timesteps
    assert again.q_function().fingerprint() == agent.q_function().fingerprint()
