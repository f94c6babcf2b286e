"""Task files that are wrong in any way: one line says so, never a traceback, and never does a file run code."""

import copy
import json
import random

import pytest
import yaml

from qstar_decoding.cli import app as cli
from qstar_decoding.errors import ConfigurationError, UnknownNameError
from qstar_decoding.tasks import Task, load_task

TOY = {
    "description": "x",
    "env": {"model": "toy", "reward": "3 * pangram", "top_k": 3, "max_new_tokens": 4, "logprob_weight": 0.05},
    "prompts": {"train": ["ab", "cd"], "dev": ["bc"], "test": ["de", {"prompt": "ef", "answer": "x"}]},
    "steps": 20,
    "training": {"searches_per_round": 2, "tokens_per_search": 8, "gradient_steps": 1, "policy_kwargs": {"width": 8}},
    "planner": {"taper": 1.0, "search": "level"},
    "gold": "pangram",
    "budgets": [6],
}
GENERATED = {
    **TOY,
    "prompts": {
        "generator": "addition",
        "arguments": {"train": 9, "dev": 3, "test": 3, "low": 1, "high": 9, "seed": 0},
    },
}
TEMPLATES = {"templates": ["a{x}", "b"], "slots": {"x": ["c", "d"]}, "chat": False}
FROM_TEMPLATES = {**TOY, "prompts": {**TOY["prompts"], "train": TEMPLATES}}
NOT_NUMBERS = [
    None,
    "",
    " ",
    "x",
    "none",
    "0.5",
    "\x00",
    "é中🎉",
    "{",
    "{0}",
    "{x.y}",
    "{x!q}",
    "a: b",
    "(" * 3000,
    "pangram(",
]
NUMBERS = [True, False, 0, -1, 1, 7, 10**30, -(10**30), 1.5, float("nan"), float("inf"), "9" * 400]
LISTS = [[], [[]], [1], ["a"], [None], [{"a": 1}], [[1, 2], [3]], [float("nan")], ["ab", "ab"]]
MAPPINGS = [{}, {"a": 1}, {1: 2}, {None: 1}, {"a": {"b": []}}, {"prompt": 1}, {"prompt": [{"role": 1}]}, b"bytes"]
JUNK = [*NOT_NUMBERS, *NUMBERS, *LISTS, *MAPPINGS]
KEYS = ["a", 1, None, "traning", "model", "reward", "top_k", "score", "prior", "generator", "shaping", "stop", "gamma"]


def places(node, above=()):
    """Yield the path of every value in nested mappings and lists."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield (*above, key)
        yield from places(value, (*above, key))


def mutant(rng):
    """Return a task with one to three values replaced, lost or added."""
    task = copy.deepcopy(rng.choice([TOY, TOY, GENERATED, FROM_TEMPLATES]))
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        *above, last = rng.choice(list(places(task)))
        node = task
        for key in above:
            node = node[key]
        how = rng.random()
        if how < 0.7:
            node[last] = copy.deepcopy(rng.choice(JUNK))
        elif how < 0.8:
            del node[last]
        elif isinstance(node, dict):
            node[rng.choice(KEYS)] = copy.deepcopy(rng.choice(JUNK))
    return task


def spoilt(rng, data):
    """Return a file's bytes in another encoding, cut off, with bytes changed, or as they are."""
    how = rng.random()
    if how < 0.05:
        return data[: rng.randrange(len(data))]
    if how < 0.10:
        return data.decode().encode(rng.choice(["utf-16", "utf-16-le", "utf-32", "utf-8-sig"]))
    if how < 0.13:
        return rng.randbytes(200)
    if how < 0.18:
        changed = bytearray(data)
        for _ in range(5):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        return bytes(changed)
    return data


