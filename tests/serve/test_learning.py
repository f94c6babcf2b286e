"""A Q that learns from the searches of a server: over real HTTP, through kills and ends, one process at a time."""

import contextlib
import json
import signal
import subprocess
import sys
import textwrap
import time
import urllib.request

import numpy as np
import pytest

from qstar_decoding.agents import AStarPlanner, OnlineLearner, QStar, SearchEngine
from qstar_decoding.agents.learning import environment_like
from qstar_decoding.agents.learning.checkpoints import find_checkpoint
from qstar_decoding.agents.learning.online.lessons import JOURNAL
from qstar_decoding.cli.serve import _learning
from qstar_decoding.envs import TabularLM
from qstar_decoding.errors import ConfigurationError
from qstar_decoding.files import locked
from qstar_decoding.rewards import as_reward

from .conftest import make_engine
from .live import live

BUDGET = 12


def likes_gf(prompt, completion):
    """Likes f after g, whatever the language model finds likely."""
    return min(completion.count("gf") / 3, 1.0)


def new_engine():
    return make_engine(reward=as_reward(likes_gf, lower=0.0, upper=1.0))


def learning(engine, **settings):
    agent = QStar(env=environment_like(engine.mdp), seed=0, batch_size=32, policy_kwargs={"width": 32, "dropout": 0.0})
    return OnlineLearner(agent, **{"seed": 0, **settings})


def prompts(count):
    rng = np.random.default_rng(0)
    return ["".join(rng.choice(list("abcdefg"), 3)) for _ in range(count)]


def body(prompt, model="qstar-learned", **qstar):
    return {"model": model, "prompt": prompt, "qstar": {"budget": BUDGET, **qstar}}


def taught(learner, count):
    """Wait until so many searches have been entered, which is after their answers, and see that it is no more."""
    for _ in range(1000):
        if sum(use.searches for use in learner.uses().values()) >= count:
            break
        time.sleep(0.01)
    return sum(use.searches for use in learner.uses().values()) == count


def objective(answer):
    return answer["choices"][0]["qstar"]["objective"]


def test_texts_become_better_while_a_server_is_used():
    engine = new_engine()
    learner = learning(engine, gradient_steps=8)
    with live(engine, learner=learner) as server:
        found = []
        for prompt in prompts(40):
            status, answer = server.post(body(prompt))
            assert status == 200
            found.append(objective(answer))
        metrics = urllib.request.urlopen(f"{server.url}/metrics").read().decode()
    bound = AStarPlanner(new_engine().mdp).plan_many(prompts(40), BUDGET)
    assert np.mean(found[20:]) > np.mean([plan.objective for plan in bound[20:]]) + 0.1
    assert taught(learner, 40)
    assert "qstar_q_version " in metrics
    assert 'qstar_heuristic_searches{heuristic="learned"}' in metrics
    assert learner.version > 1


def test_requests_of_another_kind_are_answered_and_teach_nothing():
    engine = new_engine()
    learner = learning(engine)
    with live(engine, learner=learner) as server:
        server.post(body("abc"))
        assert taught(learner, 1)
        for other in (
            body("abc", reward="length"),
            body("abc", logprob_weight=0.5),
            body("abc", decoder="beam"),
            body("abc", q="none"),
            body("abc", q="learned"),
            body("abc", "astar/tiny", q="learned"),
        ):
            status, answer = server.post(other)
            assert status == 200, answer
        status, answer = server.post(body("abc", q="unknown"))
        assert status == 400
        assert "learned" in answer["error"]["message"]
        assert taught(learner, 1)
        assert server.post({**body("abc"), "max_tokens": 5, "stop": "c"})[0] == 200  # the same reward: it teaches
        assert taught(learner, 2)
        names = json.loads(urllib.request.urlopen(f"{server.url}/v1/models").read())
        assert "qstar-learned" in [entry["id"] for entry in names["data"]]


def test_without_a_learner_there_is_no_such_model(client):
    answer = client.post("/v1/completions", json=body("abc"))
    assert answer.status_code == 404
    assert client.post("/v1/completions", json=body("abc", "astar/tiny", q="learned")).status_code == 400


SERVER = textwrap.dedent(
    """
    import sys
    from pathlib import Path
    from qstar_decoding.agents import SearchEngine
    from qstar_decoding.cli.serve import _learning
    from qstar_decoding.envs import TabularLM
    from qstar_decoding.serve.app import create_app
    from qstar_decoding.serve.listening import serve

    engine = SearchEngine(TabularLM.random(8, 1, seed=0), reward="length", top_k=4, max_new_tokens=8)
    with _learning(Path(sys.argv[1]), lambda: engine, 0.5) as learner:
        app = create_app(engine, learner=learner)
        serve(app, "127.0.0.1", 0, app.state.service.turnstile, 5.0)
        app.state.service.close()
    """
)


@contextlib.contextmanager
def process(folder):
    """Serve in a process of its own; yield it with its address."""
    started = subprocess.Popen([sys.executable, "-c", SERVER, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        line = started.stdout.readline()
        assert line.startswith("serving "), line
        yield started, line.split()[1].removesuffix("/v1")
    finally:
        started.kill()
        started.wait()


def ask(url, prompt):
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body(prompt)).encode(), {"Content-Type": "application/json"}
    )
    return json.loads(urllib.request.urlopen(request, timeout=60).read())


@contextlib.contextmanager
def serving(folder):
    """Go on in this process with what the other one learns."""
    engine = SearchEngine(TabularLM.random(8, 1, seed=0), reward="length", top_k=4, max_new_tokens=8)
    with _learning(folder, lambda: engine, 0.5) as learner:
        yield engine, learner


def test_neither_a_kill_nor_an_end_loses_what_a_server_has_learned(tmp_path):
    folder = tmp_path / "runs" / "q"
    with process(folder) as (server, url):
        for prompt in prompts(4):
            ask(url, prompt)
        deadline = time.monotonic() + 60
        while find_checkpoint(folder) is None and time.monotonic() < deadline:
            time.sleep(0.05)
        for prompt in prompts(3):  # after the first save, which is the only one for minutes
            ask(url, prompt)
        time.sleep(0.3)  # the answer goes out before the lesson is entered
        with pytest.raises(ConfigurationError, match="another process"), serving(folder):
            pass
        server.send_signal(signal.SIGKILL)
        server.wait()
    assert (folder / JOURNAL).exists()
    with serving(folder) as (engine, learner):
        assert sum(use.searches for use in learner.uses().values()) == 7
        assert learner.version >= 1
        AStarPlanner(engine.mdp, learn=learner).plan("abc", BUDGET)
    assert not (folder / JOURNAL).exists()  # saved at the end
    with serving(folder) as (_, learner):
        assert sum(use.searches for use in learner.uses().values()) == 8


def test_the_folder_is_looked_at_before_the_language_model_is_loaded(tmp_path):
    def load():
        raise AssertionError("the model was loaded first")

    with locked(tmp_path / ".q.lock"), pytest.raises(ConfigurationError, match="another process"):
        _learning(tmp_path / "q", load, 0.5).__enter__()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigurationError, match="something else"):
        _learning(tmp_path / "file", load, 0.5).__enter__()
