"""Decoders behind other libraries' interfaces: transformers' ``generate`` and the lm-evaluation-harness."""

from __future__ import annotations

import copy
import functools
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from ..envs import TransformersLM
from ..envs.prompts import Prompt
from ..errors import ConfigurationError
from .planning.decoder import Decoder
from .search.budget import Budget

if TYPE_CHECKING:
    import torch

__all__ = ["as_custom_generate", "harness_model"]

# Settings of generate that choose among sampled tokens or among beams: without effect where it does neither.
_OF_SAMPLING = {"temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h"}
_OF_BEAMS = {"length_penalty", "early_stopping", "num_beam_groups", "diversity_penalty"}
# Settings of speed, memory and of the dict that is not returned; and those that are compared one by one.
_WITHOUT_EFFECT = {
    "use_cache", "cache_implementation", "cache_config", "return_legacy_cache", "prefill_chunk_size", "low_memory",
    "compile_config", "disable_compile", "transformers_version", "bos_token_id", "decoder_start_token_id",
    "output_attentions", "output_hidden_states", "output_scores", "output_logits", "max_matching_ngram_size",
}  # fmt: skip
_COMPARED = {"max_length", "max_new_tokens", "pad_token_id", "eos_token_id", "num_return_sequences", "stop_strings",
             "return_dict_in_generate"}  # fmt: skip
_INSTEAD = {
    "do_sample": "decode with SamplingDecoder, or search for several texts with n=…",
    "num_beams": "decode with BeamSearch(env, width=…)",
    "min_length": "make its environment with constraint=MinTokens(…)",
    "min_new_tokens": "make its environment with constraint=MinTokens(…)",
    "bad_words_ids": "make its environment with constraint=BannedStrings(…)",
    "suppress_tokens": "make its environment with constraint=BannedStrings(…)",
    "max_time": "give as_custom_generate a budget: Budget(seconds=…)",
}


def as_custom_generate(decoder: Decoder, budget: Budget | int | None = None) -> Callable[..., torch.Tensor]:
    """Return a decoder as a function for ``model.generate(…, custom_generate=…)`` of transformers.

    ::

        planner = AStarPlanner(env, heuristic=QHeuristic("sentiment"))
        model.generate(**inputs, custom_generate=as_custom_generate(planner, budget=200))

    All rows of the batch are searched together. The horizon, the candidates, the end tokens and the stop strings are
    the decoder's own. Of the call, ``pad_token_id`` is honoured, and limits of length that the decoder keeps anyway.
    Any other setting that differs from the model's ``generation_config`` is refused: sampling, beams, minimal lengths,
    banned words, other end tokens, logits processors, stopping criteria, several texts a prompt, a dict in return.
    The sampling that a ``pipeline`` asks for by default is replaced with a warning.
    The model's own ``generation_config`` and ``streamer`` do not reach the decoder.

    Args:
        decoder: A planner or a baseline, on the model whose ``generate`` is called.
        budget: Budget of each row; an integer means LM tokens.

    Returns:
        A function from the arguments of a decoding method to int64 [batch, length]: the input ids, each followed by its
        completion (with the token that ended it) and, on the right, padding.

    Raises:
        ConfigurationError: The decoder's model is not one of transformers. When called: it is another model's
            ``generate``, or it is asked for something that a decoder does not do.
    """
    if not isinstance(given := cast("Any", decoder), Decoder):
        raise ConfigurationError(f"as_custom_generate takes a decoder, such as AStarPlanner(env); got {given!r:.100}")
    lm = decoder.mdp.model
    if not isinstance(lm, TransformersLM):
        raise ConfigurationError(f"generate is of transformers' models; the decoder has {lm.name!r}")
    limits = Budget.of(budget)

    # Arguments that are named here and not in transformers' _sample are treated apart: the mask has to come by keyword.
    def custom_generate(model: Any, input_ids: torch.Tensor, **arguments: Any) -> torch.Tensor:
        import torch

        if model is not lm.model:
            raise ConfigurationError(
                f"the decoder searches with {lm.name!r}, but another model's generate was called; "
                "use decoder.mdp.model.model.generate, or build the decoder on TransformersLM(model, tokenizer)"
            )
        _refuse(decoder, lm, input_ids, arguments)
        kept = arguments.get("attention_mask")
        kept = torch.ones_like(input_ids) if kept is None else kept
        rows = [row[mask.bool()].tolist() for row, mask in zip(input_ids, kept, strict=True)]
        prompts = [Prompt(lm.decode(ids), token_ids=tuple(ids)) for ids in rows]
        completions = [[*plan.token_ids] for plan in decoder.plan_many(prompts, limits)]
        width = max(map(len, completions))
        padding = arguments["generation_config"].pad_token_id
        if padding is None:
            padding = min(lm.eos_token_ids, default=0)
        tail = [ids + [padding] * (width - len(ids)) for ids in completions]
        return torch.cat([input_ids, torch.tensor(tail, dtype=input_ids.dtype, device=input_ids.device)], dim=1)

    return custom_generate


