"""Laws, arguments and values of the ready-made rewards."""

from __future__ import annotations

import pytest

from qstar_decoding.errors import ConfigurationError
from qstar_decoding.rewards import as_reward, clip, make_reward, minimum, normalise, registry, reward_names
from qstar_decoding.rewards.library.creativity import Distinct, Novelty, Repetition, self_bleu
from qstar_decoding.rewards.library.guidelines import ForbiddenWords, MatchesJSON, MatchesRegex, ShortSentences
from qstar_decoding.rewards.library.language import Preference, train_preference
from qstar_decoding.rewards.library.likelihood import Coherence, PointwiseMutualInformation
from qstar_decoding.rewards.testing import check_reward

from ..samples import PAIRS, gym_entries

ASK_A_MODEL = {"coherence", "pointwise_mutual_information"}  # tried on a tiny one


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", sorted({*reward_names()} - {*registry.WITH_ARGUMENTS, *ASK_A_MODEL}))
def test_every_registered_reward_keeps_the_laws(name):
    entry = next(iter(gym_entries().values()))
    check_reward(
        name, completions=[" " + entry["answer"]], columns={"entry": entry, "numbers": [3, 7, 25], "target": 4}
    )


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "spec",
    [
        "forbidden_words('dog', 'hate')",
        "matches_json({'type': 'object', 'required': ['a']})",
        "matches_regex('[0-9]+')",
        "novelty(['The dog caught a ball'], n=2)",
    ],
)
def test_so_does_every_reward_with_arguments(spec):
    check_reward(spec, completions=['{"a": 1}'])


def test_so_do_those_that_ask_a_language_model(tiny_lm, tmp_path):
    lm = tiny_lm("Llama")
    train_preference(PAIRS, tmp_path, model=lm)
    for reward in (Coherence(lm), PointwiseMutualInformation(model=lm), Preference(tmp_path, model=lm)):
        check_reward(reward, completions=[" w3 w4", " w5 w6 w7"])


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


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Novelty("one text"), "several texts"),
        (lambda: Distinct(0), "n is"),
        (lambda: ForbiddenWords(), "words of letters"),
        (lambda: ForbiddenWords("two words"), "words of letters"),
        (lambda: MatchesRegex("(a"), "is no regular expression"),
        (lambda: MatchesJSON({"type": "objekt"}), "no JSON Schema"),
        (lambda: MatchesJSON("{"), "no JSON Schema"),
        (lambda: Coherence(floor=1.0), "floor is a finite number"),
        (lambda: Coherence(model=3), "a causal language model of transformers"),
        (lambda: Preference("/nowhere"), "no trained preference .* qstar train-reward"),
        (
            lambda: make_reward("novelty"),
            r"missing a required argument: 'references'; it is made as novelty\(references",
        ),
        (lambda: as_reward("classifier"), r"it is made as classifier\(model"),
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
