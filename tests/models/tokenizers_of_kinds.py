"""Tiny tokenizers of the common kinds, and random models on them."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qstar_decoding.models import TransformersLM

TEXTS = ["the cat sat on the mat and the dog ran to the sea", "hello world this is a test", "yes no maybe the end"] * 3


def sentencepiece(*, decoder: str = "strip", add_bos: bool = True) -> PreTrainedTokenizerFast:
    """As Llama 2 and Mistral: words begin with a mark, bytes stand for unknown characters, the first space is lost."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = (
        decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        if decoder == "strip"
        else decoders.Metaspace()
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=special, show_progress=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.pre_tokenizer = None  # type: ignore[assignment]
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def byte_level(template: str = "$A", **special: Any) -> PreTrainedTokenizerFast:
    """As GPT-2, Llama 3 and Qwen: bytes, merged; ``template`` says which special tokens surround a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = ["<|end|>", "<|begin|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=names,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    ids = [(name, tokenizer.token_to_id(name)) for name in names]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)
    options = {"eos_token": "<|end|>", "bos_token": "<|begin|>", **special}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, additional_special_tokens=["<|im_start|>", "<|im_end|>"], **options
    )


def word_level() -> PreTrainedTokenizerFast:
    """Whole words, joined with spaces."""
    words = {"</s>": 0, "<unk>": 1, **{word: i + 2 for i, word in enumerate(sorted({*" ".join(TEXTS).split()}))}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def language_model(
    tokenizer: Any, *, vocab_size: int | None = None, name: str = "tiny", **config: Any
) -> TransformersLM:
    """Return a tiny random Llama whose words are the tokenizer's."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        options = {
            "vocab_size": vocab_size or len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "initializer_range": 0.3,
            **config,
        }
        return TransformersLM(LlamaForCausalLM(LlamaConfig(**options)), tokenizer, name=name)
