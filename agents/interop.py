"""The planner where other libraries expect a decoder: transformers' ``generate``, the lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..envs import TransformersLM
from ..envs.prompts import Prompt
from ..errors import ConfigurationError
from .planning.decoder import Decoder
from .search.budget import Budget

if TYPE_CHECKING:
    import torch

__all__ = ["as_custom_generate", "harness_model"]


def as_custom_generate(decoder: Decoder, budget: Budget | int | None = None) -> Callable[..., torch.Tensor]:
    """Return a decoder as what transformers takes as ``model.generate(…, custom_generate=…)``.

    ::

        planner = AStarPlanner(env, heuristic=QHeuristic("sentiment"))
        model.generate(**inputs, custom_generate=as_custom_generate(planner, budget=200))

    All rows of the batch are searched together. The horizon, the candidates and the stop strings are the decoder's own,
    and it is deterministic: sampling and beams are not for it, and what cannot be kept is refused: fewer new tokens
    than the decoder may write, several texts a prompt, a dict in return. A streamer hears of the prompt only.

    Args:
        decoder: A planner or a baseline, on the model whose ``generate`` is called.
        budget: Of each row; an integer means LM tokens.

    Returns:
        A function from the arguments of a decoding method to int64 [batch, length]: the input ids, each followed by its
        completion (with the token that ended it) and, on the right, padding.

    Raises:
        ConfigurationError: The decoder's model is not one of transformers. When called: it is another model's
            ``generate``, or it is asked for something that a decoder does not do.
    """
    lm = decoder.mdp.model
    if not isinstance(lm, TransformersLM):
        raise ConfigurationError(f"generate is of transformers' models; the decoder has {lm.name!r}")
    limits = Budget.of(budget)

    # generate hands over as its own what is named here and not in its _sample: the mask has to come by keyword.
    def custom_generate(model: Any, input_ids: torch.Tensor, **arguments: Any) -> torch.Tensor:
        import torch

        if model is not lm.model:
            raise ConfigurationError(
                f"the decoder searches with {lm.name!r}, but another model's generate was called; "
                "use decoder.mdp.model.model.generate, or build the decoder on TransformersLM(model, tokenizer)"
            )
        _refuse(decoder, input_ids.shape[1], arguments)
        kept = arguments.get("attention_mask")
        kept = torch.ones_like(input_ids) if kept is None else kept
        rows = [row[mask.bool()].tolist() for row, mask in zip(input_ids, kept, strict=True)]
        prompts = [Prompt(lm.decode(ids), token_ids=tuple(ids)) for ids in rows]
        plans = decoder.plan_many(prompts, limits)
        completions = [[*plan.token_ids] for plan in plans]
        width = max(map(len, completions))
        padding = model.generation_config.pad_token_id
        if padding is None:
            padding = min(lm.eos_token_ids, default=0)
        tail = [ids + [padding] * (width - len(ids)) for ids in completions]
        return torch.cat([input_ids, torch.tensor(tail, dtype=input_ids.dtype, device=input_ids.device)], dim=1)

    return custom_generate


def _refuse(decoder: Decoder, prompt_tokens: int, arguments: Mapping[str, Any]) -> None:
    """Raise an error where ``generate`` was asked for what the decoder would silently do otherwise.

    Raises:
        ConfigurationError: As it says.
    """
    asked, horizon = arguments["generation_config"], decoder.mdp.max_new_tokens
    if asked.max_new_tokens is not None and asked.max_new_tokens < horizon:
        raise ConfigurationError(
            f"max_new_tokens={asked.max_new_tokens} is less than the {horizon} that the decoder may write; its horizon "
            f"is part of what it maximises: make its environment with max_new_tokens={asked.max_new_tokens}"
        )
    if (asked.num_return_sequences or 1) > 1:
        raise ConfigurationError("one text a prompt; decoder.plan(prompt).best(n) has the n best of one search")
    if asked.return_dict_in_generate:
        raise ConfigurationError("token ids are what there is to return; decoder.plan(prompt) has all of a search")


def harness_model(make: Callable[[Sequence[str], int], Decoder], budget: Budget | int | None = None) -> Any:
    """Return a model for the lm-evaluation-harness whose texts a decoder writes.

    ::

        def make(stop, max_new_tokens):
            return AStarPlanner(DecodingMDP(reward=…, stop=stop, max_new_tokens=max_new_tokens))

        lm_eval.simple_evaluate(model=harness_model(make, budget=200), tasks=[…])

    ``generate_until`` is what the decoder answers; likelihoods are the language model's own, so that tasks of multiple
    choice score the model and not the decoder.

    Args:
        make: From the strings at which a text ends, and its greatest length in tokens, to a decoder. The harness asks
            for few different ones, and each is kept.
        budget: Of each prompt; an integer means LM tokens.

    Returns:
        A ``lm_eval.api.model.LM``.

    Raises:
        ConfigurationError: lm-eval is not installed.
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
            answers = [""] * len(requests)
            groups: dict[tuple[tuple[str, ...], int], list[int]] = {}
            for i, request in enumerate(requests):
                _, options = request.args
                until = options.get("until") or ()
                stop = (until,) if isinstance(until, str) else tuple(until)
                groups.setdefault((stop, int(options.get("max_gen_toks", 32))), []).append(i)
            for key, members in groups.items():
                decoder = self._decoder(key)
                # The harness may leave white space at the end, which a tokenizer would rather have at the next token.
                plans = decoder.plan_many([requests[i].args[0] for i in members], limits)
                for i, plan in zip(members, plans, strict=True):
                    answers[i] = _cut(plan.text, key[0])
                    self.cache_hook.add_partial("generate_until", requests[i].args, answers[i])
            return answers

        def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            lm = self._lm()
            found = []
            for request in requests:
                context, continuation = request.args
                whole, before = lm.encode(context + continuation), lm.encode(context) if context else []
                found.append(_likelihood(lm, whole, max(len(before), 1)))
            return found

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            lm = self._lm()
            start = [min(lm.eos_token_ids, default=0)]
            return [_likelihood(lm, start + lm.encode(request.args[0]), 1)[0] for request in requests]

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


def _cut(text: str, stop: Sequence[str]) -> str:
    """Return the text before the first of the stop strings: the decoder's text ends with the one it met."""
    places = [place for string in stop if (place := text.find(string)) >= 0]
    return text[: min(places)] if places else text


def _likelihood(lm: TransformersLM, ids: Sequence[int], start: int) -> tuple[float, bool]:
    """Return the log-probability of ``ids[start:]`` after ``ids[:start]``, and whether greedy decoding writes it."""
    import torch

    with torch.inference_mode():
        given = torch.tensor([ids], device=lm.device)
        logprobs = lm.model(input_ids=given, use_cache=False).logits[0, start - 1 : -1].float().log_softmax(-1)
    said = given[0, start:]
    return float(logprobs.gather(-1, said[:, None]).sum()), bool((logprobs.argmax(-1) == said).all())