def one_line_or_good(monkeypatch, capsys, *arguments):
    """Run the command as a shell does; return its exit code after checking what it said."""
    monkeypatch.setattr("sys.argv", ["qstar", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:  # any other exception is a traceback for the user
        cli.main()
    said = capsys.readouterr().err
    assert left.value.code in (0, None, 2), said
    assert "Traceback" not in said
    if left.value.code == 2:
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, said
        assert said.splitlines()[-1] == errors[0], said
        assert len(errors[0]) > len("error: ") + 5
    return left.value.code


@pytest.mark.parametrize("first", range(0, 300, 25))
def test_malformed_task_files_give_one_line(tmp_path, monkeypatch, capsys, first):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "task.yaml"
    codes = set()
    for seed in range(first, first + 25):
        rng = random.Random(seed)
        path.write_bytes(spoilt(rng, yaml.dump(mutant(rng), allow_unicode=rng.random() < 0.5).encode()))
        if seed % 5:
            arguments = ["decode", "ab", "--task", path, "--budget", 6]
        else:
            names = ["--decoders", "greedy,best-of-n", "--budgets", "3", "--seeds", "1", "--no-tune"]
            arguments = ["evaluate", path, *names, "--out", tmp_path / f"run{seed}"]
        try:
            codes.add(one_line_or_good(monkeypatch, capsys, *arguments))
        except BaseException as error:
            error.add_note(f"seed {seed}: {path.read_bytes()[:2000]!r}")
            raise
    assert 2 in codes


def test_the_task_that_is_mutated_is_good(tmp_path, monkeypatch, capsys):
    for number, task in enumerate((TOY, FROM_TEMPLATES, GENERATED)):
        path = tmp_path / f"task{number}.yaml"
        path.write_text(yaml.dump(task))
        assert one_line_or_good(monkeypatch, capsys, "decode", "ab", "--task", path, "--budget", 6) == 0


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"3",
        b"- - -",
        b'"',
        b"a: 2020-13-45",
        b"a: !!int x",
        b"a: !!float x",
        b"a: !!bool x",
        b"a: !!timestamp x",
        b"a: !!binary '*'",
        b"a: !!python/object/apply:os.system [echo]",
        b"a: *x",
        b"&x [*x]",
        b"a: &x [*x]",
        b"<<: 3",
        b"? [a]\n: b",
        b"? {a: b}\n: c",
        b"---\na: 1\n---\nb: 2",
        b'description: "\\ud800"',
        b"a: 0o9",
        b"a: " + b"[" * 1500,
        b"a: " + b"{a: " * 1000,
        "description: größer".encode("latin-1"),
        "description: größer".encode("utf-16"),
        "description: größer".encode("utf-32"),
        bytes(range(256)),
    ],
)
def test_files_that_are_no_task(tmp_path, monkeypatch, capsys, text):
    path = tmp_path / "task.yaml"
    path.write_bytes(text)
    for command in (["decode", "ab", "--task", path], ["train", path]):
        assert one_line_or_good(monkeypatch, capsys, *command) == 2


def test_a_task_in_utf_16_is_read(tmp_path):
    path = tmp_path / "task.yaml"
    path.write_bytes(yaml.dump({**TOY, "description": "größer"}, allow_unicode=True).encode("utf-16"))
    assert load_task(path).description == "größer"


def test_a_folder_in_place_of_a_file(tmp_path, monkeypatch, capsys):
    (tmp_path / "task.yaml").mkdir()
    folder = tmp_path / "task.yaml"
    for command in (
        ["decode", "ab", "--task", folder],
        ["decode", "--input", tmp_path],
        ["decode", "--input", folder, "--task", "toy"],
        ["plot", "trace", tmp_path, "--out", tmp_path / "x.svg"],
        ["train-reward", tmp_path],
        ["decode", "ab", "--task", "toy", "--tree", tmp_path],
        ["decode", "ab", "--task", "toy", "--q", tmp_path],
        ["demo", "--task", "toy", "--svg", tmp_path],
    ):
        assert one_line_or_good(monkeypatch, capsys, *command) == 2


