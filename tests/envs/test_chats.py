"""Chats and tables as prompts: parts, messages to continue, arguments of templates, templates that refuse."""

import json

import numpy as np
import pytest

from qstar_decoding.agents import GreedyDecoder
from qstar_decoding.envs import DecodingMDP, TabularLM, load_prompts
from qstar_decoding.envs.prompts import as_prompt
from qstar_decoding.errors import PromptError

USER = {"role": "user", "content": "What is 1 + 1?"}
PARTS = [{"type": "text", "text": "What is"}, {"type": "text", "text": "1 + 1?"}]

THINKING = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if enable_thinking is defined and not enable_thinking %}w2{% endif %}"
    "{% endif %}"
)
REFUSING = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{{ m.content }}{% endfor %}"
)


@pytest.fixture(scope="module")
def templated(new_tiny_lm):
    def make(template):
        lm = new_tiny_lm("Llama")
        lm.tokenizer.chat_template = template
        return lm

    return make


def text_of(lm, prompt, **template):
    """The text that the template makes, seen by a tokenizer that keeps it."""
    seen = []
    tokenizer = lm.tokenizer

    class Spy:
        chat_template = tokenizer.chat_template
        apply_chat_template = staticmethod(tokenizer.apply_chat_template)

        def __call__(self, text, **_):
            seen.append(text)
            return {"input_ids": [3]}

    lm.tokenizer = Spy()
    try:
        lm.encode(prompt, **template)
    finally:
        lm.tokenizer = tokenizer
    return seen[0]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (PARTS, "What is\n1 + 1?"),
        (PARTS[:1], "What is"),
        (["What is", "1 + 1?"], "What is\n1 + 1?"),
        ([{"type": "text", "text": "What is"}, "1 + 1?"], "What is\n1 + 1?"),
        ([{"text": "What is"}], "What is"),
    ],
)
def test_content_parts_are_one_text(content, text, templated):
    prompt = as_prompt([{"role": "user", "content": content}])
    assert prompt.content == [{"role": "user", "content": text}]
    assert prompt.text == text
    lm = templated(THINKING)
    assert text_of(lm, prompt.content) == f"<user>{text}</user><assistant>"
    [row] = load_prompts([{"prompt": [{"role": "user", "content": content}], "answer": 2}])
    assert (row.text, row.columns) == (text, {"answer": 2})


@pytest.mark.parametrize(
    "part", [{"type": "image_url", "image_url": {"url": "x"}}, {"type": "text"}, {"type": "text", "text": 3}, 3, None]
)
def test_parts_that_are_no_text_are_named(part):
    with pytest.raises(PromptError, match=r"message 1: content is a string or a list of .*, got") as caught:
        load_prompts([{"role": "system", "content": "Be brief."}, {"role": "user", "content": [*PARTS, part]}])
    assert "\n" not in str(caught.value)


def test_parts_without_content_are_an_empty_chat():
    for content in ([], [{"type": "text", "text": " "}]):
        with pytest.raises(PromptError, match="a chat prompt has no content"):
            as_prompt([{"role": "user", "content": content}])


def test_an_assistants_last_message_is_continued(templated):
    lm = templated(THINKING)
    asked = text_of(lm, [USER])
    assert asked.endswith("</user><assistant>")
    for begun in ("It is", "It is "):
        text = text_of(lm, [USER, {"role": "assistant", "content": begun}])
        assert text.rstrip() == f"<user>{USER['content']}</user><assistant>It is"
    # An answer that is followed by another question is history.
    history = text_of(lm, [USER, {"role": "assistant", "content": "2"}, USER])
    assert history.endswith("</user><assistant>")
    closed = text_of(
        lm, [USER, {"role": "assistant", "content": "2"}], continue_final_message=False, add_generation_prompt=True
    )
    assert closed.endswith("<assistant>2</assistant><assistant>")


def test_the_embedded_model_continues_an_answer(lm):
    mdp = DecodingMDP(lm, reward="length", max_new_tokens=4)
    chat = [USER, {"role": "assistant", "content": "1 + 1 equals"}]
    ids = mdp.encode(as_prompt(chat))
    assert lm.tokenizer.decode(ids).endswith("<|im_start|>assistant\n1 + 1 equals")
    assert GreedyDecoder(mdp).plan(chat).text.startswith(" 2")


@pytest.mark.parametrize("thinking", [True, False])
def test_arguments_of_the_template_pass_through(templated, thinking):
    lm = templated(THINKING)
    row = {"prompt": [USER], "chat_template_kwargs": {"enable_thinking": thinking}, "answer": 2}
    [prompt] = load_prompts([row])
    assert prompt.columns == {"answer": 2}  # they are no column of the reward's
    assert text_of(lm, prompt.content, **prompt.template).endswith("<assistant>" + ("" if thinking else "w2"))
    mdp = DecodingMDP(lm, reward="length", max_new_tokens=2)
    plain = mdp.encode(as_prompt([USER]))
    assert (mdp.encode(prompt) == plain) == thinking
    mdp.encode(as_prompt([USER]))  # which is kept apart
    assert mdp.encode(as_prompt([USER])) == plain


