"""Checkpoints that no kill can break, that come from anywhere, and that refuse to be used for something else."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sb3_contrib import QRDQN
from stable_baselines3 import DQN

from qstar_decoding.agents import AStarPlanner, QFunction, QHeuristic, QStar, QStarConfig, TokenQPolicy
from qstar_decoding.agents.learning import export_sb3, load_q_function, q_function, qstar
from qstar_decoding.agents.learning.checkpoints import PRETRAINED, find_checkpoint, pretrained_names
from qstar_decoding.agents.learning.policies import TokenQuantilePolicy, TokenScorer
from qstar_decoding.envs import TabularLM, TokenDecodingEnv
from qstar_decoding.errors import CheckpointError, ConfigurationError, UnknownNameError

SMALL = {
    "searches_per_round": 2,
    "tokens_per_search": 20,
    "gradient_steps": 4,
    "batch_size": 16,
    "policy_kwargs": {"width": 8, "dropout": 0.0},
}


@pytest.fixture(scope="module")
def env(tabular_env):
    return tabular_env(candidate_dims=4)


@pytest.fixture(scope="module")
def agent(env):
    return QStar(TokenQPolicy, env, seed=0, **SMALL).learn(60)


def version(folder):
    """Return the number that the checkpoint bears, having seen that all of it is of one save."""
    q = load_q_function(folder)
    assert q.network.weights["head.bias"].item() == q.description["version"]
    return q.description["version"]


def save(agent, folder, number, *, training_state=False):
    with torch.no_grad():
        agent.q_net.scorer.head.bias.fill_(number)
    agent.save(folder, training_state=training_state, version=number)


def observations(env, count=30):
    env.action_space.seed(0)
    observation, info = env.reset(seed=0)
    seen = []
    for _ in range(count):
        seen.append(observation)
        observation, _, terminated, _, info = env.step(env.action_space.sample(info["action_mask"]))
        if terminated:
            observation, info = env.reset()
    return {key: np.stack([o[key] for o in seen]) for key in seen[0]}


# -- a save that is killed --------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Nothing that a ``finally`` could still do: from here on every file operation raises it."""


@pytest.fixture
def killed_after(monkeypatch):
    """Run a function until its n-th file operation, as if the process were killed there; tell whether it was."""
    operations = [
        *((os, name) for name in ("mkdir", "rename", "replace", "unlink", "rmdir", "chmod")),
        (Path, "write_text"),
        (q_function, "save_file"),
        (qstar, "save_file"),
        (qstar, "save_arrays"),
    ]

    def run(n, function):
        left = n

        def dying(original):
            def operation(*args, **kwargs):
                nonlocal left
                if left == 0:
                    raise Killed
                left -= 1
                return original(*args, **kwargs)

            return operation

        with monkeypatch.context() as patch:
            for owner, name in operations:
                patch.setattr(owner, name, dying(getattr(owner, name)))
            try:
                function()
            except Killed:
                return True
        return False

    return run


def test_wherever_a_save_is_killed_a_whole_checkpoint_is_there(agent, env, tmp_path, killed_after):
    folder = tmp_path / "agent"
    moments = gaps = 0
    while True:
        shutil.rmtree(tmp_path)
        save(agent, folder, 1, training_state=True)
        if not killed_after(moments, lambda: save(agent, folder, 2, training_state=True)):
            break
        moments += 1
        gaps += not folder.exists()
        if (old := tmp_path / ".agent.old").exists():
            assert version(old) == 1  # what may be fallen back on is never half there
        assert version(folder) in (1, 2)
        assert QStar.load(folder, env).num_timesteps == agent.num_timesteps
        assert QHeuristic(folder).q.description["version"] in (1, 2)
        save(agent, folder, 3)
        assert version(folder) == 3
        assert [path.name for path in tmp_path.iterdir()] == ["agent"]  # nothing of the killed save is left
    # mkdir, 5 files and their modes, two renames, and putting the old one away: no fewer moments than that were tried.
    assert moments > 15
    assert gaps == 1  # once there was nothing at the path itself
    assert version(folder) == 2


