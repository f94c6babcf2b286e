"""Engagement, its parts, and profanity."""

from __future__ import annotations

import numpy as np
import pytest

from qstar_decoding.rewards import make_reward


def test_engagement_is_the_mean_of_its_calibrated_parts():
    reward = make_reward("engagement")
    text = " Do you love your dog? It is a good dog."
    parts = reward.components([""], [text])
    usual = {"readability": (0.5, 1), "concreteness": (0.3, 0.43), "address": (0, 1), "distinct": (0.75, 0.95)}
    usual["intensity"] = 0, 0.83
    assert set(parts) == set(usual)
    calibrated = [np.clip((parts[name][0] - low) / (high - low), 0, 1) for name, (low, high) in usual.items()]
    assert reward([""], [text])[0] == pytest.approx(np.mean(calibrated))
    assert parts["address"][0] == 1.0
    dull = " Notwithstanding jurisprudential considerations, institutional heterogeneity predominates."
    assert reward([""], [dull])[0] < reward([""], [text])[0]
    ease = make_reward("readability")
    # 12 words, 2 sentences; 14 syllables by hand: cat, warm, … one each, "very" and "sunny" two.
    easy = "The cat sat on a mat. It was a very sunny day."
    assert ease([""], [easy])[0] == pytest.approx(min((206.835 - 1.015 * 6 - 84.6 * 14 / 12) / 100, 1.0))


def test_things_are_more_concrete_than_ideas():
    reward = make_reward("concreteness")
    things, ideas, none = reward([""] * 3, [" Two dogs eat apples.", " Her belief justifies hope.", " Zzyzx!"])
    assert things > 0.7 > 0.3 > ideas
    assert none == 0
    # A published rating, and an inflected form that has none of its own: apple 5.00, banana 5.00.
    assert reward([""] * 2, ["apple", "bananas"]).tolist() == [1, 1]


def test_profanity_knows_rude_words():
    rude, polite = make_reward("profanity")([""] * 2, ["you stupid asshole", "what a nice day"])
    assert rude > 0.9
    assert polite < 0.2