def test_arguments_of_the_template_that_are_none_are_left_to_the_template():
    # A data set gives every row the keys of all rows.
    row = {"prompt": [USER], "chat_template_kwargs": {"enable_thinking": None, "documents": None}}
    assert as_prompt(row).template == {}
    assert as_prompt({"prompt": [USER], "chat_template_kwargs": None}).template == {}
    for wrong in (3, ["enable_thinking"], {1: 2}):
        with pytest.raises(PromptError, match="chat_template_kwargs is a dict of arguments of the chat template"):
            as_prompt({"prompt": [USER], "chat_template_kwargs": wrong})


@pytest.mark.parametrize(
    ("template", "chat", "message"),
    [
        (REFUSING, [{"role": "system", "content": "x"}, USER], "roles system, user: System role not supported"),
        ("{{ messages[0].content.nope() }}", [USER], "refuses a chat of the roles user: .*nope"),
        ("{% for %}", [USER], "refuses a chat of the roles user"),
        ("{{ 1 / 0 }}", [USER], "division by zero"),
        ("nothing of it", [USER, {"role": "assistant", "content": "It is"}], "refuses a chat of the roles user, ass"),
    ],
)
def test_a_template_that_refuses_says_so_in_one_line(templated, template, chat, message):
    mdp = DecodingMDP(templated(template), reward="length", max_new_tokens=2)
    with pytest.raises(PromptError, match=message) as caught:
        GreedyDecoder(mdp).plan(chat)
    assert "\n" not in str(caught.value)


def test_models_without_a_template_say_so(tiny_lm):
    for model, message in ((tiny_lm("Llama"), "has no chat template"), (TabularLM.random(4, 1), "no chat template")):
        with pytest.raises(PromptError, match=message):
            DecodingMDP(model, reward="pangram", top_k=2, max_new_tokens=2).encode(as_prompt([USER]))


# ------------------------------------------------------------------------------------------------------------ tables


def test_a_data_frame_is_a_table_of_prompts():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"prompt": ["one", "two"], "answer": [1, 2]}, index=[7, 9])
    prompts = load_prompts(frame)
    assert [(prompt.text, dict(prompt.columns)) for prompt in prompts] == [
        ("one", {"answer": 1}),
        ("two", {"answer": 2}),
    ]
    assert [prompt.text for prompt in load_prompts(frame["prompt"])] == ["one", "two"]
    chats = pandas.DataFrame({"prompt": [[USER], [USER]]})
    assert [prompt.content for prompt in load_prompts(chats)] == [[USER], [USER]]
    with pytest.raises(PromptError, match=r"prompt 0: .*of its keys \['question', 'answer'\] name the one"):
        load_prompts(frame.rename(columns={"prompt": "question"}))
    with pytest.raises(PromptError, match=r"prompt 1: a prompt is .*got float"):
        load_prompts(pandas.DataFrame({"prompt": ["one", None]}).astype(object).fillna(float("nan")))
    with pytest.raises(PromptError, match="the list of prompts is empty"):
        load_prompts(frame.iloc[:0])


def test_tables_from_parquet_files_hold_arrays():
    # As pandas and the library datasets, in NumPy's format, give lists and texts back.
    chat = np.empty(1, dtype=object)
    chat[0] = USER
    numbers = np.array([1, 2])
    [prompt] = load_prompts([{"prompt": chat, "numbers": numbers}])
    assert prompt.content == [USER]
    assert prompt.columns["numbers"] is numbers
    parts = np.empty(1, dtype=object)
    parts[0] = {"type": "text", "text": "Hi"}
    assert as_prompt([{"role": "user", "content": parts}]).content == [{"role": "user", "content": "Hi"}]
    [text] = load_prompts(np.array(["one"]))
    assert type(text.content) is str


def test_a_frame_of_polars_is_a_table_of_prompts():
    # As polars answers; the library itself is not needed.
    class Frame:
        columns = ("prompt", "answer")

        def to_dicts(self):
            return [{"prompt": "one", "answer": 1}]

    [prompt] = load_prompts(Frame())
    assert (prompt.text, dict(prompt.columns)) == ("one", {"answer": 1})


def test_the_environment_takes_a_data_frame(tabular_env):
    pandas = pytest.importorskip("pandas")
    env = tabular_env(prompts=pandas.DataFrame({"prompt": ["ab", "c"]}))
    assert {env.reset(seed=seed)[1]["prompt"] for seed in range(10)} == {"ab", "c"}


# ------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    "text",
    ["Please read notes.txt", "Summarise the file data.jsonl", "A\tnotes.txt", "first line\nnotes.txt", " notes.txt"],
)
def test_a_sentence_that_ends_in_a_files_name_is_a_prompt(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("The movie was\n")
    assert [prompt.text for prompt in load_prompts(text)] == [text]


def test_a_files_name_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my notes.txt").write_text("The movie was\n")
    assert [prompt.text for prompt in load_prompts("my notes.txt")] == ["The movie was"]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "one", "answer": 1}))
    assert [prompt.text for prompt in load_prompts("rows.jsonl")] == ["one"]
    with pytest.raises(PromptError, match=r"cannot read the prompts file 'absent.txt': No such file"):
        load_prompts("absent.txt")
    assert load_prompts(["absent.txt"])[0].text == "absent.txt"
