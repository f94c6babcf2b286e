"""Texts of language models: continuations, special tokens, prompts, and ids without a token, by kind of tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qstar_decoding.agents import AStarPlanner
from qstar_decoding.envs import (
    BannedStrings,
    Completion,
    DecodingMDP,
    ForcedStrings,
    MinTokens,
    Prompt,
    RegexConstraint,
    TransformersLM,
)
from qstar_decoding.errors import ConfigurationError, PromptError
from qstar_decoding.models.base import LanguageModel

from .tokenizers_of_kinds import byte_level, language_model, sentencepiece, word_level

KINDS: dict[str, Callable[[], Any]] = {
    "strip": sentencepiece,
    "metaspace": lambda: sentencepiece(decoder="metaspace"),
    "no bos": lambda: sentencepiece(add_bos=False),
    "byte level": byte_level,
    "word level": word_level,
}
MODELS = {kind: language_model(make()) for kind, make in KINDS.items()}


@pytest.fixture(params=list(KINDS))
def lm(request: pytest.FixtureRequest) -> TransformersLM:
    return MODELS[request.param]


def write(lm: LanguageModel, tokens: Sequence[int], **options: Any) -> Completion:
    """Return the completion of "the cat" by these tokens, the last of which ends it."""
    options = {"reward": lambda prompt, completion: 0.0, "max_new_tokens": len(tokens), **options}
    mdp = DecodingMDP(lm, top_k=lm.vocab_size, **options)
    prompt = Prompt("the cat")
    [node] = mdp.roots([prompt])
    for token in tokens:
        action = np.flatnonzero(mdp.tree.tokens[node] == token)
        here = np.array([node])
        if mdp.finishes(here)[0][action[0]]:
            return mdp.complete([prompt], here, action)[0]
        [node] = mdp.tree.expand(here, action)
    raise AssertionError("nothing ended the completion")


# ------------------------------------------------------------------------------------------------------- continuations


@pytest.mark.parametrize("kind", list(KINDS))
@given(data=st.data())
def test_a_continuation_is_what_its_tokens_add_to_a_text(kind: str, data: st.DataObject) -> None:
    lm = MODELS[kind]
    ids = data.draw(st.lists(st.integers(0, lm.vocab_size - 1), max_size=8))
    before = lm.encode("the cat")
    assert lm.decode([*before, *ids]) == lm.decode(before) + lm.decode_continuation(ids)


def test_a_word_that_goes_on_begins_with_a_space(lm: TransformersLM) -> None:
    ids = lm.encode("the cat sat on")[len(lm.encode("the cat")) :]
    assert lm.decode_continuation(ids) == " sat on"
    assert lm.decode_continuation(ids[:1]) == " sat"
    assert lm.decode_continuation([]) == ""


def test_everybody_sees_the_first_space(lm: TransformersLM) -> None:
    sat, on, the = (lm.encode(f"the {word}")[-1] for word in ("sat", "on", "the"))
    seen: list[str] = []

    def reward(prompt: str, completion: str) -> float:
        seen.append(completion)
        return 0.0

    assert write(lm, [sat, on], reward=reward).text == " sat on"
    assert seen == [" sat on"]
    stopped = write(lm, [the, sat], stop=" the")
    assert (stopped.text, stopped.stop) == ("", "stop")
    assert write(lm, [sat, the, on], stop=" the").text == " sat"
    mdp = DecodingMDP(lm, reward="length", top_k=2, max_new_tokens=2)
    assert mdp.token_text(sat) == " sat"
    assert mdp.texts(mdp.tree.expand(mdp.roots([Prompt("the cat")]), np.array([0])))[0] == lm.decode_continuation(
        mdp.tree.tokens[0, :1]
    )


@pytest.mark.parametrize(
    ("constraint", "accepts"),
    [
        (RegexConstraint(" (yes|no|maybe)"), lambda text: text in (" yes", " no", " maybe")),
        (ForcedStrings(" the"), lambda text: " the" in text),
        (BannedStrings(" the", " cat"), lambda text: " the" not in text and " cat" not in text),
    ],
)
def test_constraints_see_the_first_space(lm: TransformersLM, constraint: Any, accepts: Callable[[str], bool]) -> None:
    mdp = DecodingMDP(
        lm,
        reward=lambda prompt, completion: float(completion.startswith(" the")),
        top_k=lm.vocab_size,
        max_new_tokens=1 if isinstance(constraint, ForcedStrings) else 4,
        constraint=constraint,
    )
    plan = AStarPlanner(mdp, n=4).plan("the cat", 60)
    assert plan.completions
    assert all(accepts(completion.text) for completion in plan.completions), [c.text for c in plan.completions]


# ------------------------------------------------------------------------------------------------------ special tokens


@pytest.mark.parametrize("stop", ["<|im_end|>", ["x", "<|im_end|>"], ["<|im_start|>", "<|im_end|>", "zebra"]])
def test_a_stop_string_may_be_a_special_token(stop: Any) -> None:
    lm = MODELS["byte level"]
    cat, end = lm.encode(" cat")[0], lm.special_tokens["<|im_end|>"]
    assert end not in lm.eos_token_ids
    for constraint in (None, MinTokens(1), ForcedStrings("cat")):
        done = write(lm, [cat, end, cat], stop=stop, constraint=constraint)
        assert (done.text, done.stop, done.token_ids) == (" cat", "stop", (cat, end))
    assert write(lm, [cat, end, cat]).text == " cat cat"  # without it, the token has no text and ends nothing
    # It may not end what must go on.
    mdp = DecodingMDP(lm, reward="length", top_k=lm.vocab_size, max_new_tokens=4, stop=stop, constraint=MinTokens(2))
    nodes = mdp.roots([Prompt("the cat")])
    for tokens, allowed in (([], False), ([cat], False), ([cat, cat], True)):
        for token in tokens[-1:]:
            nodes = mdp.tree.expand(nodes, np.flatnonzero(mdp.tree.tokens[nodes[0]] == token))
        action = int(np.flatnonzero(mdp.tree.tokens[nodes[0]] == end)[0])
        assert mdp.action_mask(nodes)[0, action] == allowed


def test_the_end_of_a_sequence_ends_as_such_even_if_it_is_a_stop_string_too() -> None:
    lm = MODELS["byte level"]
    assert write(lm, [lm.special_tokens["<|end|>"]], stop="<|end|>").stop == "eos"


@pytest.mark.parametrize("stop", ["<|im_end|>\n", "a<|im_start|>", ["x", " <|end|>"]])
def test_a_stop_string_that_could_never_appear_is_refused(stop: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"contains the special token '<\|\w+\|>', which has no text; give"):
        DecodingMDP(MODELS["byte level"], reward="length", stop=stop)


# ------------------------------------------------------------------------------------------------------------- prompts


@pytest.mark.parametrize(
    ("template", "before"),
    [
        ("$A <|end|>", []),
        ("<|begin|> $A <|end|>", ["<|begin|>"]),
        ("<|begin|> <|im_start|> $A <|im_end|> <|end|>", ["<|begin|>", "<|im_start|>"]),
        ("<|begin|> $A", ["<|begin|>"]),
        ("$A", []),
    ],
)
def test_a_prompt_does_not_end_with_what_the_tokenizer_appends(template: str, before: list[str]) -> None:
    lm = language_model(byte_level(template))
    plain = lm.tokenizer("the cat", add_special_tokens=False)["input_ids"]
    first = lm.tokenizer.convert_tokens_to_ids(before)
    assert lm.encode("the cat") == [*first, *plain]
    # A text that has these tokens in it, as chat templates write them, gets none for the second time.
    assert lm.encode("<|begin|>the cat") == [lm.special_tokens["<|begin|>"], *plain]
    assert lm.encode("the cat<|im_end|>")[-1] == lm.special_tokens["<|im_end|>"]
    assert lm.encode("the cat<|end|>") == [*first, *plain, lm.special_tokens["<|end|>"]]  # the user wrote it
    if "<|begin|>" in before:
        assert lm.encode("") == first


def test_a_tokenizer_with_one_token_for_both_ends_still_begins_an_empty_prompt() -> None:
    lm = language_model(byte_level("<|end|> $A", bos_token="<|end|>"))  # as OPT's
    assert lm.encode("") == [lm.special_tokens["<|end|>"]]
    assert lm.encode("the cat")[0] == lm.special_tokens["<|end|>"]


def test_a_chat_begins_once() -> None:
    tokenizer = byte_level("<|begin|> $A <|end|>")
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}<|im_start|>"
    )
    lm = language_model(tokenizer)
    chat = lm.encode([{"role": "user", "content": "the cat"}])
    assert chat.count(lm.special_tokens["<|begin|>"]) == 1
    assert chat[0] == lm.special_tokens["<|begin|>"]
    assert chat[-1] == lm.special_tokens["<|im_start|>"]
    text = tokenizer.apply_chat_template([{"role": "user", "content": "the cat"}], tokenize=False)
    assert lm.encode(str(text)) == chat


# ------------------------------------------------------------------------------------------------- ids without a token


def test_padded_ids_have_no_text() -> None:
    for make in KINDS.values():
        lm = language_model(make(), vocab_size=400)
        for padded in (len(lm.tokenizer), 399):
            assert lm.decode([padded]) == lm.decode_continuation([padded]) == ""
            ids = lm.encode("the cat")
            assert lm.decode([*ids, padded]) == lm.decode(ids)


@pytest.mark.parametrize("ids", [[-1], [5, 400], [10**12]])
def test_an_id_that_is_none_of_the_models_is_said(ids: list[int]) -> None:
    lm = language_model(byte_level(), vocab_size=400)
    with pytest.raises(ConfigurationError, match="token ids of 'tiny' are from 0 to 399, got"):
        lm.decode(ids)
    with pytest.raises(PromptError, match="token ids of 'tiny' are integers from 0 to 399, got"):
        DecodingMDP(lm, reward="length", top_k=2).roots([Prompt("x", {}, tuple(ids))])


class SlowTokenizer:
    """A tokenizer in Python, without a token for unknown words: it gives and takes None for them."""

    is_fast, eos_token_id, bos_token_id = False, 0, None
    added_tokens_decoder: ClassVar[dict[int, Any]] = {}
    all_special_tokens: tuple[str, ...] = ()
    all_special_ids: tuple[int, ...] = ()
    words = ("</s>", "the", "cat")

    def __len__(self) -> int:
        return len(self.words)

    def __call__(self, text: str, **_: Any) -> dict[str, list[int | None]]:
        return {"input_ids": [self.words.index(w) if w in self.words else None for w in text.split()]}

    def get_added_vocab(self) -> dict[str, int]:
        return {}

    def convert_ids_to_tokens(self, token: int) -> str | None:
        return self.words[token] if token < len(self.words) else None

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(self.convert_ids_to_tokens(i) for i in ids)  # type: ignore[misc]


def test_a_slow_tokenizer_neither_takes_nor_gives_none() -> None:
    lm = language_model(SlowTokenizer(), vocab_size=9)
    assert lm.encode("the cat") == [1, 2]
    with pytest.raises(PromptError, match="no tokens for all of the prompt 'the dog'"):
        lm.encode("the dog")
    assert lm.decode([1, 7, 2]) == "the cat"
    plan = AStarPlanner(DecodingMDP(lm, reward="length", top_k=9, max_new_tokens=3)).plan("the cat", 30)
    assert plan.completions


@pytest.mark.parametrize("eos", [9999, -1, [0, 9999], [-1, 0, 320]])
def test_end_tokens_outside_of_the_vocabulary_are_ignored(eos: Any) -> None:
    lm = language_model(byte_level(), eos_token_id=eos)
    assert lm.eos_token_ids == {0}
    for constraint in (None, RegexConstraint(" (yes|no)"), MinTokens(2), BannedStrings("a")):
        mdp = DecodingMDP(lm, reward="length", top_k=4, max_new_tokens=4, constraint=constraint)
        assert AStarPlanner(mdp).plan("the cat", 40).completions