def _refuse(decoder: Decoder, lm: TransformersLM, input_ids: torch.Tensor, arguments: Mapping[str, Any]) -> None:
    """Raise an error where ``generate`` was asked for something that the decoder does not do.

    Raises:
        ConfigurationError: It was; the message names it.
    """
    model: Any = lm.model
    asked, horizon, length = arguments["generation_config"], decoder.mdp.max_new_tokens, input_ids.shape[1]
    usual, _ = model._prepare_generation_config(None)
    if arguments.get("inputs_embeds") is not None:
        raise ConfigurationError("inputs_embeds is not for a decoder, which searches token ids; give input_ids")
    limit, most = f"max_new_tokens={asked.max_new_tokens}", asked.max_new_tokens
    if most is None:
        most = asked.max_length - length
        limit = f"max_length={asked.max_length} less the prompt, {most},"
        if model.generation_config.max_length is None and most == _default_new_tokens(model, usual, length):
            most = horizon  # nobody asked: this is what generate fills in
    if most < horizon:
        raise ConfigurationError(
            f"{limit} is less than the {horizon} that the decoder may write; its horizon is part of its objective: "
            f"make its environment with max_new_tokens={max(most, 1)}"
        )
    if (asked.num_return_sequences or 1) > 1:
        raise ConfigurationError("one text a prompt; decoder.plan(prompt).best(n) has the n best of one search")
    if asked.return_dict_in_generate:
        raise ConfigurationError("token ids are what there is to return; decoder.plan(prompt) has all of a search")
    if _as_set(asked.eos_token_id) not in (_as_set(usual.eos_token_id), lm.eos_token_ids):
        raise ConfigurationError(
            f"eos_token_id={asked.eos_token_id} is not for a decoder, whose texts end with {sorted(lm.eos_token_ids)}; "
            "make its environment with stop=…"
        )
    if _as_set(asked.stop_strings) not in (_as_set(usual.stop_strings), frozenset(decoder.mdp.stop)):
        raise ConfigurationError(
            f"stop_strings={asked.stop_strings!r} are not the decoder's, {list(decoder.mdp.stop)}; "
            "make its environment with stop=…"
        )
    given, own = asked.to_dict(), usual.to_dict()
    without_effect = _WITHOUT_EFFECT | _COMPARED
    without_effect |= _OF_BEAMS if (asked.num_beams or 1) == 1 else set()
    changed = {key for key in given if key[0] != "_" and given[key] != own.get(key)} - without_effect
    if not asked.do_sample:
        changed -= {"do_sample", *_OF_SAMPLING}  # a decoder is deterministic
    elif changed & {"do_sample", *_OF_SAMPLING} and _is_a_pipelines(asked):
        changed -= {"do_sample", *_OF_SAMPLING}
        warnings.warn("the decoder replaces the sampling of the pipeline; do_sample=False says so", stacklevel=4)
    if (asked.num_beams or 1) == 1:
        changed.discard("num_beams")
    if "min_new_tokens" in changed:
        changed.discard("min_length")  # which generate derives from it
    for key in sorted(changed, key=lambda key: (key not in _INSTEAD, key)):
        advice = _INSTEAD.get(key, "leave it out, or decode with generate itself")
        raise ConfigurationError(f"{key}={given[key]!r} is not for a decoder, which would ignore it; {advice}")
    processors = model._get_logits_processor(
        generation_config=asked, input_ids_seq_length=length, encoder_input_ids=input_ids, device=input_ids.device,
        prefix_allowed_tokens_fn=None, logits_processor=[], model_kwargs={},
    )  # fmt: skip
    criteria = model._get_stopping_criteria(generation_config=asked, stopping_criteria=[])
    for key, expected, advice in (
        ("logits_processor", processors, "make its environment with constraint=… or reward=…"),
        ("stopping_criteria", criteria, "make its environment with stop=…, or give a budget"),
    ):
        if extra := _described(arguments.get(key) or ()) - _described(expected):
            kind = next(iter(extra))[0]
            raise ConfigurationError(f"{key} with {kind} is not for a decoder, which would ignore it; {advice}")


