"""Edited and cut checkpoints: every one loads or is a CheckpointError in one line."""

import contextlib
import copy
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from qstar_decoding.agents import AStarPlanner, QFunction, QHeuristic, QStar, TokenQPolicy
from qstar_decoding.errors import CheckpointError, TrainingDivergedError

SMALL = {"searches_per_round": 2, "tokens_per_search": 20, "gradient_steps": 4, "batch_size": 16}
WRONG = [None, "x", "", -1, 0, 1.5, True, [], {}, [1], {"a": 1}, 10**30, float("nan"), float("inf"), ["x"], [[1, 2]]]


@pytest.fixture(scope="module")
def env(tabular_env):
    return tabular_env(candidate_dims=4)


@pytest.fixture(scope="module")
def saved(env, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "agent"
    options = {**SMALL, "policy_kwargs": {"width": 8, "dropout": 0.0}}
    QStar(TokenQPolicy, env, seed=0, **options).learn(60).save(folder, note="mine")
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "agent")


def places(content, depth=3, path=()):
    """Yield the path of every key, and of the first item of every list."""
    if isinstance(content, dict) and depth:
        for key, value in content.items():
            yield (*path, key)
            yield from places(value, depth - 1, (*path, key))
    elif isinstance(content, list) and content and depth:
        yield (*path, 0)
        yield from places(content[0], depth - 1, (*path, 0))


def edited(content, path, change):
    content = copy.deepcopy(content)
    inside = content
    for key in path[:-1]:
        inside = inside[key]
    change(inside, path[-1])
    return content


def replaced_by(value):
    return lambda inside, key: inside.__setitem__(key, value)


def remove(inside, key):
    del inside[key]


def loads(folder, env):
    """Load, use and train further; return whether it was possible."""
    reason = ""
    try:
        agent = QStar.load(folder, env)
        q = QFunction.from_pretrained(folder, env)
    except CheckpointError as error:
        reason = str(error)
    if reason:
        assert "\n" not in reason
        assert len(reason) < 800
        return False
    assert AStarPlanner(env, heuristic=QHeuristic(q)).plan("ab", 10).completions
    with contextlib.suppress(TrainingDivergedError):  # a learning rate of 10^30
        agent.learn(1, reset_num_timesteps=False)
    return True


def types_differ(path, old, new):
    """Return whether a value is of another JSON type than the one it replaces."""
    kinds = (bool, int, float, str, list, dict, type(None))
    kind = next(k for k in kinds if isinstance(old, k)), next(k for k in kinds if isinstance(new, k))
    return kind[0] is not kind[1] and kind not in {(float, int)}


# Places where another type is legitimate, or where anything is: a description says what it likes.
FREE = {"description", "policy_kwargs", "seed", "learning_rate", "n_quantiles", "hidden_layers", "features", "model"}


@pytest.mark.parametrize("name", ["config.json", "training_state.json"])
def test_every_edit_of_a_json_file_loads_or_is_one_line(folder, env, name):
    content = json.loads((folder / name).read_text())
    state = np.random.default_rng(0)
    tried = refused = 0
    for path in places(content):
        old = content
        for key in path:
            old = old[key]
        wrong = [value for value in WRONG if value != old] if len(path) < 3 else [WRONG[state.integers(len(WRONG))]]
        for change, value in [(remove, None), *((replaced_by(value), value) for value in wrong)]:
            (folder / name).write_text(json.dumps(edited(content, path, change)))
            good = loads(folder, env)
            tried, refused = tried + 1, refused + (not good)
            if change is not remove and types_differ(path, old, value) and not FREE & set(map(str, path)):
                assert not good, (path, value)
    assert refused > tried / 2 > 50
    (folder / name).write_text(json.dumps(content))
    assert loads(folder, env)


@pytest.mark.parametrize("key", ["format", "trained_on", "network"])
def test_a_missing_key_of_the_config_is_named(folder, env, key):
    content = json.loads((folder / "config.json").read_text())
    del content[key]
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=key):
        QStar.load(folder, env)


@pytest.mark.parametrize(
    "text",
    ["", "null", "[]", "3", '"x"', "{", "{}", '{"format": 1}', "\x00", "[" * 100_000, '{"a":' * 100_000, "NaN"],
    ids=lambda text: repr(text[:12]),
)
@pytest.mark.parametrize("name", ["config.json", "training_state.json"])
def test_something_else_than_an_object(folder, env, name, text):
    (folder / name).write_text(text)
    assert not loads(folder, env)


@pytest.mark.parametrize("name", ["q_network", "optimizer", "experience"])
def test_a_safetensors_file_cut_anywhere(folder, env, name):
    path = folder / f"{name}.safetensors"
    content = path.read_bytes()
    for end in [*range(0, 16), *range(16, len(content), max(len(content) // 40, 1)), len(content) - 1]:
        path.write_bytes(content[:end])
        assert not loads(folder, env), end
    for _ in range(2):
        path.write_bytes(content + b"more")
        assert not loads(folder, env)
    path.unlink()
    assert not loads(folder, env)
    path.write_bytes(content)
    assert loads(folder, env)


@pytest.mark.parametrize("name", ["q_network", "optimizer", "experience"])
@pytest.mark.parametrize("harm", ["missing", "shape", "more", "empty"])
def test_other_arrays_in_a_safetensors_file(folder, env, name, harm):
    path = folder / f"{name}.safetensors"
    arrays = load_file(path)
    for key in list(arrays):
        changed = dict(arrays)
        if harm == "missing":
            del changed[key]
        elif harm == "shape":
            changed[key] = np.zeros((*arrays[key].shape, 2), arrays[key].dtype)
        elif harm == "more":
            changed[f"{key}.more"] = arrays[key]
        else:
            changed[key] = arrays[key][:0] if arrays[key].ndim else np.zeros(0, arrays[key].dtype)
        save_file(changed, path)
        good = loads(folder, env)
        # Constants of the network may be missing: an older version did not have them. Other columns do no harm.
        if not (name == "experience" and harm == "more") and not key.startswith("hidden_"):
            assert not good, key


def test_reading_a_checkpoint_leaves_torchs_generator(folder):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    QFunction.from_pretrained(folder)
    assert torch.equal(torch.rand(2), expected)
