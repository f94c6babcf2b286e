"""Rewards by name."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest

from qstar_decoding.errors import ConfigurationError, UnknownNameError
from qstar_decoding.rewards import (
    FunctionReward,
    Reward,
    as_reward,
    make_reward,
    register_reward,
    registry,
    reward_names,
)
from qstar_decoding.rewards.library.creativity import Distinct
from qstar_decoding.rewards.library.likelihood import Coherence

from .samples import Recorder, half_length


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    ("ask", "hint"),
    [
        (lambda: make_reward("sentimnt"), "register_reward"),
        (lambda: as_reward("sentimnt"), "column 1 of 'sentimnt'"),
        (lambda: as_reward("0.5*one + sentimnt"), r"column 11 of '0.5\*one \+ sentimnt'"),
        (lambda: as_reward({"sentimnt": 1.0}), "register_reward"),
        (lambda: as_reward("one + sentimnt(3)"), "column 7 of"),
    ],
)
def test_an_unknown_name_gets_the_nearest_first(ask: Callable[[], Reward], hint: str) -> None:
    with pytest.raises(UnknownNameError, match=f"unknown reward 'sentimnt'.*{hint}") as caught:
        ask()
    assert caught.value.kind == "reward"
    assert caught.value.known[0] == "sentiment"
    assert (
        set(caught.value.known) == set(reward_names()) == {"one", "ten", *registry._factories, *registry.WITH_ARGUMENTS}
    )


@pytest.mark.usefixtures("registered")
def test_registering_classes_and_factories() -> None:
    assert register_reward("class_of_rewards")(Recorder) is Recorder
    assert isinstance(make_reward("class_of_rewards", on_error="skip"), Recorder)
    assert make_reward("class_of_rewards", on_error="skip").on_error == "skip"
    assert "class_of_rewards" in reward_names()
    assert reward_names() == sorted(reward_names())
    assert make_reward("one") is not make_reward("one")


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("name", ["one", "sentiment"])
def test_a_name_is_given_once(name: str) -> None:
    with pytest.raises(ConfigurationError, match=f"there is a reward named '{name}' already"):
        register_reward(name)


@pytest.mark.parametrize("name", ["my reward", "my-reward", "", "2", "lambda"])
def test_names_are_identifiers(name: str) -> None:
    with pytest.raises(ConfigurationError, match="expected an identifier"):
        register_reward(name)


@pytest.mark.usefixtures("registered")
def test_what_is_registered_must_make_rewards() -> None:
    with pytest.raises(ConfigurationError, match=r"write register_reward\('mine'\)\(lambda: as_reward\(f\)\)"):
        register_reward("mine")(half_length)  # type: ignore[type-var]
    assert "mine" not in reward_names()
    register_reward("mine")(lambda: 1.0)  # type: ignore[type-var]
    with pytest.raises(ConfigurationError, match=r"returned 1\.0; expected a Reward"):
        make_reward("mine")


def test_importing_the_rewards_imports_none_of_their_libraries() -> None:
    code = (
        "import sys, qstar_decoding.rewards as r; assert 'sentiment' in r.reward_names();"
        "heavy = {'torch', 'transformers', 'stable_baselines3', 'vaderSentiment'} & set(sys.modules);"
        "assert not heavy, heavy; r.make_reward('sentiment'); assert 'vaderSentiment' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_reward("distinct", on_eror="skip"), "'distinct' takes no argument 'on_eror'; .*'on_error'"),
        (
            lambda: make_reward("sentiment", pnalty=1.0),
            "'sentiment' takes no argument 'pnalty'; did you mean 'penalty'",
        ),
        (lambda: make_reward("address", lowr=1.0), "'address' takes no argument 'lowr'; did you mean 'lower'"),
        (lambda: make_reward("engagement", on_error="skip"), "takes no argument 'on_error'; It takes none"),
        (lambda: as_reward("length(mots=3)"), "'length' takes no argument 'mots'; did you mean 'most'"),
        (lambda: Distinct(nn=3), "Distinct takes no argument 'nn'; did you mean 'n'"),
        (lambda: Coherence(flor=-1.0), "Coherence takes no argument 'flor'; did you mean 'floor'"),
        (lambda: as_reward(half_length, uper=1.0), "takes no argument 'uper'; did you mean 'upper'"),
        (
            lambda: FunctionReward(half_length, lover=1.0),
            "FunctionReward takes no argument 'lover'; did you mean 'lower'",
        ),
    ],
)
def test_a_misspelt_argument_gets_the_nearest_one(make: Callable[[], Reward], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make()


@pytest.mark.parametrize("name", ["distinct", "sentiment", "address", "numeric_answer", "all_keywords", "relevance"])
def test_every_reward_of_the_library_takes_the_options_of_all(name: str) -> None:
    reward = make_reward(name, name="mine", on_error="penalty", penalty=0.5)
    assert (reward.name, reward.on_error, reward.penalty) == ("mine", "penalty", 0.5)


@pytest.mark.usefixtures("registered")
def test_a_reward_of_ones_own_may_take_any_arguments() -> None:
    class Named(Recorder):
        def __init__(self, **weights: float) -> None:
            super().__init__()
            self.weights = weights

    register_reward("named")(Named)
    reward = make_reward("named", dog=2.0, cat=1.0)
    assert isinstance(reward, Named)
    assert reward.weights == {"dog": 2.0, "cat": 1.0}
