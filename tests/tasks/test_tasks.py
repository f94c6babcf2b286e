"""Tasks: those that the package ships, and files that are wrong."""

import itertools
import re

import pytest
import yaml

from qstar_decoding.agents import AStarPlanner
from qstar_decoding.errors import ConfigurationError, UnknownNameError
from qstar_decoding.rewards import as_reward
from qstar_decoding.tasks import Task, load_task, task_names
from qstar_decoding.tasks.generators import GENERATORS, countdown, game_of_24, star_graph
from qstar_decoding.tasks.number_puzzles import is_solvable

TINY = {
    "description": "Six tokens of a review, for the tests.",
    "env": {"reward": "sentiment", "top_k": 4, "max_new_tokens": 6},
    "prompts": {"train": ["The movie was", "The food was"], "dev": ["A dog"], "test": ["The play was", "My week"]},
    "steps": 60,
}


PUZZLES = ["countdown-3", "countdown-4", "game-of-24", "star-graph"]


@pytest.mark.parametrize(
    "name", ["sentiment", "arithmetic", "arithmetic-99", "keywords", "relevance", "review", *PUZZLES]
)
def test_the_real_tasks_have_enough_disjoint_prompts(name):
    task = load_task(name)
    train, dev, test = ({str(p) for p in task.prompts.of(split)} for split in ("train", "dev", "test"))
    assert len(train) >= 300
    assert len(dev) >= 20
    assert len(test) >= 40
    assert len(train | dev | test) == len(train) + len(dev) + len(test)


def test_relevance_is_tried_on_things_that_training_has_not():
    prompts = load_task("relevance").prompts
    things = {split: {*getattr(prompts, split).slots["thing"]} for split in ("train", "dev", "test")}
    assert len(things["train"]) >= 400
    assert not things["train"] & (things["dev"] | things["test"])
    worded = {split: {*getattr(prompts, split).templates} for split in ("train", "dev", "test")}
    assert worded["train"] & (worded["dev"] | worded["test"]) == {"Tell me about {thing}."}


def test_every_task_is_listed_and_loads():
    others = ["arithmetic", "arithmetic-99", "keywords", "reasoning-gym", "relevance", "review", "sentiment", "toy"]
    assert {*task_names()} >= {*others, *PUZZLES}
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


@pytest.mark.parametrize("name", ["countdown-3", "countdown-4", "game-of-24"])
def test_number_puzzles_are_new_in_each_split_and_can_be_solved(name):
    task = load_task(name)
    splits = {split: task.prompts.of(split) for split in ("train", "dev", "test")}
    assert len(splits["train"]) == 5000
    problems = {split: {(*sorted(p["numbers"]), p["target"]) for p in prompts} for split, prompts in splits.items()}
    assert not problems["train"] & problems["test"]
    assert not problems["train"] & problems["dev"]
    assert not problems["dev"] & problems["test"]
    reward = as_reward(task.env["reward"])
    for prompt in splits["test"][:20]:
        *solved, asked = prompt["prompt"].split("\n")
        assert asked == f"Numbers: {' '.join(map(str, prompt['numbers']))}. Target: {prompt['target']}. Solution: "
        assert is_solvable(tuple(sorted(prompt["numbers"])), prompt["target"])
        for line in solved:
            numbers, target, answer = re.match(r"Numbers: (.*)\. Target: (\d+)\. Solution: (.+)$", line).groups()
            columns = {"numbers": [[*map(int, numbers.split())]], "target": [int(target)]}
            assert reward([""], [answer], **columns).tolist() == [1]
            assert (*sorted(columns["numbers"][0]), int(target)) not in problems["test"] | problems["train"]


def test_the_game_of_24_is_tested_on_the_published_problems():
    test = load_task("game-of-24").prompts.of("test")
    assert [p["numbers"] for p in test[:3]] == [[4, 5, 6, 10], [1, 2, 4, 7], [2, 5, 8, 11]]
    assert len(test) == 100
    assert {p["target"] for p in test} == {24}


def test_degrees_may_be_a_range():
    asked = {"length": 2, "train": 5, "dev": 2, "test": 2}
    assert star_graph(degrees=range(3, 5), **asked) == star_graph(degrees=[3, 4], **asked)


