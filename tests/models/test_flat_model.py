"""Flat models: the same outputs as transformers' own model of the same weights, rounded to half precision or not."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from qstar_decoding.envs import TokenTree, TransformersLM, TreeEngine, load_language_model
from qstar_decoding.errors import ConfigurationError, UnknownNameError
from qstar_decoding.models import check_language_model
from qstar_decoding.models.flat.layers import HalfLinear, half_problem
from qstar_decoding.models.flat.model import FlatModel

from .tokenizers_of_kinds import byte_level

needs_fbgemm = pytest.mark.skipif(bool(half_problem()), reason=f"no half-precision products: {half_problem()}")
WAYS = ["flat", pytest.param("float16", marks=needs_fbgemm)]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", {}),
    "Llama, tied": ("Llama", {"tie_word_embeddings": True}),
    "Llama, biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "Llama, head_dim": ("Llama", {"head_dim": 16}),
    "Llama, linear rope": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}},
    ),
    "Llama, llama3 rope": (
        "Llama",
        {"rope_parameters": {"rope_theta": 10_000.0, "original_max_position_embeddings": 64, **LLAMA3}},
    ),
    "Mistral": ("Mistral", {"sliding_window": None}),
    "Qwen2": ("Qwen2", {}),
    "Qwen3": ("Qwen3", {"head_dim": 16}),
}


def save(folder: Path, architecture: str = "Llama", dtype: torch.dtype = torch.float32, **options: Any) -> str:
    """Write a small random model and its tokenizer; return the folder."""
    tokenizer = byte_level()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = getattr(transformers, f"{architecture}Config")(
            **{
                "vocab_size": len(tokenizer),
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 256,
                "eos_token_id": 0,
                "bos_token_id": None,
                "pad_token_id": 0,
                **options,
            }
        )
        model = AutoModelForCausalLM.from_config(config)
        for name, weights in model.named_parameters():
            weights.data.normal_(1.0 if "norm" in name else 0.0, 0.3)
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def reference(folder: str, weights: str) -> TransformersLM:
    """Return transformers' own model, its matrices rounded as the flat one's are."""
    lm = load_language_model(folder, "cpu", "float32")
    assert isinstance(lm, TransformersLM)
    if weights == "float16":
        for parameter in lm.model.parameters():
            if parameter.ndim > 1:
                parameter.data = parameter.data.half().float()
    return lm


@pytest.mark.parametrize("weights", WAYS)
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_flat_model_equals_transformers(kind: str, weights: str, tmp_path: Path) -> None:
    architecture, options = KINDS[kind]
    folder = save(tmp_path, architecture, **options)
    flat = load_language_model(folder, "cpu", "float32", weights=weights)
    assert isinstance(flat, TransformersLM)
    assert isinstance(flat.model, FlatModel)
    expected = reference(folder, weights)
    sequences = [[5, 6, 7], [8], [int(i) for i in np.random.default_rng(0).integers(1, 200, size=100)]]
    for ours, theirs in zip(flat.forward(sequences), expected.forward(sequences), strict=True):
        assert np.abs(ours - theirs).max() < 1e-4
    assert (flat.eos_token_ids, flat.vocab_size, flat.hidden_size, flat.context_length) == (
        *(expected.eos_token_ids, expected.vocab_size, expected.hidden_size, expected.context_length),
    )
    assert flat.encode("a text") == expected.encode("a text")
    assert np.abs(flat.token_embeddings() - expected.token_embeddings()).max() < 1e-6


@pytest.mark.parametrize("weights", WAYS)
def test_a_tree_equals_uncached_forwards_under_eviction_too(weights: str, tmp_path: Path) -> None:
    lm = load_language_model(save(tmp_path), "cpu", "float32", weights=weights, hidden_layers=(0,), prepack=True)
    prompts = [[5, 6, 7], [5, 9], list(range(10, 40))]
    token_bytes = 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, width, bytes
    assert lm.kv_token_bytes == token_bytes
    for budget in (None, 50 * token_bytes):
        tree = TokenTree(lm, 4, kv_budget=budget)
        assert isinstance(tree._engine, TreeEngine)
        nodes = tree.roots(prompts)
        for width in (3, 2, 2):
            nodes = tree.expand(nodes.repeat(width), np.tile(np.arange(width), len(nodes)))
        for node in range(len(tree)):
            path, at = [], node
            while tree.parent[at] >= 0:
                path.append(_token(tree, at))
                at = int(tree.parent[at])
            root = prompts[int(np.flatnonzero(tree.roots(prompts) == at)[0])]
            hidden, logprobs = lm.forward([[*root, *reversed(path)]])
            assert np.abs(logprobs[0][tree.tokens[node]] - tree.logprobs[node]).max() < 1e-4
            assert np.abs(hidden[0] - tree.hidden[node]).max() < 1e-3


def _token(tree: TokenTree, node: int) -> int:
    parent = int(tree.parent[node])
    [rank] = np.flatnonzero(tree.children[parent] == node)
    return int(tree.tokens[parent][rank])


@pytest.mark.parametrize("weights", WAYS)
def test_a_flat_model_obeys_the_laws_of_language_models(weights: str, tmp_path: Path) -> None:
    check_language_model(load_language_model(save(tmp_path), "cpu", "float32", weights=weights))


def test_bfloat16_stays_within_its_rounding(tmp_path: Path) -> None:
    folder = save(tmp_path)
    flat, exact = (load_language_model(folder, "cpu", dtype, weights="flat") for dtype in ("bfloat16", "float32"))
    sequences = [[5, 6, 7, 8], [9, 10]]
    assert flat.forward(sequences)[1] == pytest.approx(exact.forward(sequences)[1], abs=0.5)
    check_language_model(flat)


@pytest.mark.parametrize("weights", WAYS)
def test_padding_changes_nothing(weights: str, tmp_path: Path) -> None:
    lm = load_language_model(save(tmp_path), "cpu", "float32", weights=weights)
    assert isinstance(lm, TransformersLM)
    with torch.inference_mode():
        alone = lm.model.base_model(torch.tensor([[5, 6]])).last_hidden_state  # type: ignore[operator]
        padded = lm.model.base_model(  # type: ignore[operator]
            torch.tensor([[5, 6, 0], [5, 6, 7]]), attention_mask=torch.tensor([[1, 1, 0], [1, 1, 1]])
        ).last_hidden_state
    torch.testing.assert_close(padded[:1, :2], alone)
    torch.testing.assert_close(padded[1:, :2], alone)


@pytest.mark.parametrize("weights", WAYS)
@pytest.mark.parametrize("by_name", [True, False])
def test_copies_in_other_processes_say_the_same(weights: str, by_name: bool, tmp_path: Path) -> None:
    lm = load_language_model(save(tmp_path), "cpu", "float32", weights=weights)
    assert isinstance(lm, TransformersLM)
    original = lm if by_name else TransformersLM(lm.model, lm.tokenizer, name="by value")
    copy = pickle.loads(pickle.dumps(original))
    assert (copy is lm) == by_name
    for ours, theirs in zip(copy.forward([[5, 6, 7]]), lm.forward([[5, 6, 7]]), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


@needs_fbgemm
def test_half_precision_layers_round_and_no_more() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5000, 24, generator=generator)  # in three pieces
    bias = torch.randn(5000, generator=generator)
    inputs = torch.randn(3, 24, generator=generator)
    expected = torch.nn.functional.linear(inputs, weight.half().float(), bias)
    layer = HalfLinear(weight, bias)
    torch.testing.assert_close(layer(inputs), expected)
    assert torch.equal(layer.unpacked()[0], weight.half().float())
    with pytest.raises(ConfigurationError, match="numbers up to 65504"):
        HalfLinear(torch.full((2, 2), 1e5))


@pytest.mark.parametrize(
    ("architecture", "options", "message"),
    [
        ("Gemma", {}, "this model is a GemmaForCausalLM; load it with weights='model'"),
        ("Mistral", {"sliding_window": 8}, "no sliding window"),
        ("Llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rotary embeddings"),
        ("Llama", {"hidden_act": "gelu"}, "activation silu"),
    ],
)
def test_other_models_are_refused(architecture: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = save(tmp_path, architecture, **options)
    with pytest.raises(ConfigurationError, match=message) as caught:
        load_language_model(folder, "cpu", "float32", weights="flat")
    assert not isinstance(caught.value, UnknownNameError)  # the name is right


def test_arguments_are_checked(tmp_path: Path) -> None:
    folder = save(tmp_path)
    with pytest.raises(ConfigurationError, match="weights is one of 'model', 'flat', 'float16'; got 'int3'"):
        load_language_model(folder, weights="int3")
    with pytest.raises(ConfigurationError, match="prepack is True, False or 'auto'"):
        load_language_model(str(tmp_path / "nothing" / "there"), prepack="yes")  # before anything is read
    with pytest.raises(ConfigurationError, match=r"^weights='float16' computes in float32 on a CPU"):
        load_language_model(folder, "cpu", "bfloat16", weights="float16")
    with pytest.raises(ConfigurationError, match="takes no device_map"):
        load_language_model(folder, "cpu", "float32", weights="flat", device_map="auto")
    with pytest.raises(UnknownNameError, match="could not be loaded"):
        load_language_model(str(tmp_path / "nothing" / "there"), "cpu", "float32", weights="flat")
    lm = load_language_model(folder, "cpu", "float32", weights="flat")
    assert isinstance(lm, TransformersLM)
    with pytest.raises(ConfigurationError, match="has no generate"):
        lm.model.generate()  # type: ignore[operator]


def test_no_modelling_code_is_imported(tmp_path: Path) -> None:
    """The start-up time of a flat model rests on this."""
    program = (
        "import sys; from qstar_decoding.models import load_language_model; from qstar_decoding.envs import TokenTree\n"
        f"lm = load_language_model({save(tmp_path)!r}, 'cpu', 'float32', weights='flat')\n"
        "TokenTree(lm, 4).roots([[5, 6, 7]])\n"
        "from qstar_decoding.agents import AStarPlanner, QHeuristic; QHeuristic('sentiment')\n"
        "assert 'transformers' in sys.modules\n"
        "print([m for m in ('transformers.modeling_utils', 'torch._dynamo', 'stable_baselines3') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
