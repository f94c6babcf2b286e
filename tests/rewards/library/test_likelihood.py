"""Coherence and mutual information."""

from __future__ import annotations

import numpy as np
import pytest

from qstar_decoding.rewards.library.likelihood import Coherence, PointwiseMutualInformation


def test_coherence_is_the_mean_logprob_of_the_completions_tokens(tiny_lm):
    lm = tiny_lm("Llama")
    prompts, completions = ["w2 w3", "w9"], [" w4 w5 w6", " w7"]
    expected = []
    for prompt, completion in zip(prompts, completions, strict=True):
        before, after = lm.encode(prompt), lm.encode(completion)
        _, logprobs = lm.forward([before + after[:i] for i in range(len(after))])
        expected.append(np.mean([row[token] for row, token in zip(logprobs, after, strict=True)]))
    reward = Coherence(lm, floor=-50.0)
    assert reward(prompts, completions) == pytest.approx(expected, abs=1e-4)
    assert reward(["w2"], [""])[0] == -50.0
    assert Coherence(lm, floor=-0.5)(prompts, completions).tolist() == [-0.5, -0.5]


def test_mutual_information_is_the_logprob_less_the_one_after_other_prompts(tiny_lm):
    lm = tiny_lm("Llama")

    def logprob(prompt, completion):
        before, after = lm.encode(prompt), lm.encode(completion)
        _, logprobs = lm.forward([before + after[:i] for i in range(len(after))])
        return sum(row[token] for row, token in zip(logprobs, after, strict=True))

    prompts, completions, references = ["w2 w3", "w9"], [" w4 w5 w6", " w7"], ["w1", "w8 w2"]
    expected = [
        (logprob(x, y) - np.log(np.mean([np.exp(logprob(other, y)) for other in references]))) / len(lm.encode(y))
        for x, y in zip(prompts, completions, strict=True)
    ]
    reward = PointwiseMutualInformation(50.0, references=references, model=lm)
    assert (reward.lower, reward.upper) == (-50, 50)
    assert reward(prompts, completions) == pytest.approx(expected, abs=1e-4)
    assert reward(["w2"], [""])[0] == 0
    assert PointwiseMutualInformation(references=["w2 w3"], model=lm)(prompts[:1], completions[:1])[0] == 0
    limited = PointwiseMutualInformation(0.1, references=references, model=lm)
    assert limited(prompts, completions) == pytest.approx(np.clip(expected, -0.1, 0.1), abs=1e-4)


def test_a_phrase_that_suits_any_prompt_has_no_mutual_information_with_one(lm):
    prompt = "The ferry to the island"
    own, *others = PointwiseMutualInformation(model=lm)(
        [prompt] * 4,
        [
            " was on time, and the children loved watching the gulls from the deck.",
            " is a dream come true.",
            " I am so honored.",
            " I'll make sure to keep it clean.",
        ],
    )
    assert own > 0.8
    assert max(others) < 0.4