@pytest.mark.parametrize(
    ("planner", "message"),
    [
        ({"tapper": 2.0}, "unknown argument of planner 'tapper'; known, nearest first: 'taper'"),
        ({"search": ["level"]}, "unknown search"),
        ({"heuristic": "x"}, "unknown argument of planner 'heuristic'"),
    ],
)
def test_a_planner_that_cannot_be_made_is_named(tmp_path, monkeypatch, planner, message):
    path = tmp_path / "task.yaml"
    path.write_text(yaml.dump({**TOY, "planner": planner}))
    monkeypatch.setattr("sys.argv", ["qstar", "decode", "ab", "--task", str(path)])
    with pytest.raises(UnknownNameError, match=message):
        cli.app(["decode", "ab", "--task", str(path)], standalone_mode=False)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        *[("env", {"model_kwargs": value}) for value in ("x", 3, ["a"], True)],
        *[("env", {"model": value}) for value in (3, ["toy"], {"name": "toy"}, None, True)],
        *[("env", {"reward": value}) for value in (3, ["pangram"], {"pangram": 1}, None, 0.5)],
        *[("planner", {"margin": value}) for value in ("0.1", [1], None, -1, float("nan"), True)],
        *[("planner", {"growth": value}) for value in ("2", [2], 1, float("nan"))],
        *[("planner", {"taper": value}) for value in ("2", [2], -1, 1e30, float("nan"))],
    ],
)
def test_values_of_another_type_are_named(tmp_path, monkeypatch, capsys, part, change):
    path = tmp_path / "task.yaml"
    path.write_text(yaml.dump({**TOY, part: {**TOY[part], **change}}))
    monkeypatch.setattr("sys.argv", ["qstar", "decode", "ab", "--task", str(path), "--budget", "6"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    said = capsys.readouterr().err
    assert left.value.code == 2, said
    assert said.startswith("error: ")
    assert next(iter(change)) in said


# -- code in data files


CODE = """
import pathlib
pathlib.Path({marker!r}).write_text("ran")
raise ValueError("the author's code was run")
"""


@pytest.fixture
def model_with_code(tmp_path):
    """A folder that transformers takes for a model whose configuration is a Python file in it."""
    folder, marker = tmp_path / "model", tmp_path / "marker"
    folder.mkdir()
    auto = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"), "code.Own")
    (folder / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": auto}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["code.Own", None]}}))
    (folder / "code.py").write_text(CODE.format(marker=str(marker)))
    return folder, marker


def task_with(tmp_path, folder, model_kwargs):
    path = tmp_path / "task.yaml"
    path.write_text(yaml.dump({**TOY, "env": {**TOY["env"], "model": str(folder), "model_kwargs": model_kwargs}}))
    return path


@pytest.mark.parametrize(
    ("model_kwargs", "place"),
    [
        ({"trust_remote_code": True}, "trust_remote_code"),
        ({"trust_remote_code": 1}, "trust_remote_code"),
        ({"trust_remote_code": "yes"}, "trust_remote_code"),
        ({"config": {"trust_remote_code": True}}, "config.trust_remote_code"),
        ({"x": [{"trust_remote_code": True}]}, "x.0.trust_remote_code"),
        ({"use_kernels": True}, "use_kernels"),
        ({"attn_implementation": "somebody/kernels"}, "attn_implementation"),
        ({"weights_only": False}, "weights_only"),
    ],
)
@pytest.mark.parametrize("command", ["decode", "train", "evaluate", "demo"])
def test_a_task_file_cannot_run_its_authors_code(
    tmp_path, monkeypatch, capsys, model_with_code, command, model_kwargs, place
):
    folder, marker = model_with_code
    path = task_with(tmp_path, folder, model_kwargs)
    monkeypatch.chdir(tmp_path)
    arguments = {"decode": ["ab", "--task", path], "demo": ["--task", path]}.get(command, [path])
    monkeypatch.setattr("sys.argv", ["qstar", command, *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert f"env.model_kwargs.{place} would run code" in said
    assert "--trust-remote-code" in said
    assert not marker.exists()


def test_the_flag_of_the_users_own_command_allows_it(tmp_path, monkeypatch, model_with_code):
    """The code of this model writes a file, then fails: so it ran, with the flag and only with it."""
    folder, marker = model_with_code
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    path = task_with(tmp_path, folder, {})
    monkeypatch.setattr("sys.argv", ["qstar", "decode", "ab", "--task", str(path)])
    with pytest.raises(Exception, match=r"remote|custom code|trust"):
        cli.app(["decode", "ab", "--task", str(path)], standalone_mode=False)
    assert not marker.exists()
    with pytest.raises(Exception, match="author's code was run"):
        cli.app(["decode", "ab", "--task", str(path), "--trust-remote-code"], standalone_mode=False)
    assert marker.read_text() == "ran"


def test_python_code_is_the_users_own(tmp_path):
    env = {**TOY["env"], "model_kwargs": {"trust_remote_code": True}}
    assert Task.model_validate({"name": "t", **TOY, "env": env}).env["model_kwargs"] == {"trust_remote_code": True}
    path = task_with(tmp_path, "toy", {"revision": "main", "weights_only": True, "attn_implementation": "eager"})
    assert load_task(path).env["model_kwargs"]["revision"] == "main"
    with pytest.raises(ConfigurationError, match="would run code"):
        load_task(task_with(tmp_path, "toy", {"trust_remote_code": True}))
    task = load_task(task_with(tmp_path, "toy", {"revision": "main"}), trust_remote_code=True)
    assert task.env["model_kwargs"] == {"revision": "main", "trust_remote_code": True}
