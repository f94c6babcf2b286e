"""Tasks: those that the package ships, and files that are wrong."""

import re

import pytest
import yaml

from qstar_decoding.agents import AStarPlanner
from qstar_decoding.errors import ConfigurationError, UnknownNameError
from qstar_decoding.tasks import Task, load_task, task_names

TINY = {
    "description": "Six tokens of a review, for the tests.",
    "env": {"reward": "sentiment", "top_k": 4, "max_new_tokens": 6},
    "prompts": {"train": ["The movie was", "The food was"], "dev": ["A dog"], "test": ["The play was", "My week"]},
    "steps": 60,
}


@pytest.mark.parametrize("name", ["sentiment", "arithmetic", "arithmetic-99", "keywords"])
def test_the_real_tasks_have_enough_disjoint_prompts(name):
    task = load_task(name)
    train, dev, test = ({str(p) for p in task.prompts.of(split)} for split in ("train", "dev", "test"))
    assert len(train) >= 300
    assert len(dev) >= 20
    assert len(test) >= 40
    assert len(train | dev | test) == len(train) + len(dev) + len(test)


def test_every_task_is_listed_and_loads():
    assert task_names() == ["arithmetic", "arithmetic-99", "keywords", "reasoning-gym", "relevance", "sentiment", "toy"]
    for name in task_names():
        assert load_task(name).prompts.of("test")


def test_the_answers_are_right_and_the_keywords_asked_for():
    for prompt in load_task("arithmetic").prompts.of("test"):
        a, b = re.search(r"(\d+)\+(\d+)=$", prompt["prompt"]).groups()
        assert int(a) + int(b) == int(prompt["answer"])
        assert not re.search(rf"\b{a}\+{b}=\d", prompt["prompt"])  # not among the solved examples
    seen = {word for prompt in load_task("keywords").prompts.of("train") for word in prompt["keywords"]}
    for prompt in load_task("keywords").prompts.of("test"):
        assert all(word in prompt["prompt"][0]["content"] for word in prompt["keywords"])
        assert not seen.issuperset(prompt["keywords"])


def test_the_toys_optimum_is_known_by_enumeration():
    task = load_task("toy")
    plan = AStarPlanner(task.mdp()).plan(task.prompts.of("test")[0])
    assert plan.certified


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"promts": {}}, "unknown key 'promts', did you mean 'prompts'"),
        ({"steps": None}, "steps"),
        ({"prompts": {"train": ["a"], "dev": ["b"]}}, "missing key 'prompts.test'"),
        ({"prompts": {"train": ["a"], "dev": ["a"], "test": ["c"]}}, "train and dev share prompts, e.g. 'a'"),
        ({"steps": "many"}, "steps"),
        ({"prompts": {"generator": "adition"}}, "unknown generator 'adition'; known, nearest first: 'addition'"),
        ({"prompts": {"generator": "addition", "arguments": {"low": 1}}}, "generator 'addition': .*missing"),
        ({"prompts": {"generator": "addition", "arguments": {"lo": 1}}}, "generator 'addition': .*'lo'"),
        ({"prompts": {"generator": "addition", "train": ["a"]}}, r"not both: \['train'\]"),
        ({"budgets": [0]}, "budgets.0"),
        ({"traning": {}}, "unknown key 'traning', did you mean 'training'"),
    ],
)
def test_a_wrong_task_file_names_the_key(tmp_path, change, message):
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump({**TINY, **change}))
    with pytest.raises(ConfigurationError, match=message):
        load_task(path)


def test_other_wrong_task_files(tmp_path):
    (tmp_path / "broken.yaml").write_text("env: [")
    (tmp_path / "list.yaml").write_text("- 1")
    for name, message in (("broken.yaml", "is not YAML"), ("list.yaml", "task file")):
        with pytest.raises(ConfigurationError, match=message):
            load_task(tmp_path / name)
    with pytest.raises(UnknownNameError, match=r"path of a \.yaml"):
        load_task("absent.yaml")


def test_templates_are_filled_with_every_word():
    prompts = {"train": {"templates": ["A {x} {y}", "B"], "slots": {"x": ["1", "2"], "y": ["3"]}}}
    task = Task.model_validate({"name": "t", **TINY, "prompts": {**TINY["prompts"], **prompts}})
    assert task.prompts.of("train") == ["A 1 3", "A 2 3", "B"]
