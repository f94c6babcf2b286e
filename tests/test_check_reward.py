"""`check_reward`: the registered rewards pass, and each way of being wrong is told apart."""

import itertools
import math

import numpy as np
import pytest

from qstar_decoding.errors import ConfigurationError, RewardCheckError
from qstar_decoding.rewards import Reward, as_reward, clip, make_reward, minimum, normalise, reward_names
from qstar_decoding.rewards.creativity import Distinct, Novelty, Repetition, self_bleu
from qstar_decoding.rewards.guidelines import ForbiddenWords, MatchesRegex, ShortSentences
from qstar_decoding.rewards.testing import check_reward


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", reward_names())
def test_every_registered_reward_keeps_the_laws(name):
    check_reward(name)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("spec", ["0.5 * sentiment - 0.25 * length", "keywords + complete_sentence - afinn"])
def test_sums_keep_them_too(spec):
    check_reward(spec)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "reward",
    [
        Novelty(["The dog caught a ball"]),
        Distinct(1),
        ForbiddenWords("dog", "hate"),
        MatchesRegex(r"\d+"),
        ShortSentences(3),
        0.5 * ForbiddenWords("ball") * as_reward("length"),
        minimum(as_reward("sentiment"), as_reward("pangram")) - clip(as_reward("afinn"), 0, 0.5),
    ],
    ids=lambda reward: reward.name,
)
def test_so_do_those_with_arguments_and_compositions(reward):
    check_reward(reward)


def test_what_the_rewards_of_texts_say():
    def score(reward, *texts):
        return reward([""] * len(texts), list(texts)).tolist()

    assert score(Distinct(2), "a b a b", "a b c", "a", "") == [pytest.approx(2 / 3), 1.0, 0.0, 0.0]
    assert score(Repetition(2), "a b a b", "a b c", "") == [pytest.approx(1 / 3), 0.0, 0.0]
    assert score(Novelty(["the cat sat"], 2), "the cat ran", "the cat sat", "dogs") == [0.5, 0.0, 0.0]
    assert score(ForbiddenWords("cat"), "A CAT.", "a catalogue", "") == [0.0, 1.0, 1.0]
    assert score(MatchesRegex(r"\d+ (cats|dogs)"), " 3 cats ", "three cats") == [1.0, 0.0]
    assert score(ShortSentences(2), "One two. One two three! Yes", "") == [pytest.approx(2 / 3), 1.0]
    forbidden = ForbiddenWords("cat")
    assert forbidden.upper_bound([""] * 3, ["cat", "cat.", "a"], [5] * 3).tolist() == [1.0, 0.0, 1.0]
    assert self_bleu(["a b c d", "a b c d"]) == 1.0
    assert self_bleu(["a b c d", "e f g h"]) == self_bleu(["alone"]) == 0.0
    assert 0 < self_bleu(["a b c d e", "a b c x y"]) < 1


def test_engagement_is_the_mean_of_its_parts():
    reward = make_reward("engagement")
    text = " Do you love your dog? It is a good dog."
    parts = reward.components([""], [text])
    assert set(parts) == {"readability", "address", "distinct", "intensity"}
    assert reward([""], [text])[0] == pytest.approx(np.mean([values[0] for values in parts.values()]))
    assert parts["address"][0] == 1.0
    dull = " Notwithstanding jurisprudential considerations, institutional heterogeneity predominates."
    assert reward([""], [dull])[0] < reward([""], [text])[0]
    ease = make_reward("readability")
    # 12 words, 2 sentences; 14 syllables by hand: cat, warm, … one each, "very" and "sunny" two.
    easy = "The cat sat on a mat. It was a very sunny day."
    assert ease([""], [easy])[0] == pytest.approx(min((206.835 - 1.015 * 6 - 84.6 * 14 / 12) / 100, 1.0))


