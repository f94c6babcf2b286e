"""A language model of one's own: the recipe of the FAQ, the laws that it must keep, and how each breach is named."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qstar_decoding import envs, models
from qstar_decoding.agents import AStarPlanner
from qstar_decoding.envs import DecodingMDP, Prompt, TabularLM, TokenDecodingEnv
from qstar_decoding.errors import LanguageModelError
from qstar_decoding.models import LanguageModel, PrefixEngine, check_language_model

from .tokenizers_of_kinds import byte_level, language_model, sentencepiece, word_level

pytestmark = pytest.mark.filterwarnings("ignore:language model .* cannot be pickled:UserWarning")

FAQ = Path(__file__).parents[2] / "docs" / "faq.md"

RECIPE = next(
    code for code in re.findall(r"```python\n(.*?)```", FAQ.read_text("utf-8"), re.DOTALL) if "Counting" in code
)


def own() -> Any:
    names: dict[str, Any] = {}
    exec(RECIPE, names)
    return names


def test_the_recipe_works_as_written() -> None:
    names = own()
    plan = AStarPlanner(DecodingMDP(names["Counting"](), reward=lambda p, c: 0.0, top_k=4, max_new_tokens=5)).plan("12")
    assert plan.text == "34567"
    env = TokenDecodingEnv(names["Counting"](), prompts=["12"], reward="length", top_k=4, max_new_tokens=5)
    observation, _ = env.reset(seed=0)
    assert env.observation_space.contains(observation)


@pytest.mark.parametrize(
    "make",
    [
        lambda: TabularLM.random(5, 2, seed=0),
        lambda: TabularLM([[0, 1, 3], [1, 0, 0], [1, 1, 1]]),
        lambda: TabularLM([0.5, 0.5], vocabulary=["a", "b"], eos_token_ids=[], context_length=2),
        lambda: models.load_language_model("toy"),
        lambda: language_model(byte_level()),
        lambda: language_model(byte_level("<|begin|> $A <|end|>"), vocab_size=400),
        lambda: language_model(sentencepiece()),
        lambda: language_model(word_level()),
    ],
)
def test_the_projects_own_models_keep_the_laws(make: Callable[[], LanguageModel]) -> None:
    check_language_model(make())
    assert envs.check_language_model is models.check_language_model


def test_the_architectures_keep_the_laws(tiny_lm: Callable[[str], LanguageModel]) -> None:
    for architecture in ("Llama", "Mistral", "GPT2", "Mamba"):
        check_language_model(tiny_lm(architecture), prompts=["w5 w6"])


# ----------------------------------------------------------------------------------------------------- broken models


def counting(**changes: Any) -> LanguageModel:
    """Return the recipe's model with other methods or attributes."""
    base = own()["Counting"]
    methods = {name: change for name, change in changes.items() if callable(change)}
    model: LanguageModel = type("Broken", (base,), methods)()
    for name, value in changes.items():
        if not callable(value):
            setattr(model, name, value)
    return model


def outputs(change: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Return a ``forward`` that changes the recipe's hidden states and log-probabilities."""

    def forward(self: Any, sequences: Any) -> Any:
        return change(*super(type(self), self).forward(sequences))

    return forward


def with_nan(hidden: Any, logprobs: Any) -> Any:
    logprobs = logprobs.copy()
    logprobs[-1, 3] = math.nan
    return hidden, logprobs


# Those that the first forward shows, whatever it is asked for.
SHOWN: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "logits": (lambda h, p: (h, 3 * np.roll(h, 1, axis=1)), "sum to .*, not to 1; return natural log-probabilities"),
    "base 2": (lambda h, p: (h, p / np.log(2)), "sum to 0.*, not to 1"),
    "probabilities": (lambda h, p: (h, np.exp(p)), "sum to .*, not to 1"),
    "positive": (lambda h, p: (h, -p), "not to 1"),
    "not normalised": (lambda h, p: (h, p - 0.1), "sum to 0.9048, not to 1"),
    "infinite": (lambda h, p: (h, p * -np.inf), "not to 1"),
    "too narrow": (lambda h, p: (h, p[:, :-1]), r"of shape \(\d+, 10\), expected \(\d+, 11\)"),
    "too wide": (lambda h, p: (h, np.pad(p, ((0, 0), (0, 1)), constant_values=-99)), r"of shape \(\d+, 12\)"),
    "one row": (lambda h, p: (h, p[0]), r"of shape \(11,\), expected"),
    "all positions": (lambda h, p: (h, p[:, None]), r"of shape \(\d+, 1, 11\)"),
    "states too narrow": (lambda h, p: (h[:, :4], p), r"hidden states \[n, hidden_size\] of shape \(\d+, 4\)"),
    "nan": (with_nan, r"NaN among the log-probabilities"),
    "nan states": (lambda h, p: (h * math.nan, p), r"NaN among the hidden states"),
    "only one": (lambda h, p: p, "a tuple of hidden states and log-probabilities, got ndarray"),
}


@pytest.mark.parametrize(("change", "message"), SHOWN.values(), ids=SHOWN)
def test_the_first_forward_shows_what_is_no_language_model(change: Any, message: str) -> None:
    model = counting(forward=outputs(change))
    with pytest.raises(LanguageModelError, match=f"language model 'counting': .*{message}"):
        check_language_model(model, prompts=["12"])
    with pytest.raises(LanguageModelError, match=f"language model 'counting': .*{message}"):
        AStarPlanner(DecodingMDP(model, reward="length", top_k=4, max_new_tokens=4)).plan("12", 10)