def _default_new_tokens(model: Any, usual: Any, length: int) -> int:
    """Return the number of new tokens that ``generate`` allows where no length was asked for."""
    context = getattr(model.config, "max_position_embeddings", None)
    return int(usual.max_length if context is None else min(usual.max_length, context - length))


def _is_a_pipelines(asked: Any) -> bool:
    """Tell whether the settings of sampling are those that a text-generation pipeline fills in by itself."""
    from transformers import TextGenerationPipeline

    defaults: Any = TextGenerationPipeline._default_generation_config
    return all(
        getattr(asked, name) == value
        for name, value in defaults.to_diff_dict().items()
        if name == "do_sample" or name in _OF_SAMPLING
    )


def _as_set(value: Any) -> frozenset[Any]:
    if value is None:
        return frozenset()
    return frozenset(value if isinstance(value, (list, tuple, set, frozenset)) else [value])


def _described(steps: Iterable[Any]) -> Counter[tuple[str, str]]:
    """Count logits processors or stopping criteria by type and settings."""
    return Counter((type(step).__name__, str(sorted(vars(step).items(), key=lambda item: item[0]))) for step in steps)


def harness_model(make: Callable[[Sequence[str], int], Decoder], budget: Budget | int | None = None) -> Any:
    """Return a model for the lm-evaluation-harness whose texts a decoder writes.

    ::

        def make(stop, max_new_tokens):
            return AStarPlanner(DecodingMDP(reward=…, stop=stop, max_new_tokens=max_new_tokens))

        lm_eval.simple_evaluate(model=harness_model(make, budget=200), tasks=[…])

    ``generate_until`` returns the decoder's texts. Likelihoods and chat templates are those of the harness's own
    ``HFLM`` on the decoder's language model, so that tasks of multiple choice score the model and not the decoder.
    Contexts that are too long lose their beginning, as there.

    Args:
        make: From the strings at which a text ends, and its greatest length in tokens (256 where a task names none), to
            a decoder. The harness asks for few different ones, and each is kept.
        budget: Budget of each prompt; an integer means LM tokens.

    Returns:
        A ``lm_eval.api.model.LM``.

    Raises:
        ConfigurationError: lm-eval is not installed. When a likelihood or a template is asked for: the decoder's model
            is not one of transformers.
    """
    try:
        from lm_eval.api.model import LM
    except ImportError as error:
        raise ConfigurationError("the harness is not installed: run pip install lm-eval") from error
    limits = Budget.of(budget)

    class DecoderLM(LM):  # type: ignore[misc, unused-ignore]
        """The decoder behind the harness's interface."""

        def __init__(self) -> None:
            super().__init__()
            self._decoders: dict[tuple[tuple[str, ...], int], Decoder] = {}

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            from lm_eval.models.utils import normalize_gen_kwargs

            answers = [""] * len(requests)
            groups: dict[tuple[tuple[str, ...], int], list[int]] = {}
            for i, request in enumerate(requests):
                options = normalize_gen_kwargs(request.args[1], 256)
                if options.get("do_sample"):
                    warnings.warn("a decoder is deterministic: do_sample and temperature are ignored", stacklevel=2)
                stop = tuple(string for string in options["until"] if string)
                groups.setdefault((stop, options["max_gen_toks"]), []).append(i)
            for key, members in groups.items():
                decoder = self._decoder(key)
                prompts = [self._prompt(decoder, requests[i].args[0]) for i in members]
                for i, plan in zip(members, decoder.plan_many(prompts, limits), strict=True):
                    answers[i] = _cut(plan.text, key[0])
                    self.cache_hook.add_partial("generate_until", requests[i].args, answers[i])
            return answers

        def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            # Nothing to score is certain, and white space alone is no context.
            asked = [
                (i, (context, continuation) if context.strip() else ("", context + continuation))
                for i, (context, continuation) in enumerate(request.args for request in requests)
                if continuation
            ]
            answers = [(0.0, True)] * len(requests)
            if asked:
                with self._lm().lock:
                    scored = [SimpleNamespace(args=arguments) for _, arguments in asked]
                    found = self._scorer.loglikelihood(scored, disable_tqdm=disable_tqdm)
                for (i, _), answer in zip(asked, found, strict=True):
                    answers[i] = answer
            for request, answer in zip(requests, answers, strict=True):
                self.cache_hook.add_partial("loglikelihood", request.args, answer)
            return answers

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            asked = [i for i, request in enumerate(requests) if request.args[0]]
            answers = [0.0] * len(requests)
            if asked:
                with self._lm().lock:
                    scored = [SimpleNamespace(args=requests[i].args) for i in asked]
                    found = self._scorer.loglikelihood_rolling(scored, disable_tqdm=disable_tqdm)
                for i, answer in zip(asked, found, strict=True):
                    answers[i] = float(answer)
            for request, answer in zip(requests, answers, strict=True):
                self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer)
            return answers

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            return str(self._scorer.apply_chat_template(chat_history, add_generation_prompt=add_generation_prompt))

        def chat_template(self, chat_template: bool | str = False) -> str | None:
            found: str | None = self._scorer.chat_template(chat_template)
            return found

        @property
        def tokenizer_name(self) -> str:
            return str(self._scorer.tokenizer_name)

        @functools.cached_property
        def _scorer(self) -> Any:
            return _scorer(self._lm())

        def _prompt(self, decoder: Decoder, context: str) -> Any:
            """Return a context as the harness's own model encodes and shortens it, where it can."""
            if not isinstance(decoder.mdp.model, TransformersLM):
                return context
            room = decoder.mdp.model.context_length - decoder.mdp.max_new_tokens
            ids = self._scorer.tok_encode(context) or [self._scorer.prefix_token_id]
            return Prompt(context, token_ids=tuple(ids[-room:]))

        def _decoder(self, key: tuple[tuple[str, ...], int]) -> Decoder:
            if key not in self._decoders:
                self._decoders[key] = make(*key)
            return self._decoders[key]

        def _lm(self) -> TransformersLM:
            known = next(iter(self._decoders.values()), None) or self._decoder(((), 32))
            if not isinstance(known.mdp.model, TransformersLM):
                raise ConfigurationError(f"likelihoods need a model of transformers, got {known.mdp.model.name!r}")
            return known.mdp.model

    return DecoderLM()