def test_paths_of_star_graphs_are_right_and_of_all_degrees():
    test = load_task("star-graph").prompts.of("test")
    assert {p["degree"] for p in test} == {*range(3, 11)}
    for prompt in test:
        edges, path = {tuple(edge) for edge in prompt["edges"]}, prompt["answer"].split(">")
        assert all(pair in edges for pair in itertools.pairwise(path))
        assert path[0] == prompt["start"]
        assert prompt["prompt"].endswith(f"From {path[0]} to {path[-1]}: ")
        assert sum(a == prompt["start"] for a, _ in edges) == prompt["degree"]


@pytest.mark.parametrize(
    ("generator", "arguments", "message"),
    [
        (
            countdown,
            {"numbers": 2, "low": 1, "high": 3, "target": 9, "train": 90, "dev": 1, "test": 1},
            "widen the ranges",
        ),
        (game_of_24, {"test": ["4 5 six"], "train": 5, "dev": 1}, "test problems are texts"),
        (game_of_24, {"test": ["4 5 6 10"], "train": 10**6, "dev": 1}, "training problems"),
        (star_graph, {"degrees": [30], "length": 3, "train": 1, "dev": 1, "test": 1}, "fewer or shorter paths"),
    ],
)
def test_puzzles_that_cannot_be_generated(generator, arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        generator(**arguments)


FEW = {"train": 3, "dev": 1, "test": 1}
GOOD_ARGUMENTS = {
    "addition": {**FEW, "low": 1, "high": 4},
    "countdown": {**FEW, "numbers": 3, "low": 1, "high": 9, "target": 30},
    "game_of_24": {**FEW, "test": ["4 5 6 10"]},
    "keywords": {**FEW, "groups": [["dog", "cat"], ["run", "eat", "sit", "nap"]], "template": "Use {words}."},
    "letters": {**FEW, "vocabulary": "abc", "length": 2},
    "reasoning_gym": {**FEW, "datasets": {"chain_sum": {"max_terms": 2}}},
    "star_graph": {**FEW, "degrees": [1], "length": 1},
}


@pytest.mark.parametrize("name", GENERATORS)
def test_generators_check_the_numbers_of_prompts(name):
    make, good = GENERATORS[name], GOOD_ARGUMENTS[name]
    assert {split: len(prompts) for split, prompts in make(**good).items()} == FEW
    wrong = [("dev", 0), ("dev", "2"), ("train", -1), ("seed", -1), ("seed", "a"), ("shots", -1)]
    for key, value in wrong:
        if key != "shots" or name in ("countdown", "game_of_24", "reasoning_gym", "star_graph"):
            with pytest.raises(ConfigurationError, match=f"^{key} is an integer"):
                make(**{**good, key: value})
    if name != "reasoning_gym":  # whose ``train`` is the most
        with pytest.raises(ConfigurationError, match="ask for fewer"):
            make(**{**good, "train": 30_000})


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("addition", {"low": 5}, "high is an integer from 5"),
        ("addition", {"high": 10**6}, "up to 3000 numbers"),
        ("countdown", {"format": "Expression"}, "format is 'expression'"),
        ("countdown", {"operators": ["+", "-"]}, "operators are some of"),
        ("countdown", {"low": 0}, "low is an integer from 1"),
        ("countdown", {"low": 10}, "high is an integer from 10"),
        ("countdown", {"numbers": 7}, "numbers is an integer from 1 to 6"),
        ("countdown", {"target": "30"}, "target is an integer"),
        ("game_of_24", {"format": "step"}, "format is 'expression'"),
        ("game_of_24", {"test": "4 5 6 10"}, "test is a list"),
        ("game_of_24", {"test": ["4 5 6 10 1"]}, "four numbers from 1 to 13"),
        ("game_of_24", {"dev": 10_000}, "dev problems left"),
        ("keywords", {"groups": ["dog", "cat"]}, "a group is a list"),
        ("keywords", {"groups": [[1, 2]]}, "groups are lists of words"),
        ("keywords", {"template": "Use {word}."}, "template is a text with"),
        ("keywords", {"template": "Use these."}, "template is a text with"),
        ("keywords", {"dev": 500}, "kept back from training, and 501"),
        ("letters", {"vocabulary": ["a", "b"]}, "vocabulary is a text"),
        ("letters", {"length": 0}, "length is an integer"),
        ("reasoning_gym", {"datasets": {"chain_sums": {}}}, "no data set 'chain_sums'"),
        ("reasoning_gym", {"datasets": {"chain_sum": {"min_terms": 9, "max_terms": 2}}}, "no data set 'chain_sum'"),
        ("reasoning_gym", {"datasets": {"chain_sum": None}}, "datasets maps names"),
        ("star_graph", {"degrees": 3}, "degrees is a list"),
        ("star_graph", {"degrees": []}, "degrees is a list"),
    ],
)
def test_generators_check_their_arguments(name, change, message):
    with pytest.raises(ConfigurationError, match=message) as error:
        GENERATORS[name](**{**GOOD_ARGUMENTS[name], **change})
    assert "\n" not in str(error.value)