class Noisy:
    """A forward that returns something else each time."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, hidden: Any, logprobs: Any) -> Any:
        self.calls += 1
        return hidden, np.roll(logprobs, self.calls, axis=1)


def one_for_all(hidden: Any, logprobs: Any) -> Any:
    return hidden, np.broadcast_to(logprobs[:1], logprobs.shape)


def greedy_for_paddings(self: Any, sequences: Any) -> Any:
    """Look at the last token of the longest sequence, as a batch padded on the wrong side does."""
    longest = max(map(len, sequences))
    padded = [[*s, *[0] * (longest - len(s))] for s in sequences]
    return super(type(self), self).forward(padded)


def emptied(self: Any, sequences: Any) -> Any:
    result = super(type(self), self).forward(sequences)
    for sequence in sequences:
        sequence.clear()
    return result


LAWS: dict[str, tuple[dict[str, Any], str]] = {
    "no name": ({"name": None}, "name is a non-empty string, got None; set it in __init__"),
    "no size": ({"vocab_size": 0}, "vocab_size is a positive integer, got 0"),
    "float size": ({"hidden_size": 11.0}, "hidden_size is a positive integer, got 11.0"),
    "no context": ({"context_length": None}, "context_length is a positive integer"),
    "ends are a list": ({"eos_token_ids": [10]}, r"eos_token_ids is a set of token ids, maybe empty, got \[10\]"),
    "end 9999": ({"eos_token_ids": frozenset([10, 9999])}, r"from 0 to vocab_size - 1 = 10, got \[9999\]"),
    "end -1": ({"eos_token_ids": frozenset([-1])}, r"from 0 to vocab_size - 1 = 10, got \[-1\]"),
    "end of text": ({"eos_token_ids": frozenset(["10"])}, r"from 0 to vocab_size - 1 = 10, got \['10'\]"),
    "random": (
        {"forward": outputs(Noisy())},
        "forward of the same sequences, again, returned log-probabilities that differ by",
    ),
    "batches": ({"forward": outputs(one_for_all)}, "forward of the same sequences, in another order"),
    "padding": (
        {"forward": greedy_for_paddings},
        "forward of the same sequences, the shortest one alone, returned hidden states that differ by",
    ),
    "arguments": ({"forward": emptied}, "forward changed the sequences that it was given"),
    "decode bytes": ({"decode": lambda self, ids: b"1"}, "decode.* returns a string, got b'1'"),
    "decode backwards": ({"decode": lambda self, ids: "".join(map(str, ids))[::-1]}, "does not begin the text"),
    "encode refuses wrongly": (
        {"encode": lambda self, p: [int("x")]},
        r"encode\('12'\) raised ValueError .*PromptError",
    ),
    "encode an array": ({"encode": lambda self, p: np.array([1, 2])}, r"encode\('12'\) returns a list of token ids"),
    "encode too large": ({"encode": lambda self, p: [11]}, r"encode\('12'\) returns a list of token ids below"),
    "encode nothing": ({"encode": lambda self, p: []}, r"encode\('12'\) returns a list of token ids"),
    "encode an end": ({"encode": lambda self, p: [1, 2, 10]}, "ends with the end-of-sequence token 10"),
    "embeddings": ({"token_embeddings": lambda self: np.zeros((3, 2))}, r"token_embeddings .* got shape \(3, 2\)"),
}


@pytest.mark.parametrize(("changes", "message"), LAWS.values(), ids=LAWS)
def test_a_broken_law_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(LanguageModelError, match=message) as caught:
        check_language_model(counting(**changes), prompts=["12"])
    assert "\n" not in str(caught.value)


def test_a_wrong_engine_is_named() -> None:
    class Off(PrefixEngine):
        def compute(self, *arguments: Any, **options: Any) -> Any:
            handles, (hidden, tokens, logprobs) = super().compute(*arguments, **options)
            return handles, models.Outputs(hidden, tokens, logprobs + 0.01 * (len(arguments[0]) == 0))

    with pytest.raises(
        LanguageModelError, match=r"its engine's log-probabilities differ from those of forward by 0\.01"
    ):
        check_language_model(counting(new_engine=lambda self, kv_budget=None: Off(self)), prompts=["12"])


def test_lists_and_doubles_are_taken_as_they_are() -> None:
    def forward(self: Any, sequences: Sequence[Sequence[int]]) -> Any:
        hidden, logprobs = super(type(self), self).forward(sequences)
        return hidden.tolist(), logprobs.astype(np.float64)

    model = counting(forward=forward)
    check_language_model(model, prompts=["12"])
    mdp = DecodingMDP(model, reward="length", top_k=4, max_new_tokens=4)
    mdp.roots([Prompt("12")])
    assert mdp.tree.logprobs.dtype == np.float32


def test_a_model_that_turns_nan_later_is_not_believed(tiny_lm: Any, new_tiny_lm: Any) -> None:
    import torch

    lm = new_tiny_lm("Llama")
    mdp = DecodingMDP(lm, reward="length", top_k=4, max_new_tokens=6)
    nodes = mdp.roots([Prompt("w5 w6")])
    with torch.no_grad():
        lm.model.model.norm.weight.mul_(math.nan)
    with pytest.raises(LanguageModelError, match="computed NaN after a prefix"):
        mdp.tree.expand(nodes, np.array([0]))
    assert len(mdp.tree) == 1
