"""Models of the Llama family as a short list of operations, with their own weights or with half-precision copies.

transformers' modules take about a thousand small operations a step. Here q, k and v are one product, gate and up are
one product, and the rotary embedding turns q and k together. Nothing of transformers' modelling code is imported, so
a model loads in half of the time. The attention over a token tree is :mod:`~qstar_decoding.models.tree_attention`'s.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from ...errors import ConfigurationError
from ..tree_attention import ForwardState, tree_attention
from .layers import HalfLinear, Stacked, check_half, linear_of

__all__ = ["FlatConfig", "FlatModel"]

_FAMILY = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
_ROPES = ("default", "linear", "llama3")

Weights = Callable[[str], Tensor | None]  # by name, as in a checkpoint; None where the model has no such weight


class FlatConfig:
    """The entries of a ``config.json`` as attributes."""

    def __init__(self, entries: Mapping[str, Any], name_or_path: str = "") -> None:
        """Take the entries over."""
        vars(self).update(entries)
        self.name_or_path = name_or_path

    def get_text_config(self) -> Self:
        """Return the configuration itself; see transformers' ``PretrainedConfig``."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return the entries."""
        return dict(vars(self))

    def to_json_string(self) -> str:
        """Return the entries as JSON."""
        return json.dumps(self.to_dict(), sort_keys=True, default=str)


class FlatLayer(nn.Module):
    """A decoder layer: attention and a gated network of two layers, each after a norm and added to the stream."""

    def __init__(self, index: int, config: FlatConfig, weights: Weights, linear: Callable[..., nn.Module]) -> None:
        """Take the weights of layer ``index``; ``linear`` makes a layer of a weight and a bias."""
        super().__init__()
        self.index, self.eps = index, float(config.rms_norm_eps)  # type: ignore[attr-defined]
        self.heads, self.kv_heads, self.width = _head_shape(config)

        def of(name: str) -> Tensor | None:
            return weights(f"model.layers.{index}.{name}")

        def together(block: str, *names: str) -> nn.Module:
            parts = [(of(f"{block}.{name}.weight"), of(f"{block}.{name}.bias")) for name in names]
            biases = [bias for _, bias in parts if bias is not None]
            if len(parts) == 1 or linear is not HalfLinear or len(biases) not in (0, len(parts)):
                layers = [linear(*part) for part in parts]
                return layers[0] if len(layers) == 1 else Stacked(layers)
            return linear(torch.cat([weight for weight, _ in parts]), torch.cat(biases) if biases else None)  # type: ignore[misc]

        self.qkv, self.o = together("self_attn", "q_proj", "k_proj", "v_proj"), together("self_attn", "o_proj")
        self.gate_up, self.down = together("mlp", "gate_proj", "up_proj"), together("mlp", "down_proj")
        self.before_attention, self.before_mlp = (
            _kept(of(f"{name}.weight")) for name in ("input_layernorm", "post_attention_layernorm")
        )
        self.q_norm, self.k_norm = (_kept(of(f"self_attn.{name}.weight")) for name in ("q_norm", "k_norm"))

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, tree: ForwardState | None) -> Tensor:
        """Return the stream [B, N, d] after the layer."""
        batch, count, _ = x.shape
        turned = self.heads + self.kv_heads
        # ``forward`` instead of a call: the hooks of modules cost more than the small operations here.
        normed = functional.rms_norm(x, x.shape[-1:], self.before_attention, self.eps)
        heads = self.qkv.forward(normed).view(batch, count, turned + self.kv_heads, self.width)
        q_and_k, v = heads[:, :, :turned], heads[:, :, turned:].transpose(1, 2)
        if self.q_norm is not None:
            parts = zip(q_and_k.split((self.heads, self.kv_heads), 2), (self.q_norm, self.k_norm), strict=True)
            q_and_k = torch.cat([functional.rms_norm(p, p.shape[-1:], norm, self.eps) for p, norm in parts], 2)
        cosine, sine = rope
        first, second = q_and_k.chunk(2, -1)
        q_and_k = torch.addcmul(q_and_k * cosine, torch.cat((second, first), -1), sine).transpose(1, 2)
        q, k = q_and_k[:, : self.heads], q_and_k[:, self.heads :]
        if tree is not None:
            out, _ = tree_attention(self, q, *tree.update(k, v, self.index), None)
        else:
            out = functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None and count > 1, enable_gqa=True
            ).transpose(1, 2)
        x = x + self.o.forward(out.reshape(batch, count, -1))
        gate, up = self.gate_up.forward(functional.rms_norm(x, x.shape[-1:], self.before_mlp, self.eps)).chunk(2, -1)
        return torch.add(x, self.down.forward(functional.silu(gate) * up))


