"""Pickles of language models: by name where nothing was changed since loading, else with all that was changed."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import decoders, normalizers

from qstar_decoding.agents import GreedyDecoder
from qstar_decoding.envs import DecodingMDP, Prompt, TokenTree, TransformersLM, load_language_model
from qstar_decoding.models import transformers_lm

from .tokenizers_of_kinds import byte_level, language_model

CHAT = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
SEQUENCES = [[5, 6, 7], [9], [4, 4, 8, 100]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A saved model; nothing is loaded yet."""
    monkeypatch.setattr(transformers_lm, "_LOADED", {})
    lm = language_model(byte_level())
    lm.model.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.fixture
def loaded(folder: str) -> TransformersLM:
    lm = load_language_model(folder, device="cpu", dtype="float32")
    assert isinstance(lm, TransformersLM)
    return lm


class Scaled(torch.nn.Module):
    """A layer put around another one, as adapters are."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner, self.scale = inner, torch.nn.Parameter(torch.tensor(1.7))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.inner(states) * self.scale  # type: ignore[no-any-return]


def attention(lm: TransformersLM) -> Any:
    return lm.model.model.layers[0].self_attn


def merge_adapter(lm: TransformersLM) -> None:
    with torch.no_grad():
        attention(lm).v_proj.weight.add_(0.5 * torch.randn_like(attention(lm).v_proj.weight))


def replace_data(lm: TransformersLM) -> None:
    attention(lm).q_proj.weight.data = attention(lm).q_proj.weight.data * 2


def replace_parameter(lm: TransformersLM) -> None:
    attention(lm).k_proj.weight = torch.nn.Parameter(attention(lm).k_proj.weight * 2)


def wrap_a_layer(lm: TransformersLM) -> None:
    attention(lm).o_proj = Scaled(attention(lm).o_proj)


def load_other_weights(lm: TransformersLM) -> None:
    lm.model.load_state_dict({name: weight * 0.9 for name, weight in lm.model.state_dict().items()})


WEIGHTS = [merge_adapter, replace_data, replace_parameter, wrap_a_layer, load_other_weights]


def edit_template(lm: TransformersLM) -> None:
    lm.tokenizer.chat_template = CHAT


def add_a_token(lm: TransformersLM) -> None:
    lm.tokenizer.add_tokens(["<cat>"])


def change_decoder(lm: TransformersLM) -> None:
    backend: Any = lm.tokenizer.backend_tokenizer
    backend.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("cat", "dog")])


def change_normalizer(lm: TransformersLM) -> None:
    lm.tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()


def change_special_token(lm: TransformersLM) -> None:
    lm.tokenizer.eos_token = "<|im_end|>"


TOKENIZERS = [edit_template, add_a_token, change_decoder, change_normalizer, change_special_token]


def again(lm: TransformersLM) -> TransformersLM:
    return pickle.loads(pickle.dumps(lm))  # type: ignore[no-any-return]


def texts(lm: TransformersLM) -> list[Any]:
    chat = lm.encode([{"role": "user", "content": "the cat"}]) if lm.tokenizer.chat_template else None
    ids = lm.encode("the <cat> sat ON")
    return [chat, ids, lm.decode(ids), lm.special_tokens, lm.tokenizer.eos_token]


def assert_same(one: TransformersLM, other: TransformersLM) -> None:
    for ours, theirs in zip(one.forward(SEQUENCES), other.forward(SEQUENCES), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert texts(one) == texts(other)
    for name in ("name", "vocab_size", "hidden_size", "hidden_layers", "context_length", "eos_token_ids"):
        assert getattr(one, name) == getattr(other, name), name
    assert type(one) is type(other)


@pytest.mark.parametrize("change", [*WEIGHTS, *TOKENIZERS], ids=lambda change: change.__name__)
def test_what_was_changed_in_memory_survives(loaded: TransformersLM, change: Callable[[TransformersLM], None]) -> None:
    before = [*loaded.forward(SEQUENCES), *texts(loaded)]
    change(loaded)
    there = again(loaded)
    assert there is not loaded
    assert_same(loaded, there)
    after = [*there.forward(SEQUENCES), *texts(there)]
    assert not all(np.array_equal(a, b) for a, b in zip(before[:2], after[:2], strict=True)) or before[2:] != after[2:]
    # What is pickled a second time is the same again.
    assert_same(loaded, again(there))


def test_attributes_that_were_changed_survive(loaded: TransformersLM) -> None:
    loaded.eos_token_ids = frozenset([3, 7])
    loaded.context_length = 99
    there = again(loaded)
    assert (there.eos_token_ids, there.context_length) == ({3, 7}, 99)
    assert_same(loaded, there)


@pytest.mark.parametrize("hidden_layers", [(), (0,), (0, 1)])
@pytest.mark.parametrize("prepack", [False, "auto"])
def test_a_model_given_as_an_object_is_pickled_by_value(
    folder: str, hidden_layers: tuple[int, ...], prepack: Any
) -> None:
    plain = language_model(byte_level(), name=folder)  # as though it had been loaded from there
    lm = TransformersLM(plain.model, plain.tokenizer, hidden_layers=hidden_layers, prepack=prepack, name=folder)
    merge_adapter(lm)
    there = again(lm)
    assert_same(lm, there)
    assert (there.packed_weights is None) == (not prepack)
    there.engine()
    plans = [GreedyDecoder(DecodingMDP(one, reward="length", max_new_tokens=4)).plan("the cat") for one in (lm, there)]
    assert plans[0].token_ids == plans[1].token_ids


def test_an_unchanged_model_is_pickled_by_name_whatever_it_was_used_for(folder: str, loaded: TransformersLM) -> None:
    tapping = load_language_model(folder, device="cpu", dtype="float32", hidden_layers=[1])
    for lm in (loaded, tapping):
        assert isinstance(lm, TransformersLM)
        mdp = DecodingMDP(lm, reward="length", max_new_tokens=4)
        GreedyDecoder(mdp).plan("the cat")
        lm.tokenizer(["the cat", "the"], truncation=True, max_length=2)
        lm.tokenizer(["the cat", "the"])
        data = pickle.dumps(lm)
        assert len(data) < 1000
        assert pickle.loads(data) is lm


def test_a_worker_process_computes_with_the_changed_weights(loaded: TransformersLM, tmp_path: Path) -> None:
    merge_adapter(loaded)
    add_a_token(loaded)
    (tmp_path / "lm.pickle").write_bytes(pickle.dumps(loaded))
    program = (
        "import pickle, sys, pathlib; lm = pickle.loads(pathlib.Path(sys.argv[1]).read_bytes());"
        "print(lm.forward([[5, 6, 7]])[1].tolist(), lm.encode('the <cat>'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "lm.pickle")], capture_output=True, text=True, check=True
    )
    logprobs, ids = eval(done.stdout.replace("]] [", "]], ["))
    np.testing.assert_allclose(logprobs, loaded.forward([[5, 6, 7]])[1], atol=1e-5)
    assert ids == loaded.encode("the <cat>")


@pytest.mark.parametrize("change", WEIGHTS, ids=lambda change: change.__name__)
def test_changed_weights_get_a_new_engine(loaded: TransformersLM, change: Callable[[TransformersLM], None]) -> None:
    old = TokenTree(loaded, 4)
    old.roots([[5, 6, 7]])
    change(loaded)
    new = TokenTree(loaded, 4)
    assert new._engine is not old._engine
    new.roots([[5, 6, 7]])
    expected = np.take_along_axis(loaded.forward([[5, 6, 7]])[1], new.tokens, axis=1)
    np.testing.assert_allclose(new.logprobs, expected, atol=1e-4)
    assert TokenTree(loaded, 3)._engine is new._engine
    assert DecodingMDP(loaded, reward="length").roots([Prompt("the cat")]).shape == (1,)
