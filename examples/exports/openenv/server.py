"""A server of OpenEnv for ``TokenDecoding-v0``, a session a client: ``uvicorn server:app --port 8000``."""

import os
from functools import partial

from openenv.core.env_server import Action, Environment, Observation, State, create_fastapi_app

from qstar_decoding.agents import Request, SearchEngine
from qstar_decoding.envs import TokenDecodingEnv
from qstar_decoding.tasks import load_task

TASK = load_task(os.environ.get("QSTAR_TASK", "sentiment"))


class TokenAction(Action):
    action: int  # rank among the candidates, 0 is the most likely


class TokenObservation(Observation):
    prompt: str
    text: str
    candidates: list[str]
    logprobs: list[float | None]  # nats; None where the candidate may not be taken
    reference: str | None = None  # the text that a search of `plan_tokens` LM tokens finds


class TokenDecoding(Environment[TokenAction, TokenObservation, State]):
    SUPPORTS_CONCURRENT_SESSIONS = True  # threads take turns with the language model, step by step

    def __init__(self, model, engine):
        super().__init__()
        self.env = TokenDecodingEnv(**{**TASK.env, "model": model}, prompts=TASK.prompts.of("train"))
        self.engine, self._state = engine, State()

    def reset(self, seed=None, episode_id=None, prompt=None, plan_tokens=0, **_):
        seen, info = self.env.reset(seed=seed, options=None if prompt is None else {"prompt": prompt})
        self._state, self._prompt, self._text = State(episode_id=episode_id), info["prompt"], ""
        plan = self.engine.submit(Request(self._prompt, plan_tokens)).result() if plan_tokens else None
        return self._observation(seen, reference=plan and plan.text)

    def step(self, action, timeout_s=None, **_):
        seen, reward, done, _, info = self.env.step(action.action)
        self._state.step_count, self._text = self._state.step_count + 1, self._text + info["token_text"]
        facts = {key: value for key, value in info.items() if isinstance(value, (str, float))}
        return self._observation(seen, reward=float(reward), done=done, metadata=facts)

    def _observation(self, seen, **more):
        listed = [] if more.get("done") else self.env.mdp.tree.tokens[self.env.get_state().node[0]]
        tokens = [self.env.mdp.token_text(int(token)) for token in listed]
        logprobs = [float(seen["logprobs"][i]) if seen["action_mask"][i] else None for i in range(len(tokens))]
        return TokenObservation(prompt=self._prompt, text=self._text, candidates=tokens, logprobs=logprobs, **more)

    @property
    def state(self):
        return self._state


MDP = TASK.mdp()
app = create_fastapi_app(partial(TokenDecoding, MDP.model, SearchEngine(MDP)), TokenAction, TokenObservation, 16)