def test_relevance_knows_what_a_text_is_about():
    for name in ("relevance", "keyword_overlap"):
        reward = make_reward(name)
        prompt = "Tell me about the sea and its ships."
        near, far = reward([prompt] * 2, [" Ships sail on the sea.", " My taxes are due in April."])
        assert near > far + 0.2
    assert make_reward("relevance")(["The sea"], [""])[0] == 0
    with pytest.raises(ConfigurationError, match="no embedding model can be loaded from"):
        make_reward("relevance", model="/nowhere/at/all")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Novelty("one text"), "several texts"),
        (lambda: Distinct(0), "n is"),
        (lambda: ForbiddenWords(), "words of letters"),
        (lambda: ForbiddenWords("two words"), "words of letters"),
        (lambda: MatchesRegex("(a"), "is no regular expression"),
        (lambda: ShortSentences(0), "most"),
        (lambda: clip(as_reward("sentiment"), 1, 0), "low < high"),
        (lambda: normalise(as_reward(lambda p, c: 0.0)), "say what is to become 0 and 1"),
        (lambda: minimum(), "minimum needs rewards"),
        (lambda: minimum(as_reward("sentiment"), 3), "minimum needs rewards"),
    ],
)
def test_arguments_that_make_no_reward(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()


class Wrong(Reward):
    """A fair reward, to be spoilt."""

    name, lower, upper = "wrong", 0.0, 1.0

    def score(self, prompts, completions, completion_ids=None, **columns):
        return [min(len(text) / 100, 1.0) for text in completions]


class Counting(Wrong):
    def __init__(self):
        super().__init__()
        self.calls = itertools.count()

    def score(self, prompts, completions, completion_ids=None, **columns):
        return [(next(self.calls) % 11) / 11 for _ in completions]


class Relative(Wrong):
    def score(self, prompts, completions, completion_ids=None, **columns):
        longest = max(len(text) for text in completions) or 1
        return [len(text) / longest for text in completions]


class Ranked(Wrong):
    def score(self, prompts, completions, completion_ids=None, **columns):
        return [i / len(completions) for i, _ in enumerate(completions)]


class Altering(Wrong):
    def score(self, prompts, completions, completion_ids=None, **columns):
        completions.sort()
        return super().score(prompts, completions)


class Hasty(Wrong):
    """Its bound forgets that there is more to come."""

    def bound_prefixes(self, prompts, completions, remaining, completion_ids=None, **columns):
        return self.score(prompts, completions)


class Unbounded(Wrong):
    def bound_prefixes(self, prompts, completions, remaining, completion_ids=None, **columns):
        return [math.nan] * len(completions)


class Wild(Wrong):
    """Its potential is infinite where nothing is written."""

    def score_prefixes(self, prompts, completions, completion_ids=None, **columns):
        return [1.0 if text else math.inf for text in completions]


class OnlyBatches(Wrong):
    def score(self, prompts, completions, completion_ids=None, **columns):
        if len(completions) > 20:
            raise MemoryError("too many")
        return super().score(prompts, completions)


class Unlimited(Wrong):
    """Right, but for nobody who wants a certificate."""

    upper = math.inf


def spoilt(function):
    """A batched function as a reward in [0, 1]."""
    return as_reward(function, lower=0.0, upper=1.0)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (Counting(), "another value the second time: .* depend on its arguments alone"),
        (Relative(), "alone than in a batch: .* do not normalise over the batch"),
        (Ranked(), "depends on the order of the batch: .* in the order of the completions"),
        (Altering(), "changed its argument 'completions'; work on a copy"),
        (Hasty(), "scores at most .*, but .* scores .*; bound_prefixes must never be below"),
        (Unbounded(), "is nan for the unfinished text .*; correct bound_prefixes"),
        (Wild(), "returned inf as the potential of ''; return a finite number"),
        (OnlyBatches(), "raised MemoryError for 42 texts at once, for none alone: too many; let it score any batch"),
        (spoilt(lambda completions: [len(c) / 100 for c in completions]), r"outside its bounds \[0, 1\]; widen lower"),
        (spoilt(lambda completions: [math.nan for _ in completions]), "returned nan .*; return a finite number"),
        (spoilt(lambda completions: ["good" for _ in completions]), "returned 'good' .*; return a number, or None"),
        (spoilt(lambda completions: 0.5), "returned a float as score; return a list of 42 values"),
        (spoilt(lambda completions: [0.5]), "returned 1 values for 42 completions; return one per completion"),
        (
            spoilt(lambda prompt, completion: 1 / len(completion.split())),
            "raised ZeroDivisionError for the completion '': .*; return None for a text that cannot be scored",
        ),
        (
            spoilt(lambda prompt, completion: float(len(completion.encode()) > 3)),
            r"raised UnicodeEncodeError for the completion ' broken \\ud83d",
        ),
    ],
    ids=lambda value: value.name if isinstance(value, Reward) else "",
)
def test_each_way_of_being_wrong_is_told(reward, message):
    with pytest.raises(RewardCheckError, match=message):
        check_reward(reward)


def test_what_is_merely_unwise_is_a_warning():
    with pytest.warns(UserWarning, match="has no upper bound"):
        check_reward(-1.0 * as_reward("length") + Unlimited())
    with pytest.warns(UserWarning, match="cannot be pickled"):
        check_reward(as_reward(lambda prompt, completion: 0.0, lower=0, upper=1))


def test_columns_and_texts_of_ones_own_are_tried_as_well():
    def score(completions, target):
        return [float(c == t) for c, t in zip(completions, target, strict=True)]

    with pytest.raises(ConfigurationError, match="needs 'target'"):
        check_reward(as_reward(score, lower=0, upper=1))
    with pytest.warns(UserWarning, match="pickled"):
        check_reward(as_reward(score, lower=0, upper=1), columns={"target": "x"})
    with pytest.raises(RewardCheckError, match="raised KeyError for the completion 'q'"):
        check_reward(spoilt(lambda prompt, completion: {"q": {}}.get(completion, {"z": 0.0})["z"]), completions=["q"])