def test_review_keeps_topics_and_wording_back():
    prompts = load_task("review").prompts
    assert len(prompts.of("train")) >= 5000
    templates, topics = prompts.train.templates, {word for words in prompts.train.slots.values() for word in words}
    parts = {part for topic in topics for part in re.findall(r"[a-z]{3,}", topic.lower())}
    for prompt in [*prompts.of("dev"), *prompts.of("test")]:
        assert not parts & set(re.findall(r"[a-z]{3,}", prompt.lower())), prompt
        assert not any(re.fullmatch(re.sub(r"\\{\w+\\}", ".+", re.escape(t)), prompt) for t in templates), prompt


def test_review_cannot_be_had_by_repetition_or_stock_phrases(lm):
    reward = as_reward(load_task("review").env["reward"])
    texts = [
        " looks old, yet every room was clean, bright and full of friendly people who smiled at us all morning.",
        " is the best. I love it! I love it! I love it! I love it! I love it! I love it!",
        ", I'm happy to help. What can I do for you today? What's your pleasure? I'd love to share it.",
        " looks old, yet every room was clean, bright and full of friendly people who smiled at us all",  # unfinished
        " looks good.",
    ]
    good, *others = reward(["The hotel"] * len(texts), texts).tolist()
    assert good > 5
    assert max(others) < good - 0.5
    sentiment = as_reward("sentiment")(["The hotel"] * len(texts), texts)
    assert sentiment[1] > sentiment[0]  # which repetition does raise


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
        ({"training": {"seed": 3}}, "training: .*'seed' has no place here"),
        ({"env": {"prompts": ["a"]}}, "env: .*'prompts' has no place here"),
        (
            {"prompts": {"train": {"templates": ["A {x} {y}"], "slots": {"x": ["1"]}}, "dev": ["b"], "test": ["c"]}},
            "'A {x}",
        ),
        (
            {"prompts": {"train": {"templates": ["A {"]}, "dev": ["b"], "test": ["c"]}},
            "train.templates: .* cannot be filled",
        ),
        ({"prompts": {"train": {"templates": ["A {x}"], "slots": {"x": []}}, "dev": ["b"], "test": ["c"]}}, "slots.x"),
        ({"prompts": {"train": "a", "dev": ["b"], "test": ["c"]}}, "prompts.train.listed: [^:;]*$"),
        *(({"name": name}, "name: ") for name in ("../../elsewhere", "a/b", "..", ".", "", "a\\b", "a\0b")),
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
    for name, message in (("broken.yaml", "is not YAML"), ("list.yaml", "a mapping of keys is needed")):
        with pytest.raises(ConfigurationError, match=message):
            load_task(tmp_path / name)
    for name in ("absent.yaml", "a" * 5000):
        with pytest.raises(UnknownNameError, match=r"path of a \.yaml"):
            load_task(name)


def test_templates_are_filled_with_every_word():
    prompts = {"train": {"templates": ["A {x} {y}", "B"], "slots": {"x": ["1", "2"], "y": ["3"]}}}
    task = Task.model_validate({"name": "t", **TINY, "prompts": {**TINY["prompts"], **prompts}})
    assert task.prompts.of("train") == ["A 1 3", "A 2 3", "B"]
