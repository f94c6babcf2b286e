"""Tiny random models of transformers, written as GGUF files in float32, so that no rounding hides a mistake."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

# By name: llama.cpp's architecture, and what the names of the configuration's values are in the file.
ARCHITECTURES = {
    "Llama": gguf.MODEL_ARCH.LLAMA,
    "Qwen3": gguf.MODEL_ARCH.QWEN3,
    "Gemma2": gguf.MODEL_ARCH.GEMMA2,  # every other layer has a sliding window
    "Mamba": gguf.MODEL_ARCH.MAMBA,  # a recurrent memory
}


def write(model: Any, architecture: str, path: Path) -> Path:
    """Write a model of transformers into a GGUF file."""
    arch = ARCHITECTURES[architecture]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    config = model.config
    layers = config.num_hidden_layers
    writer.add_context_length(getattr(config, "max_position_embeddings", 64))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(layers)
    if architecture == "Mamba":
        writer.add_feed_forward_length(0)
        writer.add_head_count(0)
        writer.add_ssm_conv_kernel(config.conv_kernel)
        writer.add_ssm_inner_size(config.intermediate_size)
        writer.add_ssm_state_size(config.state_size)
        writer.add_ssm_time_step_rank(config.time_step_rank)
        writer.add_layer_norm_rms_eps(config.layer_norm_epsilon)
    else:
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(float((config.rope_parameters or {}).get("rope_theta", 10_000.0)))
    if architecture == "Gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
        writer.add_sliding_window(config.sliding_window)
    _add_vocabulary(writer, config.vocab_size)
    names = gguf.get_tensor_name_map(arch, layers)
    for name, values in _weights(model, architecture):
        known = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert known is not None, name
        writer.add_tensor(known, np.ascontiguousarray(values, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _weights(model: Any, architecture: str) -> Iterator[tuple[str, np.ndarray]]:
    for name, tensor in model.state_dict().items():
        values = tensor.float().numpy()
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if architecture == "Llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = model.config.num_attention_heads if "q_proj" in name else model.config.num_key_value_heads
            # llama.cpp rotates neighbours, transformers the two halves of a head.
            halves = values.reshape(heads, 2, values.shape[0] // heads // 2, values.shape[1])
            values = halves.swapaxes(1, 2).reshape(values.shape)
        if architecture == "Gemma2" and name.endswith("norm.weight"):
            values = values + 1
        if name.endswith("A_log"):
            name, values = name, -np.exp(values)
        if name.endswith("conv1d.weight"):
            values = values.squeeze(1)
        yield name, values


def _add_vocabulary(writer: Any, size: int) -> None:
    """Add a vocabulary of byte-level BPE: an end, then one character a token."""
    characters = "abcdefghijklmnopqrstuvwxyz.,!?0123456789ĠABCDEFGH"
    tokens = ["</s>", "ab", *characters[: size - 2]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL, *[gguf.TokenType.NORMAL] * (size - 1)])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)
