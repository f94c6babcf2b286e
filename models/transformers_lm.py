"""Any causal language model of Hugging Face transformers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ..errors import ConfigurationError, PromptError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .packed_weights import PackedWeights
from .base import Engine, FloatArray, LanguageModel, Message, PrefixEngine, free_memory

__all__ = ["TransformersLM"]

logger = logging.getLogger(__name__)


class TransformersLM(LanguageModel):
    """Any causal LM of Hugging Face transformers.

    Attributes:
        model: The untouched ``PreTrainedModel``, in evaluation mode.
        tokenizer: The untouched tokenizer.
        packed_weights: See ``prepack``; None without.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str | None = None,
        prepack: bool | str = "auto",
        hidden_layers: Sequence[int] = (),
    ) -> None:
        """Wrap a loaded model and its tokenizer; neither is changed.

        Args:
            model: The model.
            tokenizer: Its tokenizer.
            name: Identifies the model in checkpoints; by default what it was loaded by.
            prepack: Whether copies of the weights in layouts for steps of 16, 32 and 64 tokens may be kept, made as
                they are needed. They make such steps some 10 to 20 % faster on x86 CPUs in float32 and do nothing
                elsewhere. ``"auto"``: as far as they take at most an eighth of the memory that is free now.
            hidden_layers: Decoder layers, from 0, whose outputs are to follow the last hidden state. What a model knows
                of its input often stands clearer in its middle (Azaria & Mitchell 2023); its end knows the next token.

        Raises:
            ConfigurationError: The model has no such layer.
        """
        model.train(False)
        self.model, self.tokenizer = model, tokenizer
        config = model.config.get_text_config()
        self.name = name or str(config.name_or_path)
        self._head: torch.nn.Module = cast("Any", model).get_output_embeddings()
        # The head's own width: in some architectures (OPT) it differs from the layers'.
        self.vocab_size, self.hidden_size = (int(n) for n in cast("Any", self._head).weight.shape)
        self._tapped = _decoder_layers(model, hidden_layers)
        self.hidden_layers = tuple(hidden_layers)
        self.hidden_size += len(hidden_layers) * int(config.hidden_size)
        self.context_length = int(getattr(config, "max_position_embeddings", None) or 1_000_000)
        self.eos_token_ids = _end_tokens(model, tokenizer)
        self.packed_weights = _packed_weights(model, prepack)
        self._tree_mask_is_exact: bool | None = None
        # How another process loads the same model, where the registry has loaded this one.
        self.recipe: tuple[Any, ...] | None = None

    def __reduce__(self) -> str | tuple[Any, ...]:
        """Pickle by name where the model was loaded by name: the other process loads its own copy of the weights."""
        return self.recipe or super().__reduce_ex__(2)

    @property
    def device(self) -> torch.device:
        """Where the model's input is expected."""
        return self.model.device

    def encode(self, prompt: str | Sequence[Message]) -> list[int]:
        """See :meth:`LanguageModel.encode`.

        Raises:
            PromptError: The prompt is a chat and the tokenizer has no chat template.
        """
        if isinstance(prompt, str):
            return [int(t) for t in self.tokenizer(prompt)["input_ids"]]
        if not getattr(self.tokenizer, "chat_template", None):
            raise PromptError(f"model {self.name!r} has no chat template; give the prompt as a plain string")
        messages = [dict(message) for message in prompt]
        text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return [int(t) for t in self.tokenizer(text, add_special_tokens=False)["input_ids"]]

    def decode(self, token_ids: Sequence[int]) -> str:
        """See :meth:`LanguageModel.decode`."""
        # Clean-up would make the text of a prefix differ from the beginning of the text of its continuation.
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def forward(self, sequences: Sequence[Sequence[int]]) -> tuple[FloatArray, FloatArray]:
        """See :meth:`LanguageModel.forward`. One sequence at a time: no padding, whatever the architecture."""
        import torch

        hidden, logprobs = [], []
        with torch.inference_mode():
            for sequence in sequences:
                ids = torch.tensor([list(sequence)], device=self.device)
                last = torch.tensor([len(sequence) - 1], device=self.device)
                state, logits = self.hidden_and_logits(last, input_ids=ids, use_cache=False)
                hidden.append(state[0].float())
                logprobs.append(logits[0].float().log_softmax(-1))
            return torch.stack(hidden).cpu().numpy(), torch.stack(logprobs).cpu().numpy()

    def hidden_and_logits(self, positions: torch.Tensor, **inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the model on one packed sequence and return what its output layer saw and said at ``positions`` [n].

        The output layer, the largest product of a small model, runs only there.

        Returns:
            Hidden states [n, d] and logits [n, V], in the model's dtype. The states of further layers have been scaled
            to the root mean square of the last one's: their own scales differ by orders of magnitude.
        """
        import torch

        seen: list[torch.Tensor] = []
        tapped: list[torch.Tensor] = []

        def tap(_module: Any, _args: Any, output: Any) -> None:
            states = output[0] if isinstance(output, tuple) else output
            tapped.append(states.reshape(-1, states.shape[-1])[positions])

        # Hooks give the hidden states of every architecture alike, without keeping all layers' outputs.
        hooks = [layer.register_forward_hook(tap) for layer in self._tapped]
        hooks.append(cast("Any", self._head).register_forward_pre_hook(lambda _, args: seen.append(args[0])))
        try:
            logits = self.model(**inputs, logits_to_keep=positions).logits[0]
        finally:
            for hook in hooks:
                hook.remove()
        hidden = seen[0][0]
        if len(hidden) != len(positions):  # an architecture that ignores logits_to_keep
            hidden, logits = hidden[positions], logits[positions]
        if tapped:
            norm = _root_mean_square(hidden)
            hidden = torch.cat([hidden, *(state * (norm / _root_mean_square(state)) for state in tapped)], dim=-1)
        return hidden, logits

    def token_embeddings(self) -> FloatArray:
        """Return the input embeddings, float32 [V, d]."""
        weight = cast("Any", self.model).get_input_embeddings().weight.detach()[: self.vocab_size]
        return np.asarray(weight.float().cpu().numpy(), dtype=np.float32)

    def engine(self, top_k: int, kv_budget: int | None = None) -> Engine:
        """Return a :class:`TreeEngine` where it is exact, else a :class:`PrefixEngine`.

        Whether it is exact is measured once per model, on a small random tree, rather than read off a list of names.
        """
        from .tree_engine import TreeEngine, tree_mask_error

        if self._tree_mask_is_exact is None:
            problem = tree_mask_error(self)
            self._tree_mask_is_exact = problem is None
            if problem is not None:
                logger.warning("%s: %s; whole prefixes are recomputed instead (exact, slower)", self.name, problem)
        return TreeEngine(self, top_k, kv_budget) if self._tree_mask_is_exact else PrefixEngine(self, top_k)


def _root_mean_square(states: torch.Tensor) -> torch.Tensor:
    return states.float().square().mean(dim=-1, keepdim=True).sqrt().clamp(min=1e-6).to(states.dtype)


def _decoder_layers(model: PreTrainedModel, which: Sequence[int]) -> list[torch.nn.Module]:
    """Return the layers ``which``, in the order in which the model runs them, wherever the architecture keeps them.

    Raises:
        ConfigurationError: The model has no such layer, or they do not ascend.
    """
    if not which:
        return []
    import torch

    count = int(model.config.get_text_config().num_hidden_layers)
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count]
    ascending = all(isinstance(i, int) for i in which) and list(which) == sorted(set(which))
    if not ascending or not 0 <= which[0] <= which[-1] < count or not lists:
        raise ConfigurationError(f"hidden_layers are ascending integers from 0 to {count - 1}, got {list(which)!r}")
    return [lists[0][i] for i in which]


def _packed_weights(model: PreTrainedModel, prepack: bool | str) -> PackedWeights | None:
    from .packed_weights import PackedWeights

    if prepack not in (True, False, "auto"):
        raise ConfigurationError(f"prepack is True, False or 'auto', got {prepack!r}")
    if not prepack:
        return None
    return PackedWeights(model, free_memory() / 8 if prepack == "auto" else float("inf"))


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Collect every token that ends a text, as the model's configuration and its tokenizer tell them."""
    ids: set[int] = set()
    for source in (model.generation_config, model.config.get_text_config(), tokenizer):
        value = getattr(source, "eos_token_id", None)
        ids.update(value if isinstance(value, (list, tuple)) else [] if value is None else [value])
    # Chat models name their turn's end as EOS; the pre-training end-of-text token still ends a plain text.
    ids.update(i for t, i in tokenizer.get_added_vocab().items() if t in ("<|endoftext|>", "<|end_of_text|>", "</s>"))
    return frozenset(int(i) for i in ids)