def test_so_it_is_when_the_save_after_that_is_killed_too(agent, tmp_path, killed_after):
    folder, first = tmp_path / "agent", 0
    while True:
        second, died = 0, True
        while True:
            shutil.rmtree(tmp_path)
            save(agent, folder, 1)
            died = killed_after(first, lambda: save(agent, folder, 2))
            if not killed_after(second, lambda: save(agent, folder, 3)):
                break
            assert version(folder) in (1, 2, 3)
            second += 1
        if not died:
            break
        assert version(folder) == 3
        first += 1
    assert first > 8


def test_a_first_save_that_is_killed_leaves_none(agent, tmp_path, killed_after):
    folder = tmp_path / "agent"
    assert killed_after(4, lambda: save(agent, folder, 1))
    assert find_checkpoint(folder) is None
    with pytest.raises(UnknownNameError, match="unknown checkpoint"):
        QHeuristic(folder)
    with pytest.raises(CheckpointError, match=r"agent is not a checkpoint: config\.json is missing"):
        load_q_function(folder)
    save(agent, folder, 2)
    assert version(folder) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["agent"]


MASSACRE = """
import os, random, signal, sys, time
from qstar_decoding.agents import QStar
from qstar_decoding.agents.learning import load_q_function
from qstar_decoding.envs import TabularLM, TokenDecodingEnv

folder = sys.argv[1]
lm = TabularLM.random(5, 2, seed=0)
env = TokenDecodingEnv(lm, prompts=["a"], reward=lambda p, c: 0.0, top_k=3, candidate_dims=4)
agent = QStar(env=env, seed=0, policy_kwargs={"width": 8})

def save_for_ever(number):
    while True:
        number += 1
        agent.q_net.scorer.head.bias.data.fill_(number)
        agent.save(folder, training_state=number % 2 == 0, version=number)

def version():
    q = load_q_function(folder)
    assert q.network.weights["head.bias"].item() == q.description["version"], "config and weights of different saves"
    return q.description["version"]

random.seed(0)
agent.q_net.scorer.head.bias.data.zero_()
agent.save(folder, version=0)
last = kills = reads = 0
while last < 80:
    kills += 1
    child = os.fork()
    if not child:
        save_for_ever(last)
    try:
        until = time.monotonic() + random.random() * 0.03 * (1 + kills / 50)  # longer and longer, to come to an end
        while time.monotonic() < until:
            if kills % 2:
                version()  # read while it saves
                reads += 1
            elif not os.path.exists(folder):
                break  # between the two renames, if the signal is quick enough
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert version() >= last, "a finished save was lost"
    last = version()
QStar.load(folder, env)
agent.save(folder, version=0)
assert os.listdir(os.path.dirname(folder)) == ["agent"], os.listdir(os.path.dirname(folder))
print(kills, "kills,", reads, "reads")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
def test_real_kills_at_random_moments_break_nothing(tmp_path):
    command = [sys.executable, "-W", "error", "-c", MASSACRE, str(tmp_path / "agent")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "kills" in result.stdout


def test_saving_keeps_its_hands_off_other_folders(agent, tmp_path):
    (tmp_path / "thesis.txt").write_text("ten years of work")
    with pytest.raises(ConfigurationError, match="something else than a checkpoint"):
        agent.save(tmp_path)
    assert (tmp_path / "thesis.txt").exists()
    (tmp_path / "empty").mkdir()
    agent.save(tmp_path / "empty")
    assert find_checkpoint(tmp_path / "empty") == (tmp_path / "empty").resolve()


@pytest.mark.skipif(os.name != "posix", reason="modes")
@pytest.mark.parametrize(("umask", "file", "folder"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
def test_saved_files_are_ordinary_files(agent, tmp_path, umask, file, folder):
    before = os.umask(umask)
    try:
        agent.save(tmp_path / "agent")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "agent").iterdir()} == {file}
    assert (tmp_path / "agent").stat().st_mode & 0o777 == folder


# -- where checkpoints come from --------------------------------------------------------------------------------------


def test_a_q_function_comes_from_a_folder_a_run_or_the_package(agent, env, tmp_path):
    agent.save(tmp_path / "run" / "checkpoint")
    assert QFunction.from_pretrained(tmp_path / "run", env).spec.top_k == 3
    agent.save(tmp_path / "run" / "q", training_state=False, note="the final one")
    assert QFunction.from_pretrained(str(tmp_path / "run")).description == {"note": "the final one"}
    assert QFunction.from_pretrained("sentiment").spec.model == "smollm2-135m-instruct"
    with pytest.raises(CheckpointError, match=r"top_k 8 \(trained\) against 3 \(here\)"):
        QFunction.from_pretrained("sentiment", env)


def test_a_repository_on_the_hub_is_a_checkpoint_too(agent, env, tmp_path, monkeypatch):
    agent.save(tmp_path / "downloaded")
    (tmp_path / "model").mkdir()
    asked = []

    def snapshot_download(repo_id, *, allow_patterns):
        asked.append(repo_id)
        assert set(allow_patterns) >= {path.name for path in (tmp_path / "downloaded").iterdir()}
        assert not [pattern for pattern in allow_patterns if "*" in pattern]
        return str(tmp_path / repo_id.split("/")[1])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    plan = AStarPlanner(env, heuristic=QHeuristic("somebody/downloaded")).plan("ab", 10)
    assert plan.tree.f.tolist() == AStarPlanner(env, heuristic=QHeuristic(agent)).plan("ab", 10).tree.f.tolist()
    with pytest.raises(CheckpointError, match=r"'some-body/model' on the Hugging Face hub has no config\.json"):
        QHeuristic("some-body/model")
    assert asked == ["somebody/downloaded", "some-body/model"]
    # Neither paths nor plain names are asked for there.
    (tmp_path / "runs" / "empty").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for name in ("./nothing", "/no/thing", "no/thing/here", "nothing", "runs/empty", Path("no/thing")):
        with pytest.raises(UnknownNameError, match="unknown checkpoint"):
            QHeuristic(name)
    assert len(asked) == 2


def test_a_hub_that_cannot_be_reached_is_an_error_that_says_what_to_do():
    assert huggingface_hub.constants.HF_HUB_OFFLINE  # as conftest.py has set it
    with pytest.raises(CheckpointError, match=r"no folder 'nobody/nothing' here.*HF_HUB_OFFLINE") as error:
        QHeuristic("nobody/nothing")
    assert error.value.__cause__ is not None


# -- what they are refused for ----------------------------------------------------------------------------------------


class OtherEmbeddings(TabularLM):
    """A model with the same name and sizes, whose token embeddings have changed by some amount."""

    amount = 1.0

    def token_embeddings(self):
        own = super().token_embeddings()
        return own + self.amount * np.random.default_rng(1).standard_normal(own.shape).astype(np.float32)


def test_a_model_of_the_same_name_with_other_token_embeddings_is_refused(agent, tabular_env, tmp_path):
    agent.save(tmp_path / "agent")
    other = tabular_env(model=OtherEmbeddings.random(5, 2, seed=0), candidate_dims=4)
    with pytest.raises(CheckpointError, match="'tabular' with other token embeddings"):
        AStarPlanner(other, heuristic=QHeuristic(tmp_path / "agent")).plan("ab", 10)
    with pytest.raises(CheckpointError, match="other token embeddings"):
        QStar.load(tmp_path / "agent", other)
    # The same weights in another precision are the same model,
    OtherEmbeddings.amount = 0.1
    same = tabular_env(model=OtherEmbeddings.random(5, 2, seed=0), candidate_dims=4)
    assert QStar.load(tmp_path / "agent", same)
    # and a checkpoint that does not say goes by the name.
    config = tmp_path / "agent" / "config.json"
    content = json.loads(config.read_text())
    del content["trained_on"]["features"]
    config.write_text(json.dumps(content))
    assert QStar.load(tmp_path / "agent", other)


def test_a_checkpoint_older_than_a_constant_of_the_network_is_read(agent, env, tmp_path):
    agent.save(tmp_path / "agent", training_state=False)
    weights = load_file(tmp_path / "agent" / "q_network.safetensors")
    constants = dict(agent.q_net.scorer.named_buffers())
    assert constants
    save_file({k: v for k, v in weights.items() if k not in constants}, tmp_path / "agent" / "q_network.safetensors")
    plain = TokenScorer(**agent.q_net.scorer_kwargs)
    plain.load_state_dict({**weights, **dict(plain.named_buffers())})
    seen = observations(env)
    expected = plain.eval()({key: torch.from_numpy(value) for key, value in seen.items()}).detach().numpy()
    np.testing.assert_allclose(QHeuristic(tmp_path / "agent").q.network(seen), expected, atol=1e-5)


class OtherLayer(TabularLM):
    """A model whose hidden state comes from elsewhere in it, in the same size."""

    hidden_layers = (3,)


def test_a_hidden_state_of_another_layer_is_refused(agent, tabular_env, tmp_path):
    agent.save(tmp_path / "agent")
    deeper = tabular_env(model=OtherLayer.random(5, 2, seed=0), candidate_dims=4)
    with pytest.raises(CheckpointError, match=r"hidden_layers \(\) \(trained\) against \(3,\) \(here\)"):
        QStar.load(tmp_path / "agent", deeper)
    QStar(TokenQPolicy, deeper, seed=0, **SMALL).save(tmp_path / "deeper")
    assert QFunction.from_pretrained(tmp_path / "deeper", deeper).spec.hidden_layers == (3,)


def test_another_observation_layout_is_refused(agent, tabular_env, tmp_path):
    agent.save(tmp_path / "agent")
    other = tabular_env(candidate_dims=6)
    for use in (lambda: QStar.load(tmp_path / "agent", other), lambda: export_sb3(agent, tmp_path / "x.zip", other)):
        with pytest.raises(CheckpointError, match="candidate_dims=4, the environment has 6"):
            use()
    assert not (tmp_path / "x.zip").exists()


def test_an_agent_needs_an_environment(agent, tmp_path):
    agent.save(tmp_path / "agent")
    with pytest.raises(ConfigurationError, match="give env="):
        QStar.load(tmp_path / "agent")


# -- other agents' networks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dueling", [False, True])
def test_an_exported_agent_takes_the_same_greedy_actions(env, tmp_path, dueling):
    kwargs = {**SMALL, "policy_kwargs": {"width": 8, "dueling": dueling}}
    agent = QStar(TokenQPolicy, env, seed=0, **kwargs).learn(60)
    torch.nn.init.normal_(agent.q_net.scorer.head.weight)  # opinions that differ from state to state
    path = export_sb3(agent, tmp_path / "dqn", env)
    assert path == tmp_path / "dqn.zip"
    seen = observations(env)
    expected = agent.predict(seen, deterministic=True)[0]
    assert len(set(expected.tolist())) > 1
    plain = DQN.load(path)
    assert type(plain) is DQN
    assert plain.predict(seen, deterministic=True)[0].tolist() == expected.tolist()
    agent.save(tmp_path / "agent", training_state=False)
    again = DQN.load(export_sb3(tmp_path / "agent", tmp_path / "again.zip", env), env)
    assert again.predict(seen, deterministic=True)[0].tolist() == expected.tolist()
    again.learn(20)  # it can go on learning


@pytest.mark.parametrize(("algorithm", "policy"), [(DQN, TokenQPolicy), (QRDQN, TokenQuantilePolicy)])
def test_any_agents_q_function_is_saved_without_pickle(env, tmp_path, algorithm, policy):
    other = algorithm(policy, env, learning_starts=10, buffer_size=500, seed=0, policy_kwargs={"width": 8}).learn(40)
    QHeuristic(other).q.save(tmp_path / "q", note="mine")
    loaded = QFunction.from_pretrained(tmp_path / "q", env)
    assert loaded.description == {"note": "mine"}
    one, two = (AStarPlanner(env, heuristic=QHeuristic(q)).plan("ab", 10) for q in (other, loaded))
    np.testing.assert_allclose(one.tree.f, two.tree.f, atol=1e-5)
    loaded.save(tmp_path / "copy")
    assert (tmp_path / "copy" / "config.json").read_text() == (tmp_path / "q" / "config.json").read_text()


def test_what_cannot_be_written_is_named(env, tmp_path):
    flat = DQN("MultiInputPolicy", env, buffer_size=100)
    quantiles = QRDQN(TokenQuantilePolicy, env, buffer_size=100, policy_kwargs={"width": 8})
    with pytest.raises(ConfigurationError, match="only the network of a TokenQPolicy"):
        QHeuristic(flat).q.save(tmp_path / "q")
    with pytest.raises(ConfigurationError, match="only the network of a TokenQPolicy"):
        export_sb3(flat, tmp_path / "x", env)
    with pytest.raises(ConfigurationError, match="DQN has no quantiles"):
        export_sb3(quantiles, tmp_path / "x", env)
    DQN(TokenQPolicy, env, buffer_size=100).save(tmp_path / "dqn")
    with pytest.raises(ConfigurationError, match=r"DQN\.load\(path, env\)"):
        QHeuristic(DQN.load(tmp_path / "dqn")).q.save(tmp_path / "q")
    assert [path.name for path in tmp_path.iterdir()] == ["dqn.zip"]


def test_an_agent_comes_by_folder_and_goes_to_stable_baselines3(tmp_path):
    env = TokenDecodingEnv(TabularLM.random(5, 2, seed=0), prompts=["a"], reward=lambda p, c: 0.0, top_k=3)
    agent = QStar(env=env, seed=0, policy_kwargs={"width": 8})
    agent.save(tmp_path / "agent")
    again = QStar.from_pretrained(tmp_path / "agent", env)
    other = DQN.load(agent.export_sb3(tmp_path / "dqn.zip"), env)
    observation, _ = env.reset(seed=0)
    actions = {int(a.predict(observation, deterministic=True)[0]) for a in (agent, again, other)}
    assert len(actions) == 1
    with pytest.raises(UnknownNameError, match="sentiment"):
        QStar.from_pretrained("sentimant", env)


# -- checkpoints of earlier versions ----------------------------------------------------------------------------------


def test_a_checkpoint_written_by_version_0_1_loads_searches_and_goes_on_learning(tmp_path):
    env = TokenDecodingEnv(
        TabularLM.random(5, 2, seed=0),
        prompts=["ab", "c"],
        reward="pangram",
        top_k=3,
        max_new_tokens=5,
        logprob_weight=0.1,
        candidate_dims=4,
    )
    folder = Path(__file__).parent / "checkpoint_of_0_1"
    q = QFunction.from_pretrained(folder, env)
    assert q.description == {"note": "written by version 0.1"}
    f = AStarPlanner(env, heuristic=QHeuristic(folder)).plan("ab", 10).tree.f
    assert f[0] == pytest.approx(-0.8199991583824158, abs=1e-5)  # as version 0.1 had it
    agent = QStar.load(folder, env)
    assert (agent.num_timesteps, agent.experience.size) == (80, 45)
    written = json.loads((folder / "training_state.json").read_text())["arguments"]
    kept = agent.config.as_json()
    later = kept.keys() - written.keys()  # settings that 0.1 did not have
    assert {name: kept[name] for name in later} == {name: getattr(QStarConfig(), name) for name in later}
    assert {name: kept[name] for name in kept.keys() - later if name != "policy_kwargs"} == {
        **{name: written[name] for name in written if name != "policy_kwargs"},
        "learning_rate": (0.001, 0.0001),
    }
    assert written["policy_kwargs"].items() <= kept["policy_kwargs"].items()
    agent.learn(40, reset_num_timesteps=False)
    assert agent.num_timesteps > 80
    agent.save(tmp_path / "agent", note="written by version 0.1")
    assert (tmp_path / "agent" / "config.json").read_text() == (folder / "config.json").read_text()


@pytest.mark.parametrize("name", pretrained_names())
def test_a_shipped_q_function_is_written_as_it_was_read(tmp_path, name):
    q = QFunction.from_pretrained(name)
    q.save(tmp_path / name)
    folder = PRETRAINED / name
    assert (tmp_path / name / "config.json").read_text("utf-8") == (folder / "config.json").read_text("utf-8")
    assert load_q_function(tmp_path / name).fingerprint() == q.fingerprint()