def _scorer(lm: TransformersLM) -> Any:
    """Return the harness's own model of the same weights; it may change its tokenizer, which therefore is a copy."""
    from lm_eval.models.huggingface import HFLM

    class Scorer(HFLM):  # type: ignore[misc, unused-ignore]
        """HFLM without the assertions that end a run: on empty and on overlong continuations."""

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
            ids: list[int] = super().tok_encode(string, add_special_tokens, **options)
            end = self.tokenizer.eos_token_id
            # Some tokenizers end every text, also one that is to be continued.
            is_ended = add_special_tokens is not False and ids[-1:] == [end]
            return ids[:-1] if is_ended and not string.endswith(self.tokenizer.eos_token) else ids

        def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
            before, after = super()._encode_pair(context, continuation)
            # A continuation that only changes the context's last token is scored by itself.
            return before, after or self.tok_encode(continuation, add_special_tokens=False)

        def _loglikelihood_tokens(self, requests: Any, **options: Any) -> list[tuple[float, bool]]:
            size = max(self.max_length // 2, 1)
            pieces: list[Any] = []
            owners: list[int] = []
            for i, (texts, before, after) in enumerate(requests):
                step = len(after) if len(after) <= self.max_length else size
                for start in range(0, len(after), max(step, 1)):
                    # Without the texts: the harness's cache would take a piece's score for the whole's.
                    key = texts if step == len(after) else (f"{texts[0]} {start}", texts[1])
                    pieces.append((key, before + after[:start], after[start : start + step]))
                    owners.append(i)
            answers = [(0.0, True)] * len(requests)
            scores = super()._loglikelihood_tokens(pieces, **options) if pieces else []
            for i, (value, is_greedy) in zip(owners, scores, strict=True):
                answers[i] = answers[i][0] + float(value), answers[i][1] and bool(is_greedy)
            return answers

    return Scorer(pretrained=lm.model, tokenizer=copy.deepcopy(lm.tokenizer), backend="causal")


def _cut(text: str, stop: Sequence[str]) -> str:
    """Return the text before the first of the stop strings, where ``make`` gave its decoder others."""
    places = [place for string in stop if (place := text.find(string)) >= 0]
    return text[: min(places)] if places else text
