"""Prompts: every shape they come in, and errors that name the place."""

from __future__ import annotations

import json
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qstar_decoding.envs import Prompt, load_prompts
from qstar_decoding.envs.prompts import DEFAULT_PROMPTS, as_prompt
from qstar_decoding.errors import PromptError, QStarError

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello!"}]
QUESTION = [{"role": "user", "content": "What is 1 + 1?"}]


def plain(prompts: list[Prompt]) -> list[tuple[Any, dict[str, Any]]]:
    return [(prompt.content, dict(prompt.columns)) for prompt in prompts]


# ------------------------------------------------------------------------------------------------------- the shapes


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("The movie was", [("The movie was", {})]),
        (" kept as it is \n", [(" kept as it is \n", {})]),
        (CHAT, [(CHAT, {})]),
        (tuple(CHAT), [(CHAT, {})]),
        ([MappingProxyType(m) for m in CHAT], [(CHAT, {})]),
        ({"prompt": "1 + 1 =", "answer": 2}, [("1 + 1 =", {"answer": 2})]),
        ({"prompt": CHAT, "answer": 2, "level": "easy"}, [(CHAT, {"answer": 2, "level": "easy"})]),
        ({"prompt": "a", 3: "b"}, [("a", {"3": "b"})]),
        (["one", "two"], [("one", {}), ("two", {})]),
        (("one", "two"), [("one", {}), ("two", {})]),
        ((word for word in ["one", "two"]), [("one", {}), ("two", {})]),
        ({"one": 1, "two": 2}.keys(), [("one", {}), ("two", {})]),
        ([CHAT, QUESTION], [(CHAT, {}), (QUESTION, {})]),
        ([CHAT], [(CHAT, {})]),
        (["one", CHAT, {"prompt": "two", "n": 2}], [("one", {}), (CHAT, {}), ("two", {"n": 2})]),
        ([{"prompt": "one"}, {"prompt": CHAT}], [("one", {}), (CHAT, {})]),
        ("a .txt file in the middle", [("a .txt file in the middle", {})]),
        (["not a file.txt"], [("not a file.txt", {})]),  # in a list, a string is a prompt
    ],
)
def test_every_shape(source: Any, expected: list[tuple[Any, dict[str, Any]]]) -> None:
    assert plain(load_prompts(source)) == expected


def test_none_is_a_few_openings() -> None:
    for prompts in (load_prompts(), load_prompts(None)):
        assert [prompt.content for prompt in prompts] == list(DEFAULT_PROMPTS)
    assert len(DEFAULT_PROMPTS) > 1


def test_a_prompt_stays_the_prompt_that_it_is() -> None:
    prompt = Prompt("one", {"answer": 1})
    assert load_prompts(prompt) == [prompt]
    assert load_prompts([prompt, "two"])[0] is prompt
    assert as_prompt(prompt) is prompt


def test_a_chat_is_copied() -> None:
    chat = [dict(message) for message in CHAT]
    prompt = as_prompt(chat)
    chat[1]["content"] = "Something else"
    chat.append({"role": "user", "content": "More"})
    assert prompt.content == CHAT


def test_what_a_reward_sees() -> None:
    assert as_prompt("The movie was").text == "The movie was"
    assert as_prompt(CHAT).text == "Be brief.\nHello!"
    assert as_prompt({"prompt": CHAT, "answer": 2}).text == "Be brief.\nHello!"


# -------------------------------------------------------------------------------------------------------- the files


def test_a_text_file_has_a_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text('The movie was\n\n   \n{"prompt": "as it stands"}\nÜber Köln,', encoding="utf-8")
    expected = [("The movie was", {}), ('{"prompt": "as it stands"}', {}), ("Über Köln,", {})]
    assert plain(load_prompts(path)) == expected
    assert plain(load_prompts(str(path))) == expected


def test_a_jsonl_file_has_a_string_or_an_object_a_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    lines = ["The movie was", {"prompt": "1 + 1 =", "answer": 2}, {"prompt": CHAT}, CHAT]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n", encoding="utf-8")
    expected = [("The movie was", {}), ("1 + 1 =", {"answer": 2}), (CHAT, {}), (CHAT, {})]
    assert plain(load_prompts(path)) == expected
    assert plain(load_prompts(str(path))) == expected


