"""Decoding of many prompts: rewards, J and LM tokens of each, their means, and intervals of differences."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ...envs import DecodingMDP, load_prompts
from ..planning.decoder import Decoder
from ..search.budget import Budget
from ..search.plan import Plan
from ..search.state import Search, Values

__all__ = ["Outcomes", "evaluate", "mean_figures", "paired_bootstrap", "side_by_side", "tokens_until"]


class Outcomes(NamedTuple):
    """What a decoder returned for ``n`` prompts.

    Attributes:
        plans: [n].
        rewards: float64 [n], the reward model's score of the texts, whether or not the decoder saw it; NaN where a text
            cannot be scored.
        objectives: float64 [n], J of the texts.
        lm_tokens: float64 [n].
    """

    plans: list[Plan]
    rewards: Values
    objectives: Values
    lm_tokens: Values


def evaluate(
    decoder: Decoder,
    prompts: Any,
    budget: Budget | int | None = None,
    *,
    shared: bool = False,
    progress: Callable[[Search], None] | None = None,
) -> Outcomes:
    """Decode every prompt and score what came out.

    A text that the budget did not suffice to finish is scored as it stands: that is what a user would be left with.

    Args:
        decoder: A planner or a baseline; with ``score="q"`` it does not see the rewards returned here.
        prompts: See :func:`~qstar_decoding.envs.load_prompts`.
        budget: Of each prompt; an integer means LM tokens.
        shared: Whether it is the budget of all prompts together.
        progress: Called after every step of a search.
    """
    loaded = load_prompts(prompts)
    plans = decoder.plan_many(loaded, budget, shared=shared, progress=progress)
    if any(plan.stop_reason == "interrupted" for plan in plans):
        raise KeyboardInterrupt  # a comparison must not take what was cut off for what a decoder can do
    rewards = np.array([plan.reward for plan in plans])
    unknown = np.flatnonzero(np.isnan(rewards))
    if len(unknown):
        texts, ids = zip(*((plans[i].text, plans[i].token_ids) for i in unknown), strict=True)
        rewards[unknown] = decoder.mdp.rewards([loaded[i] for i in unknown], texts, ids)
    objectives = decoder.mdp.logprob_weight * np.array([plan.logprob for plan in plans]) + rewards
    return Outcomes(plans, rewards, objectives, np.array([plan.usage.lm_tokens for plan in plans], dtype=np.float64))


def tokens_until(decoder: Decoder, prompts: Any, target: float, *, most: int = 1000) -> Values:
    """Return the LM tokens after which each prompt first has a text with J of at least ``target``, float64 [n].

    The search stops there; infinity where it ended without one. No budget of LM tokens is set, since decoders that
    share one out over a text would spend it at once. So the result serves for every budget: a prompt is solved within B
    tokens where its value is at most B. Decoders that choose a width to fit their budget, such as beams, are to be
    evaluated at each budget instead.

    Args:
        decoder: A decoder that sees the reward.
        prompts: See :func:`~qstar_decoding.envs.load_prompts`.
        target: In units of J.
        most: Edges followed, those that end a text included, after which a search is given up.
    """
    plans = decoder.plan_many(prompts, Budget(pops=most, target=target))
    if any(plan.stop_reason == "interrupted" for plan in plans):
        raise KeyboardInterrupt
    return np.array([p.usage.lm_tokens if p.stop_reason == "target" else np.inf for p in plans], dtype=np.float64)


def side_by_side(
    decoders: Mapping[str, Callable[[DecodingMDP], Decoder]],
    mdp: DecodingMDP,
    prompts: Any,
    budget: Budget | int | None = None,
    *,
    progress: Callable[[Search, str], None] | None = None,
) -> dict[str, list[Outcomes]]:
    """Decode each prompt with every decoder, each time on an empty tree, so that no decoder saves another's seconds.

    Args:
        decoders: Functions from an MDP to a decoder, by name.
        mdp: The process that all decode in.
        prompts: See :func:`~qstar_decoding.envs.load_prompts`.
        budget: Of each prompt; an integer means LM tokens.
        progress: Called after every step of a search, with the search and the decoder and prompt as a text.

    Returns:
        Of each decoder one outcome a prompt.
    """
    outcomes: dict[str, list[Outcomes]] = {name: [] for name in decoders}
    for prompt in load_prompts(prompts):
        for name, make in decoders.items():
            label = f"{name}: {prompt.text}"
            show = None if progress is None else functools.partial(_labelled, progress, label)
            outcomes[name].append(evaluate(make(mdp.with_empty_tree()), [prompt], budget, progress=show))
    return outcomes


def _labelled(progress: Callable[[Search, str], None], label: str, search: Search) -> None:
    progress(search, label)


def mean_figures(outcomes: Sequence[Outcomes]) -> dict[str, float]:
    """Return means over all prompts, rounded to 4 digits: reward, logprob (nats), objective, lm_tokens, seconds.

    Texts that cannot be scored are left out of ``reward`` and ``objective``.
    """
    plans = [plan for found in outcomes for plan in found.plans]
    means = {
        "reward": np.nanmean(np.concatenate([found.rewards for found in outcomes])),
        "logprob": np.mean([plan.logprob for plan in plans]),
        "objective": np.nanmean(np.concatenate([found.objectives for found in outcomes])),
        "lm_tokens": np.mean([plan.usage.lm_tokens for plan in plans]),
        # Searches that were run together share their seconds.
        "seconds": np.mean([plan.usage.seconds for plan in plans]),
    }
    return {name: round(float(value), 4) for name, value in means.items()}


def paired_bootstrap(
    differences: Sequence[float] | Values, *, samples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Return the 95 % percentile interval of the mean of paired differences, resampling the prompts.

    Efron & Tibshirani 1993, chapter 13; for decoders, Koehn 2004.

    Args:
        differences: [prompts], one decoder minus the other on the same prompt.
        samples: Number of resamples.
        seed: Of the resampling.
    """
    rng, values = np.random.default_rng(seed), np.asarray(differences, dtype=np.float64)
    means = rng.choice(values, size=(samples, len(values))).mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