class FlatModel(nn.Module):
    """A causal language model of the Llama family, with the part of ``PreTrainedModel`` that this package uses.

    Attributes:
        config: The configuration.
        generation_config: Has ``eos_token_id``.
        kv_token_bytes: Bytes of keys and values of a token over all layers.
    """

    def __init__(self, config: FlatConfig, weights: Weights, *, half: bool = False) -> None:
        """Take the weights over.

        Args:
            config: The configuration.
            weights: Returns a weight by its name in the checkpoint, None where there is none.
            half: Whether to round the matrices to half precision; norms and biases stay.

        Raises:
            ConfigurationError: The architecture is another one, or this build of torch has no such products.
        """
        super().__init__()
        if reason := _why_not(config):
            raise ConfigurationError(f"{reason}; load it with weights='model'")
        if half:
            check_half()
        self.config, self.generation_config = config, SimpleNamespace(eos_token_id=None)
        embedding = weights("model.embed_tokens.weight")
        assert embedding is not None
        output = None if vars(config).get("tie_word_embeddings") else weights("lm_head.weight")
        linear: Callable[..., nn.Module] = HalfLinear if half else linear_of
        self.embed_tokens = _embedding(embedding.half() if half else embedding)
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # packing takes a second or two
            count = int(config.num_hidden_layers)  # type: ignore[attr-defined]
            self.layers = nn.ModuleList(pool.map(lambda i: FlatLayer(i, config, weights, linear), range(count)))
        self.norm = _kept(weights("model.norm.weight"))
        self.lm_head = linear(embedding if output is None else output)
        self.register_buffer("_turns", _turns(config), persistent=False)
        _, kv_heads, width = _head_shape(config)
        assert self.norm is not None
        self.kv_token_bytes = len(self.layers) * kv_heads * 2 * width * self.norm.element_size()
        self.requires_grad_(False)

    @classmethod
    def from_folder(cls, folder: Path, *, dtype: torch.dtype, half: bool = False) -> Self:
        """Read the safetensors files of a folder; what keeps its dtype and shape stays mapped into memory.

        Raises:
            ConfigurationError: See the constructor.
            OSError: A file is missing or broken.
        """
        from safetensors import safe_open

        config = FlatConfig(json.loads((folder / "config.json").read_text("utf-8")), str(folder))
        files: list[Any] = [safe_open(path, framework="pt") for path in sorted(folder.glob("*.safetensors"))]
        if not files:
            raise FileNotFoundError(f"{folder} has no *.safetensors; load it with weights='model'")
        where = {name: file for file in files for name in file.keys()}  # noqa: SIM118 (not a dict)

        def weights(name: str) -> Tensor | None:
            return where[name].get_tensor(name).to(dtype) if name in where else None

        model = cls(config, weights, half=half)
        settings = folder / "generation_config.json"
        if settings.is_file():
            entries = json.loads(settings.read_text("utf-8"))
            model.generation_config = SimpleNamespace(**{"eos_token_id": None, **entries})
        return model

    @property
    def device(self) -> torch.device:
        """Where the input is expected."""
        return self.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the arithmetic."""
        assert self.norm is not None
        return self.norm.dtype

    def get_input_embeddings(self) -> nn.Module:
        """Return the layer with a vector per token."""
        return self.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        """Return the output layer."""
        return self.lm_head

    def base_model(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: ForwardState | None = None,
        use_cache: bool = False,
    ) -> SimpleNamespace:
        """Return ``last_hidden_state`` [B, N, d], by uncached attention or over the tree of ``past_key_values``.

        Args:
            input_ids: int64 [B, N].
            attention_mask: [B, N], 0 where a token is padding.
            position_ids: int64 [B, N]; by default the places in the sequence.
            past_key_values: The tree that the tokens are appended to; B is 1 then.
            use_cache: Ignored.
        """
        del use_cache
        count = input_ids.shape[1]
        if position_ids is None:
            position_ids = torch.arange(count, device=input_ids.device).unsqueeze(0)
        mask = None
        if attention_mask is not None and past_key_values is None:
            causal = torch.ones(count, count, dtype=torch.bool, device=input_ids.device).tril()
            # A padded query sees itself, or its softmax is NaN.
            itself = torch.eye(count, dtype=torch.bool, device=input_ids.device)
            mask = (causal & attention_mask.bool()[:, None, None]) | itself
        angles = position_ids.unsqueeze(-1) * self._turns.float()  # type: ignore[operator]
        cosine, sine = angles.cos(), angles.sin()
        rope = torch.cat((cosine, cosine), -1), torch.cat((-sine, sine), -1)
        cosine, sine = (part.to(self.dtype).unsqueeze(2) for part in rope)  # [B, N, 1, D]
        x = self.embed_tokens(input_ids).to(self.dtype)
        for layer in self.layers:
            x = layer(x, (cosine, sine), mask, past_key_values)
        eps = float(self.config.rms_norm_eps)  # type: ignore[attr-defined]
        return SimpleNamespace(last_hidden_state=functional.rms_norm(x, x.shape[-1:], self.norm, eps))

    def forward(self, input_ids: Tensor, *, logits_to_keep: Tensor | int = 0, **inputs: Any) -> SimpleNamespace:
        """Return ``logits`` [B, n, V] at the places ``logits_to_keep`` [n], at all places for 0."""
        hidden = self.base_model(input_ids, **inputs).last_hidden_state
        if isinstance(logits_to_keep, Tensor):
            hidden = hidden[:, logits_to_keep]
        return SimpleNamespace(logits=self.lm_head(hidden))

    def generate(self, *_: Any, **__: Any) -> Any:
        """Raise an error: transformers' loop of decoding needs transformers' model.

        Raises:
            ConfigurationError: Always.
        """
        raise ConfigurationError("a model loaded with weights='flat' or 'float16' has no generate; leave weights out")


def _why_not(config: FlatConfig) -> str:
    """Return why a model cannot be computed here; nothing where it can."""
    entries = vars(config)
    [architecture, *_] = entries.get("architectures") or [entries.get("model_type")]
    rope = _rope(config)
    if architecture not in _FAMILY:
        return f"weights='flat' and 'float16' know {', '.join(_FAMILY)}; this model is a {architecture}"
    if entries.get("quantization_config"):
        return "weights='flat' and 'float16' take plain weights, and this model's are quantized already"
    if entries.get("sliding_window") and (entries.get("use_sliding_window") or architecture == _FAMILY[1]):
        return f"weights='flat' and 'float16' know no sliding window; this model has one of {entries['sliding_window']}"
    if rope["rope_type"] not in _ROPES or rope.get("partial_rotary_factor", 1) != 1:
        return f"weights='flat' and 'float16' know rotary embeddings {', '.join(_ROPES)}; this model's are {rope}"
    if entries.get("hidden_act", "silu") != "silu":
        return f"weights='flat' and 'float16' know the activation silu; this model has {entries['hidden_act']}"
    return ""


def _rope(config: FlatConfig) -> dict[str, Any]:
    """Return the settings of the rotary embedding, as transformers 4 or 5 writes them."""
    entries = vars(config)
    given = entries.get("rope_parameters") or entries.get("rope_scaling") or {}
    theta = entries.get("rope_theta") or 10_000.0
    return {"rope_theta": theta, **given, "rope_type": given.get("rope_type") or given.get("type") or "default"}


def _turns(config: FlatConfig) -> Tensor:
    """Return the angle per position of each pair of dimensions, float32 [D / 2]."""
    rope, width = _rope(config), _head_shape(config)[2]
    turns: Tensor = 1.0 / float(rope["rope_theta"]) ** (torch.arange(0, width, 2, dtype=torch.int64).float() / width)
    if rope["rope_type"] == "linear":
        return turns / float(rope["factor"])
    if rope["rope_type"] == "llama3":  # Llama 3.1: low frequencies are scaled, high ones are not
        low, high, length = (
            float(rope[name]) for name in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        )
        waves = length * turns / (2 * math.pi)  # within the original context
        smooth = ((waves - low) / (high - low)).clamp(0, 1)
        return (1 - smooth) * turns / float(rope["factor"]) + smooth * turns
    return turns


def _head_shape(config: FlatConfig) -> tuple[int, int, int]:
    """Return the number of query heads, of key-value heads, and their width."""
    entries = vars(config)
    heads = int(entries["num_attention_heads"])
    kv_heads = int(entries.get("num_key_value_heads") or heads)
    return heads, kv_heads, int(entries.get("head_dim") or entries["hidden_size"] // heads)


def _kept(weight: Tensor | None) -> nn.Parameter | None:
    # A copy: the smallest view of a mapped file keeps the whole file in memory.
    return None if weight is None else nn.Parameter(weight.clone(), requires_grad=False)


def _embedding(weight: Tensor) -> nn.Embedding:
    from_pretrained: Callable[..., nn.Embedding] = nn.Embedding.from_pretrained
    return from_pretrained(weight)