def test_a_path_of_another_name_is_a_text_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.md"
    path.write_text("one\ntwo\n")
    assert [prompt.text for prompt in load_prompts(path)] == ["one", "two"]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["utf-8", "utf-8-sig"])
def test_files_as_windows_writes_them(tmp_path: Path, newline: str, mark: str) -> None:
    for name, one in (("prompts.txt", "one"), ("prompts.jsonl", '"one"')):
        (tmp_path / name).write_text(newline.join([one, one, ""]), encoding=mark, newline="")
        assert [prompt.text for prompt in load_prompts(tmp_path / name)] == ["one", "one"]


@given(texts=st.lists(st.text(st.characters(codec="utf-8")).filter(str.strip), min_size=1))
def test_any_text_can_stand_in_a_jsonl_file(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    # As most tools write it: characters that end a line elsewhere, such as U+2028, stand as they are in the strings.
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_text("".join(json.dumps(text, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    assert [prompt.text for prompt in load_prompts(path)] == texts


def test_a_line_separator_in_a_string_ends_no_line(tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('"one\u2028line"\n"another\x85one"', encoding="utf-8")
    assert [prompt.text for prompt in load_prompts(tmp_path / "prompts.jsonl")] == ["one\u2028line", "another\x85one"]


# ------------------------------------------------------------------------------------------------------- the errors


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "a prompt is empty"),
        (" \t\n", "a prompt is empty"),
        ({"prompt": ""}, "a prompt is empty"),
        ([], "the list of prompts is empty; give at least one"),
        ((), "the list of prompts is empty"),
        (iter(()), "the list of prompts is empty"),
        ({}, "a prompt is a string, a list of chat messages .*; got dict"),
        ({"question": "a"}, "a dict with the key 'prompt'; got dict: .*question"),
        ({"prompt": None}, "got NoneType"),
        ({"prompt": ["a", "b"]}, "got list"),
        (3, "prompts are .*, a .txt or .jsonl path, or an iterable of these; got 3"),
        (1.5, "got 1.5"),
        (b"bytes", "prompt 0: a prompt is .*; got int"),
        (["one", ""], "prompt 1: a prompt is empty"),
        (["one", "two", None], "prompt 2: a prompt is .*; got NoneType"),
        (["one", 2], "prompt 1: .* got int: '2'"),
        ([[]], "prompt 0: a prompt is .*; got list"),
        (["one", {"question": "a"}], "prompt 1: .* got dict"),
        ((text for text in ["one", "  "]), "prompt 1: a prompt is empty"),
        ([{"role": "user", "content": " "}], "a chat prompt has no content"),
        ([QUESTION, [{"role": "user", "content": ""}]], "prompt 1: a chat prompt has no content"),
        ([{"role": "user", "content": None}], "prompt 0: .* got dict"),
        ([{"role": "user"}], "prompt 0: .* got dict"),
        ([{"content": "a"}], "prompt 0: .* got dict"),
    ],
)
def test_what_is_no_prompt(source: Any, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        load_prompts(source)
    assert issubclass(PromptError, (QStarError, ValueError))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", '"one"\n\n{"prompt": "two"\n"three"', "p.jsonl, line 3: Expecting"),
        ("p.jsonl", "The movie was", "p.jsonl, line 1: Expecting value"),
        ("p.jsonl", '"one"\nnull', "p.jsonl, line 2: a prompt is .*; got NoneType"),
        ("p.jsonl", '"one"\n[1, 2]', "p.jsonl, line 2: a prompt is .*; got list"),
        ("p.jsonl", '{"question": "a"}', "p.jsonl, line 1: .* the key 'prompt'"),
        ("p.jsonl", '"one"\n""', "p.jsonl, line 2: a prompt is empty"),
        ("p.jsonl", "", "p.jsonl' has no prompts in it"),
        ("p.jsonl", "\n\n", "has no prompts in it"),
        ("p.txt", "", "p.txt' has no prompts in it"),
        ("p.txt", "  \n\t\n", "has no prompts in it"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(PromptError, match=message):
        load_prompts(tmp_path / name)


@pytest.mark.parametrize("name", ["missing.txt", "missing.jsonl"])
def test_a_missing_file(tmp_path: Path, name: str) -> None:
    for source in (tmp_path / name, str(tmp_path / name)):
        with pytest.raises(PromptError, match=f"cannot read the prompts file '.*{name}': No such file"):
            load_prompts(source)


def test_a_folder_and_a_file_that_is_not_utf_8(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match=r"cannot read the prompts file .*: Is a directory"):
        load_prompts(tmp_path)
    (tmp_path / "latin.txt").write_bytes("Über Köln".encode("latin-1"))
    with pytest.raises(PromptError, match=r"latin.txt' is not UTF-8: .*; save it as UTF-8"):
        load_prompts(tmp_path / "latin.txt")


# ---------------------------------------------------------------------------------------- data sets of `datasets`

ROWS = [{"prompt": "1 + 1 =", "answer": "2"}, {"prompt": "2 + 1 =", "answer": "3"}]


@pytest.fixture(scope="module")
def dataset() -> Any:
    return pytest.importorskip("datasets").Dataset.from_list(ROWS)


def test_a_data_set_brings_its_columns(dataset: Any, tmp_path: Path) -> None:
    expected = [("1 + 1 =", {"answer": "2"}), ("2 + 1 =", {"answer": "3"})]
    dataset.save_to_disk(tmp_path / "saved")
    for source in (dataset, dataset.to_iterable_dataset(), tmp_path / "saved", str(tmp_path / "saved")):
        assert plain(load_prompts(source)) == expected
    assert plain(load_prompts(dataset["prompt"])) == [("1 + 1 =", {}), ("2 + 1 =", {})]
    chats = type(dataset).from_list([{"prompt": CHAT, "level": 1}])
    assert plain(load_prompts(chats)) == [(CHAT, {"level": 1})]


def test_the_environment_takes_a_data_set_and_the_reward_its_columns(dataset: Any, tabular_env: Any) -> None:
    def answer(prompts: Any, completions: Any, answer: Any, **_: Any) -> list[float]:
        asked.extend(zip(prompts, answer, strict=True))
        return [0.0] * len(prompts)

    asked: list[tuple[str, str]] = []
    letters = dataset.map(lambda row, i: {"prompt": "ab"[i]}, with_indices=True).to_iterable_dataset()
    env = tabular_env(prompts=letters, reward=answer, max_new_tokens=1)
    for seed in range(20):
        env.reset(seed=seed)
        env.step(0)
    assert set(asked) == {("a", "2"), ("b", "3")}


def test_a_data_set_without_prompts_says_what_to_rename(dataset: Any, tmp_path: Path) -> None:
    from datasets import DatasetDict

    wrong = dataset.rename_column("prompt", "question")
    with pytest.raises(PromptError, match=r"prompt 0: .* of its keys \['question', 'answer'\] name the one .*'prompt'"):
        load_prompts(wrong)
    with pytest.raises(PromptError, match=r"dataset.rename_column\('question', 'prompt'\)"):
        load_prompts(wrong.to_iterable_dataset())
    assert plain(load_prompts(wrong.rename_column("question", "prompt"))) == plain(load_prompts(dataset))
    splits = DatasetDict(train=dataset, test=dataset)
    splits.save_to_disk(tmp_path / "splits")
    for source in (splits, tmp_path / "splits"):
        with pytest.raises(PromptError, match=r"several splits; choose one of \['train', 'test'\]"):
            load_prompts(source)
    assert len(load_prompts(tmp_path / "splits" / "test")) == 2
    with pytest.raises(PromptError, match="the list of prompts is empty"):
        load_prompts(dataset.select([]))
    (tmp_path / "splits" / "test" / "state.json").write_text("{}")
    with pytest.raises(PromptError, match=r"the data set in .*test cannot be read"):
        load_prompts(tmp_path / "splits" / "test")


def test_a_text_is_no_folder(dataset: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset.save_to_disk(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert plain(load_prompts("long " * 2000)) == [("long " * 2000, {})]
    assert plain(load_prompts("null \0")) == [("null \0", {})]
    with pytest.raises(PromptError, match="a prompt is empty"):
        load_prompts("")


@pytest.mark.parametrize(
    "prompt",
    [
        "the \ud83d cat",
        "caf\udce9 is",
        {"prompt": "the \ud83d"},
        [{"role": "user", "content": "the \ud83d"}],
    ],
)
def test_half_of_a_character_is_named(prompt):
    with pytest.raises(PromptError, match=r"half of a character .*lone surrogate.*after '(the|caf)") as error:
        as_prompt(prompt)
    str(error.value).encode("utf-8")
