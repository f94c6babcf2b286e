"""``TokenDecoding-v0``: text generation as a Gymnasium environment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from ..checks import check_number
from ..errors import ConfigurationError
from ..models.base import LanguageModel
from .episodes import Episodes, EpisodeState
from .mdp import DecodingMDP
from .observations import Observation, Observer
from .prompts import as_prompt, load_prompts

__all__ = ["TokenDecodingEnv"]


class TokenDecodingEnv(gym.Env[Observation, np.int64]):
    """Generate a completion, one token per step, and be rewarded for how good it is.

    ## Description
    A frozen language model π proposes the k most likely next tokens; the agent picks one. The completion y of a prompt
    x is worth J(y | x) = α · Σ log π(y_t | x, y_<t) + r(x, y), with a pluggable reward model r. The MDP is
    deterministic and has a finite horizon T = ``max_new_tokens``; the discount is 1.

    ## Action Space
    ``Discrete(k)``: a rank in the list of the most likely next tokens, 0 = most likely. ``info["action_mask"]`` and
    :meth:`action_masks` say which may be taken; another one is an error and leaves the state as it was.

    ## Observation Space
    A ``Dict``; see :class:`~qstar_decoding.envs.observations.Observer`.

    ## Starting State
    A prompt drawn uniformly from ``prompts``, or the one given as ``reset(options={"prompt": …})``.

    ## Rewards
    Each step pays α · log π of its token, and the last one r(x, y) besides. With ``shaping`` it pays
    γ · φ(s') - φ(s) as well (Ng, Harada & Russell 1999), φ being the reward model's score of the unfinished text and 0
    at the end: the return is then J - φ(empty prefix), and the optimal policy the same.

    ## Episode End
    Terminated by an end-of-sequence token, a stop string or the horizon, which is part of the MDP (``remaining`` is
    observed). Never truncated; that is left to wrappers.

    ## Information
    Every step: ``action_mask`` int8 [k], ``token``, ``token_text``, ``logprob`` (nats). The last one also
    ``completion``, ``reward`` (r), ``rewards`` (what r is made of, by name), ``objective`` (J), ``stop`` (``"eos"``,
    ``"stop"`` or ``"length"``).
    ``reset`` gives ``action_mask`` and ``prompt``.

    ## Arguments
    See ``__init__``.

    ## Version History
    * v0: first version.
    """

    metadata: dict[str, Any] = {"render_modes": ["ansi", "human"], "render_fps": 4}  # noqa: RUF012 as Gymnasium declares it

    def __init__(
        self,
        model: str | LanguageModel = "smollm2-135m-instruct",
        *,
        prompts: Any = None,
        reward: Any = "sentiment",
        top_k: int = 8,
        top_p: float = 1.0,
        max_new_tokens: int = 24,
        stop: str | Sequence[str] | None = None,
        logprob_weight: float = 0.02,
        shaping: bool = True,
        gamma: float = 1.0,
        candidate_dims: int = 32,
        render_mode: str | None = None,
        **mdp_kwargs: Any,
    ) -> None:
        """Make the environment.

        Args:
            model: A known name, hub id, local folder, or a :class:`LanguageModel`.
            prompts: Where episodes start; see :func:`~qstar_decoding.envs.prompts.load_prompts`.
            reward: A registered name, a weighted sum, any callable, or a Reward;
                see :func:`~qstar_decoding.rewards.as_reward`.
            top_k: Number of actions.
            top_p: Mask actions outside the smallest set of tokens with this probability.
            max_new_tokens: The horizon, in tokens.
            stop: Strings that end a completion.
            logprob_weight: α, how much fluency (nats) counts against the reward.
            shaping: Pay the change of the potential on the way.
            gamma: The discount used in the shaping term; 1 by default, as the horizon is finite.
            candidate_dims: Numbers per candidate token in the observation.
            render_mode: None, ``"ansi"`` (a string) or ``"human"`` (printed).
            mdp_kwargs: ``device``, ``dtype``, ``kv_budget``, ``hidden_layers``, …; see :class:`DecodingMDP`.

        Raises:
            ConfigurationError: An argument is out of range or a name unknown.
            PromptError: There is no usable prompt.
        """
        self.gamma = check_number("gamma", gamma, low=0, high=1, open_low=True)
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ConfigurationError(f"render_mode is None, 'ansi' or 'human', got {render_mode!r}")
        self.prompts = load_prompts(prompts)
        self.mdp = DecodingMDP(
            model,
            reward=reward,
            top_k=top_k,
            top_p=top_p,
            max_new_tokens=max_new_tokens,
            stop=stop,
            logprob_weight=logprob_weight,
            **mdp_kwargs,
        )
        for prompt in self.prompts:
            self.mdp.encode(prompt)  # too long a prompt is better told now than in the middle of a training
        self.observer = Observer(self.mdp, candidate_dims)
        self.shaping, self.render_mode = bool(shaping), render_mode
        self.observation_space = cast("spaces.Space[Observation]", self.observer.space)
        self.action_space = spaces.Discrete(self.mdp.top_k)
        self._episodes = Episodes(self.mdp, self.observer, 1, shaping=self.shaping, gamma=self.gamma)

    # -- Gymnasium's interface ----------------------------------------------------------------------------------------

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start a completion of a random prompt, or of ``options["prompt"]``.

        Raises:
            PromptError: The given prompt is empty, too long, or not a prompt.
            ConfigurationError: There are other keys in ``options``.
        """
        super().reset(seed=seed)
        if unknown := set(options or {}) - {"prompt"}:
            raise ConfigurationError(f"reset's options may hold 'prompt', not {sorted(unknown)}")
        if options:
            prompt = as_prompt(options["prompt"])
        else:
            prompt = self.prompts[int(self.np_random.integers(len(self.prompts)))]
        observation = _first(self._episodes.begin([0], [prompt]))
        if self.render_mode == "human":
            self.render()
        return observation, {"action_mask": observation["action_mask"].copy(), "prompt": prompt.text}

    def step(self, action: Any) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Append the token of rank ``action``.

        Raises:
            EpisodeError: Before ``reset`` or after the end.
            IllegalActionError: The action is not an integer, out of range, or masked; nothing has changed.
            RewardError: The reward model failed; nothing has changed.
        """
        steps = self._episodes.step([action])
        if self.render_mode == "human":
            self.render()
        observation = _first(steps.observation)
        info = self._episodes.token_info(steps, 0) | {"action_mask": observation["action_mask"].copy()}
        return observation, float(steps.rewards[0]), bool(steps.terminated[0]), False, info

    def render(self) -> str | None:
        """Show the prompt, the text so far, and the candidates with their probabilities."""
        if self.render_mode is None:
            gym.logger.warn("render() needs a render_mode: gym.make(…, render_mode='ansi' or 'human')")
            return None
        screen = self._screen()
        if self.render_mode == "ansi":
            return screen
        print(screen, end="\n\n")
        return None

    # -- beyond Gymnasium's interface ---------------------------------------------------------------------------------

    def action_masks(self) -> npt.NDArray[np.bool_]:
        """Return which actions may be taken now, bool [k]; sb3-contrib's convention."""
        mask: npt.NDArray[np.bool_] = self._episodes.action_masks()[0]
        return mask

    def get_state(self) -> EpisodeState:
        """Return where the episode stands, to come back to with :meth:`set_state`: for planners and tree searches.

        It costs the same whatever the length of the text. The random numbers that choose prompts are no part of it.
        """
        return self._episodes.get_state()

    def set_state(self, state: EpisodeState) -> None:
        """Go back, or over, to ``state``; the same one can be used as often as needed.

        Raises:
            ConfigurationError: It is no state, or one of another environment.
        """
        self._episodes.set_state(state)

    # -----------------------------------------------------------------------------------------------------------------

    def _screen(self) -> str:
        prompt, node, end = self._episodes.prompt[0], int(self._episodes.node[0]), self._episodes.ended[0]
        if prompt is None:
            return "(before reset)"
        lines = [f"prompt      {prompt.text!r}"]
        if end is not None:
            return "\n".join(
                [
                    *lines,
                    f"completion  {end.text!r}",
                    f"finished    {end.stop}: reward {end.reward:.3f}, log-prob {end.logprob:.2f} nats, "
                    f"J {end.objective:.3f}",
                ]
            )
        tree = self.mdp.tree
        lines += [
            f"completion  {self.mdp.text(node)!r}",
            f"remaining   {int(self.mdp.remaining(np.array([node]))[0])} of {self.mdp.max_new_tokens} tokens",
        ]
        for rank, legal in enumerate(self.action_masks()):
            text = self.mdp.token_text(int(tree.tokens[node, rank]))
            lines.append(
                f"  {rank:>3}  {np.exp(tree.logprobs[node, rank]):6.1%}  {text!r}{'' if legal else '  masked'}"
            )
        return "\n".join(lines)


def _first(batch: Observation) -> Observation:
    return {key: value[0] for key, value in batch.items()}
