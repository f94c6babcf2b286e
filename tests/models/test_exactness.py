"""The trial that chooses between the tree engine and whole prefixes: never silently wrong, in any dtype."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from qstar_decoding.agents import GreedyDecoder
from qstar_decoding.envs import DecodingMDP, PrefixEngine, Prompt, TokenTree, TransformersLM, TreeEngine
from qstar_decoding.models import testing

from .test_engine import ARCHITECTURES
from .tokenizers_of_kinds import byte_level

TinyLM = Callable[[str], TransformersLM]

CONTEXT, SWITCH = 512, 64
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def with_rope(kind: str, architecture: str = "Llama", context: int = CONTEXT, **rope: Any) -> TransformersLM:
    """Return a tiny random model whose rotary embeddings are scaled."""
    tokenizer = byte_level()
    parameters = {"rope_type": kind, "rope_theta": 10_000.0, **rope}
    extra = {"original_max_position_embeddings": SWITCH} if kind == "longrope" else {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = getattr(transformers, f"{architecture}Config")(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=context,
            eos_token_id=0,
            bos_token_id=None,
            pad_token_id=0,
            initializer_range=0.3,
            rope_parameters=parameters,
            **extra,
        )
        return TransformersLM(AutoModelForCausalLM.from_config(config).eval(), tokenizer, name=f"tiny-{kind}")


LONG = {"short_factor": [1.0] * 4, "long_factor": [8.0, 4.0, 16.0, 32.0]}
SCALED = {
    "longrope Phi3": lambda: with_rope("longrope", "Phi3", **LONG),
    "longrope Llama": lambda: with_rope("longrope", "Llama", **LONG),
    "longrope, long context": lambda: with_rope("longrope", "Phi3", 4096, **LONG),
    "dynamic": lambda: with_rope("dynamic", factor=4.0),
    "yarn": lambda: with_rope("yarn", factor=4.0, original_max_position_embeddings=SWITCH),
    "llama3": lambda: with_rope(
        "llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=SWITCH
    ),
    "linear": lambda: with_rope("linear", factor=4.0),
}


def greedy(lm: TransformersLM, ids: list[int], count: int) -> list[int]:
    """Continue by uncached forwards."""
    for _ in range(count):
        ids = [*ids, int(lm.forward([ids])[1][0].argmax())]
    return ids[-count:]


@pytest.mark.parametrize("kind", list(SCALED))
def test_lengths_do_not_change_what_is_said(kind: str) -> None:
    lm = SCALED[kind]()
    tree = TokenTree(lm, 4)
    assert isinstance(tree._engine, PrefixEngine if "longrope" in kind else TreeEngine)
    rng = np.random.default_rng(0)
    # On both sides of the length at which LongRoPE switches, across it, and beside a prompt that is longer.
    prompts = [rng.integers(3, lm.vocab_size, size=n).tolist() for n in (3, SWITCH - 3, SWITCH - 1, SWITCH, 100, 300)]
    nodes = tree.roots(prompts)
    for step in range(4):
        nodes = tree.expand(nodes, np.full(len(nodes), step % 2))
    for prompt, node in zip(prompts, nodes.tolist(), strict=True):
        expected = lm.forward([[*prompt, *tree.completion_ids(node)]])[1][0]
        np.testing.assert_allclose(tree.logprobs[node], expected[tree.tokens[node]], atol=2e-3)
    decoder = GreedyDecoder(DecodingMDP(lm, reward=lambda p, c: 0.0, top_k=4, max_new_tokens=6, logprob_weight=1.0))
    plans = decoder.plan_many([Prompt("x", {}, tuple(prompt)) for prompt in prompts])
    for prompt, plan in zip(prompts, plans, strict=True):
        ids = list(plan.token_ids)
        assert ids == greedy(lm, prompt, len(ids))


class CountingAttention(torch.nn.Module):
    """Scales the keys of a layer by the number of tokens in the forward, past a length."""

    def __init__(self, inner: torch.nn.Module, past: int) -> None:
        super().__init__()
        self.inner, self.past = inner, past

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        keys: torch.Tensor = self.inner(states)
        return keys * 1.5 if states.shape[1] > self.past else keys


class LookingAhead(torch.nn.Module):
    """Adds the mean over all tokens: not causal."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        keys: torch.Tensor = self.inner(states)
        return keys + keys.mean(dim=1, keepdim=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wrap", [lambda k: CountingAttention(k, 10), lambda k: CountingAttention(k, 40), LookingAhead])
def test_keys_that_depend_on_the_whole_forward_are_noticed(
    new_tiny_lm: TinyLM, wrap: Callable[[Any], torch.nn.Module], dtype: torch.dtype
) -> None:
    lm = new_tiny_lm("Llama")
    attention = lm.model.model.layers[0].self_attn
    attention.k_proj = wrap(attention.k_proj)
    lm = TransformersLM(lm.model.to(dtype), lm.tokenizer, prepack=False)
    what = "the tokens after it" if wrap is LookingAhead else "the length of the whole sequence"
    assert f"its outputs at a token depend on {what}" in str(testing.tree_mask_error(lm))
    assert isinstance(lm.new_engine(), PrefixEngine)


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 40, "bos_token_id": 0, "eos_token_id": 0}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64}
# Attention sinks, and states that carry everything before: recurrent, convolutional, or beside attention.
STATEFUL: dict[str, dict[str, Any]] = {
    "GptOss": {},
    "Mamba": {},
    "Mamba2": {"state_size": 8, "num_heads": 4, "head_dim": 16, "expand": 2, "n_groups": 1},
    "RecurrentGemma": {**HEADS, "num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 16},
    "Lfm2": {**HEADS, "layer_types": ["conv", "full_attention"]},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", list(STATEFUL))
def test_engines_that_are_wrong_in_float32_do_not_pass_in_half_precision(
    new_tiny_lm: TinyLM, architecture: str, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    model: Any = new_tiny_lm("GptOss" if architecture == "GptOss" else "Mamba").model
    if architecture not in ("GptOss", "Mamba"):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = getattr(transformers, f"{architecture}Config")(**{**SIZES, **STATEFUL[architecture]})
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            for weights in model.parameters():
                if weights.ndim > 1:
                    weights.data.normal_(0, 0.3)
    lm = TransformersLM(model.to(dtype), new_tiny_lm("Llama").tokenizer, prepack=False, name="half")
    with caplog.at_level(logging.WARNING, "qstar_decoding"):
        assert isinstance(lm.new_engine(), PrefixEngine)
    assert "whole prefixes are recomputed instead" in caplog.text


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_engines_that_are_right_pass_in_every_precision(
    new_tiny_lm: TinyLM, architecture: str, dtype: torch.dtype
) -> None:
    lm = new_tiny_lm(architecture)
    lm = TransformersLM(lm.model.to(dtype), lm.tokenizer, prepack=False)
    assert testing.tree_mask_error(lm) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [0.3, 0.1])
def test_a_small_error_of_the_attention_is_noticed_in_every_precision(
    new_tiny_lm: TinyLM, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, size: float
) -> None:
    """An attention that loses a share of its weights, as one without its sinks gains one."""
    from qstar_decoding.models import tree_attention

    lm = new_tiny_lm("Llama")
    lm = TransformersLM(lm.model.to(dtype), lm.tokenizer, prepack=False)
    attend = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        tree_attention.torch.nn.functional,
        "scaled_dot_product_attention",
        lambda q, k, v, attn_mask=None, **options: (
            attend(q, k, v, attn_mask=attn_mask, **options)
            * (1 - size if tree_attention._active.forward is not None else 1)
        ),
    )
    assert "off by" in str(testing.tree_mask_error(lm))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_embedded_model_keeps_its_fast_engine_in_half_precision(dtype: str) -> None:
    from qstar_decoding.models import load_language_model

    assert isinstance(load_language_model(dtype=dtype).new_engine(), TreeEngine)
