"""The Gymnasium environment ``TokenDecoding-v0``: text generation, one token per step."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Sequence
from typing import Any, cast

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from ..checks import check_flag, check_keywords, check_number
from ..errors import ConfigurationError
from ..models.base import LanguageModel
from ..rewards.composition import term_weights
from .episodes import Episodes, EpisodeState
from .observations import Observation, Observer
from .prompts import load_prompts, prompt_of_options
from .rendering import Screen
from .steps import make_process, process_arguments

__all__ = ["TokenDecodingEnv", "environment_arguments"]


class TokenDecodingEnv(gym.Env[Observation, np.int64]):
    """Generate a completion, one token per step, and be rewarded for the quality of the finished text.

    ## Description
    A frozen language model π proposes the k most likely next tokens, and the agent picks one. The environment is the
    deterministic Markov decision process (S, A, P, R, γ) of :class:`~qstar_decoding.envs.mdp.DecodingMDP`:

    - S: a prompt x and the tokens y_1 … y_t generated so far, t < T = ``max_new_tokens``; and one state after the end.
    - A: the ranks 0 … k - 1 in the list of the most likely next tokens, less the masked ones.
    - P: the token of the chosen rank is appended, with probability 1.
    - R: α · log π(y_t | x, y_<t) for every token, and r(x, y) for the finished text; see Rewards.
    - γ: 1, as the horizon T is finite.

    The undiscounted return of an episode is J(y | x) = α · Σ_t log π(y_t | x, y_<t) + r(x, y), which planners and
    learners maximise. A reward model r is pluggable.

    ## Action Space
    ``Discrete(k)``: the rank of the next token, 0 = most likely. ``info["action_mask"]`` and :meth:`action_masks` say
    which actions are legal. An illegal action raises an error and leaves the state as it was.

    ## Observation Space
    A ``Dict`` of arrays, where d is the model's hidden size, e is ``candidate_dims``, w is ``context_tokens``, and r
    the number of the reward's terms. With w = 0, the default, there is no ``context``. Without ``components``, r = 0.

    | Key               | Shape  | Dtype   | Range       | Meaning                                                 |
    |-------------------|--------|---------|-------------|---------------------------------------------------------|
    | `hidden`          | (d,)   | float32 | [-√d, √d]   | the last hidden state, scaled to root mean square 1     |
    | `candidates`      | (k·e,) | float32 | bounded     | the k candidates' embeddings, projected to e dimensions |
    | `context`         | (w·e,) | float32 | bounded     | the last w tokens' embeddings, projected likewise       |
    | `logprobs`        | (k,)   | float32 | [-50, 0]    | the candidates' log-probabilities, nats                 |
    | `potential`       | (1,)   | float32 | bounds of r | φ(s), the reward model's score of the unfinished text   |
    | `term_potentials` | (r,)   | float32 | bounded     | φ(s) of each term of the reward                         |
    | `weights`         | (1+r,) | float32 | bounded     | α, and the weight of each term of the reward            |
    | `remaining`       | (1,)   | float32 | [0, 1]      | share of the horizon that is left                       |
    | `action_mask`     | (k,)   | int8    | {0, 1}      | 1 = the action is legal                                 |

    After the end every array is 0, except ``action_mask``, which is 1.

    ## Starting State
    A prompt drawn uniformly from ``prompts``, with no token generated. ``reset(options={"prompt": …})`` starts from a
    given prompt instead.

    ## Rewards
    - Every step: α · log π of its token (α = ``logprob_weight``).
    - Last step, in addition: r(x, y); 0 where the reward model gives no score.
    - With ``shaping``, every step in addition: γ · φ(s') - φ(s), where φ(s') = 0 at the end (Ng, Harada & Russell
      1999). The return becomes J - φ(prompt), and the optimal policy stays the same.

    ## Episode End
    - Termination:
        1. An end-of-sequence token is chosen.
        2. The text contains a stop string; the completion ends before it.
        3. T tokens have been generated. The horizon is part of the MDP, since ``remaining`` is observed.
    - Truncation: never. Wrappers such as ``TimeLimit`` may truncate.

    ## Information
    ``reset()`` returns a dict with these keys:

    - `action_mask`: int8 [k], 1 = legal.
    - `prompt`: the prompt as text.

    ``step()`` returns a dict with these keys:

    - `action_mask`: int8 [k], 1 = legal.
    - `token`, `token_text`: the appended token's id and text.
    - `logprob`: its log-probability, nats.

    The last step adds these keys:

    - `completion`: the finished text.
    - `stop`: `"eos"`, `"stop"` or `"length"`.
    - `reward`: r(x, y), None where there is no score.
    - `rewards`: the parts of a composed reward, by name.
    - `objective`: J(y | x), None where there is no score.

    ## Arguments
    ```python
    import gymnasium as gym
    gym.make(
        "TokenDecoding-v0",
        model="smollm2-135m-instruct",
        prompts=None,
        reward="sentiment",
        top_k=8,
        top_p=1.0,
        max_new_tokens=24,
        stop=None,
        logprob_weight=0.02,
        shaping=True,
        gamma=1.0,
        candidate_dims=32,
        context_tokens=0,
        components=False,
        action="token",
    )
    ```

    ``__init__`` describes these, and :class:`~qstar_decoding.envs.mdp.DecodingMDP` the further ones. With
    ``action="step"`` an action is a whole step; see :class:`~qstar_decoding.envs.steps.StepMDP`.

    ## Version History
    - v0: Initial release.
    """

    metadata: dict[str, Any] = {"render_modes": ["ansi", "human", "rgb_array"], "render_fps": 4}  # noqa: RUF012

    def __init__(
        self,
        model: str | os.PathLike[str] | LanguageModel = "smollm2-135m-instruct",
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
        context_tokens: int = 0,
        components: bool = False,
        render_mode: str | None = None,
        action: str = "token",
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
            logprob_weight: α, the weight of a nat of log-probability against the reward.
            shaping: Whether every step pays the change of the potential as well.
            gamma: Discount of the shaping term. Any value but 1 is for experiments: a warning says so.
            candidate_dims: Numbers per candidate token in the observation.
            context_tokens: How many of the last tokens, the prompt's among them, are in the observation. Pays where the
                answer hangs on exact tokens that the hidden state blurs, such as the digits of a sum. A token costs e
                numbers in the observation and 4 bytes in the experience of ``QStar``.
            components: Whether the terms of the reward, a weighted sum, are in the observation one by one. ``QStar``
                then learns the return of each term, and a search may weigh the terms otherwise without training. A
                term costs 2 numbers in the observation, and 8 + 4·k bytes in the experience.
            render_mode: None, ``"ansi"`` (a string), ``"human"`` (printed) or ``"rgb_array"`` (a picture).
            action: ``"token"``, or ``"step"`` for whole steps, see :class:`~qstar_decoding.envs.steps.StepMDP`.
            mdp_kwargs: ``constraint``, ``device``, ``dtype``, ``hidden_layers``, …; see :class:`DecodingMDP`.

        Raises:
            ConfigurationError: An argument is out of range, or a name is unknown.
            PromptError: There is no usable prompt.
        """
        check_keywords("TokenDecoding-v0", mdp_kwargs, environment_arguments())
        self.gamma = check_number("gamma", gamma, low=0, high=1, open_low=True)
        if self.gamma != 1 and shaping:
            warnings.warn(
                f"gamma={self.gamma}: the shaped rewards of an episode no longer sum to J; use gamma=1, as planners do",
                stacklevel=2,
            )
        if render_mode not in (None, *self.metadata["render_modes"]):
            modes = ", ".join(map(repr, self.metadata["render_modes"]))
            raise ConfigurationError(f"render_mode is None or one of {modes}; got {render_mode!r}")
        self.prompts = load_prompts(prompts)
        self.mdp = make_process(
            model,
            action=action,
            reward=reward,
            top_k=top_k,
            top_p=top_p,
            max_new_tokens=max_new_tokens,
            stop=stop,
            logprob_weight=logprob_weight,
            **mdp_kwargs,
        )
        for prompt in self.prompts:
            self.mdp.encode(prompt)  # reports a prompt that is too long before a training begins
        terms = term_weights(self.mdp.reward) if check_flag("components", components) else {}
        self.observer = Observer(self.mdp, candidate_dims, context_tokens, terms)
        self.shaping, self.render_mode = check_flag("shaping", shaping), render_mode
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
        prompt = prompt_of_options(options)
        if prompt is None:
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

    def render(self) -> Any:
        """Show the prompt, the text so far, and the candidates with their probabilities.

        Returns:
            A string (``"ansi"``), a picture, uint8 [H, W, 3] (``"rgb_array"``), or None.
        """
        if self.render_mode is None:
            gym.logger.warn("render() needs a render_mode: gym.make(…, render_mode='ansi', 'human' or 'rgb_array')")
            return None
        return Screen.of(self.mdp, self._episodes).show(self.render_mode)

    # -- beyond Gymnasium's interface ---------------------------------------------------------------------------------

    def action_masks(self) -> npt.NDArray[np.bool_]:
        """Return the legal actions, bool [k]; the convention of sb3-contrib."""
        mask: npt.NDArray[np.bool_] = self._episodes.action_masks()[0]
        return mask

    def get_state(self) -> EpisodeState:
        """Return the state of the episode, for :meth:`set_state`.

        Its size does not depend on the length of the text. The random generator of prompts is not included.
        """
        return self._episodes.get_state()

    def set_state(self, state: EpisodeState) -> None:
        """Restore ``state``; the same one can be restored any number of times.

        Raises:
            ConfigurationError: It is not a state of this environment.
        """
        self._episodes.set_state(state)


def environment_arguments() -> list[str]:
    """Return the names of all arguments of ``gym.make("TokenDecoding-v0", …)``."""
    own = inspect.signature(TokenDecodingEnv).parameters
    return list(dict.fromkeys([*own, *process_arguments()]).keys() - {"mdp_kwargs"})


def _first(batch: Observation) -> Observation:
    return {key: value[0] for key, value in batch.items()}
