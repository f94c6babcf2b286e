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


def test_mutual_information_is_the_logprob_of_each_token_less_the_one_after_other_prompts(tiny_lm):
    lm = tiny_lm("Llama")

    def logprobs(prompt, completion):
        before, after = lm.encode(prompt), lm.encode(completion)
        _, found = lm.forward([before + after[:i] for i in range(len(after))])
        return np.array([row[token] for row, token in zip(found, after, strict=True)])

    def information(prompt, completion, limit):
        joint = np.mean([np.exp(logprobs(other, completion).cumsum()) for other in references], axis=0)
        conditional = joint / np.array([1.0, *joint[:-1]])
        return np.clip(logprobs(prompt, completion) - np.log(conditional), -limit, limit).mean()

    prompts, completions, references = ["w2 w3", "w9"], [" w4 w5 w6", " w7"], ["w1", "w8 w2"]
    for limit in (50.0, 0.1):
        reward = PointwiseMutualInformation(limit, references=references, model=lm)
        expected = [information(x, y, limit) for x, y in zip(prompts, completions, strict=True)]
        assert (reward.lower, reward.upper) == (-limit, limit)
        assert reward(prompts, completions) == pytest.approx(expected, abs=1e-4)
        assert reward(["w2"], [""])[0] == 0
    assert PointwiseMutualInformation(references=["w2 w3"], model=lm)(prompts[:1], completions[:1])[0] == 0


def test_phrases_that_suit_any_prompt_have_less_mutual_information_with_one(lm):
    prompt = "The ferry to the island"
    own, *others = PointwiseMutualInformation(model=lm)(
        [prompt] * 5,
        [
            " was on time, and the children loved watching the gulls from the deck.",
            " is a dream come true.",
            " I am so honored.",
            " I'll make sure to keep it clean.",
            " is a great example of how technology can be used to create something truly unique.",
        ],
    )
    assert own > 0.6
    assert max(others) < 0.4
