"""Preferences that are learned from pairs."""

from __future__ import annotations

import json

import pytest

from qstar_decoding.errors import ConfigurationError
from qstar_decoding.rewards.library.language import Pair, Preference, read_pairs, train_preference

from ..samples import PAIRS


def test_a_preference_is_learned_from_pairs(tiny_lm, tmp_path):
    lm = tiny_lm("Llama")
    found = train_preference(PAIRS, tmp_path, model=lm, seed=1)
    assert found["held_out_pairs"] == 3
    assert -5 < found["held_out_log_likelihood"] <= 0
    reward = Preference(tmp_path, model=lm)
    scores = reward([pair.prompt for pair in PAIRS] * 2, [p.chosen for p in PAIRS] + [p.rejected for p in PAIRS])
    assert (scores[: len(PAIRS)] > scores[len(PAIRS) :]).mean() > 0.8
    with pytest.raises(ConfigurationError, match="trained on 'tiny-Llama'; it says nothing about 'tiny-GPT2'"):
        Preference(tmp_path, model=tiny_lm("GPT2"))
    with pytest.raises(ConfigurationError, match="at least 10 pairs, got 2"):
        train_preference(PAIRS[:2], tmp_path, model=lm)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a", "chosen": "b"}',
            "line 2: .*'rejected' .*missing",
        ),
        (
            '\n{"prompt": "a", "chosen": 1, "rejected": "c"}',
            "line 2: .*'chosen' is a string or .*, but it is 1",
        ),
        ("{", "line 1 is no JSON"),
        ("[]", "line 1 is no JSON object with prompt, chosen, rejected"),
        ("\n", "holds no pairs"),
    ],
)
def test_a_wrong_file_of_pairs_names_the_line(tmp_path, text, message):
    path = tmp_path / "pairs.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=message):
        read_pairs(path)


def test_a_file_of_pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps({**pair._asdict(), "by": "us"}) for pair in PAIRS))
    assert read_pairs(path) == PAIRS
    with pytest.raises(ConfigurationError, match="cannot be read"):
        read_pairs(tmp_path / "absent.jsonl")


def said(*texts):
    """Messages of a user and an assistant in turn, the last one the assistant's."""
    roles = ["assistant", "user"] * len(texts)
    return [{"role": role, "content": text} for role, text in zip(roles[: len(texts)][::-1], texts, strict=True)]


PARTS = [{"role": "assistant", "content": [{"type": "text", "text": "g"}, {"type": "text", "text": "ood"}]}]


@pytest.mark.parametrize(
    ("item", "pair"),
    [
        ({"prompt": said("hi", "")[:1], "chosen": said("good"), "rejected": said("bad")}, ("hi", "good", "bad")),
        ({"prompt": "hi", "chosen": said("hi", "good"), "rejected": said("hi", "bad")}, ("hi", "good", "bad")),
        ({"chosen": said("hi", "good"), "rejected": said("hi", "bad")}, ("hi", "good", "bad")),
        ({"chosen": said("a", "b", "c", "good"), "rejected": said("a", "b", "c", "bad")}, ("a\nb\nc", "good", "bad")),
        ({"chosen": said("a", "x", "y", "z"), "rejected": said("a", "bad")}, ("a", "x\ny\nz", "bad")),
        ({"prompt": "hi", "chosen": said("same", "good"), "rejected": said("same", "bad")}, ("hi", "good", "bad")),
        ({"prompt": "hi", "chosen": PARTS, "rejected": "bad"}, ("hi", "good", "bad")),
        (
            {
                "prompt": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}],
                "chosen": said("good"),
                "rejected": said("bad"),
            },
            ("be brief\nhi", "good", "bad"),
        ),
        ({"prompt": "hi", "chosen": "line\u2028break", "rejected": "bad"}, ("hi", "line\u2028break", "bad")),
    ],
)
def test_pairs_may_be_conversations(tmp_path, item, pair):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(item, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_pairs(path) == [Pair(*pair)]


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"chosen": said("hi", "good"), "rejected": said("hi", "good")}, "the same conversation"),
        ({"chosen": said("hi", "a", "b", "c"), "rejected": said("hi", "a")}, "one begins with the other"),
        ({"chosen": said("good"), "rejected": said("bad")}, "'prompt' .* is missing"),
        ({"prompt": "hi", "chosen": [], "rejected": said("bad")}, r"'chosen' .* but it is \[\]"),
        (
            {"prompt": "hi", "chosen": said("good"), "rejected": [{"content": "bad"}]},
            "message of the field 'rejected'",
        ),
        ({"prompt": ["hi"], "chosen": said("good"), "rejected": said("bad")}, "a message of the field 'prompt'"),
        ({"prompt": "hi", "chosen": said(3), "rejected": said("bad")}, "a message of the field 'chosen'"),
        ({"prompt": None, "chosen": "good", "rejected": "bad"}, "'prompt' .* but it is None"),
    ],
)
def test_wrong_conversations_are_named(tmp_path, item, message):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n" + json.dumps(item))
    with pytest.raises(ConfigurationError, match=f"line 2: .*{message}"):
        read_pairs(path)
