"""Masked Q-learning: MaskableDQN, MaskableQRDQN, their replay buffer; the policies' dueling and quantile variants."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit
from hypothesis import given, settings
from hypothesis import strategies as st
from sb3_contrib import QRDQN
from sb3_contrib.common.maskable.callbacks import MaskableEvalCallback
from sb3_contrib.common.maskable.evaluation import evaluate_policy
from sb3_contrib.common.wrappers import ActionMasker
from stable_baselines3 import DQN
from stable_baselines3.common.buffers import DictReplayBuffer, ReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

import qstar_decoding  # noqa: F401  registers the environment
from qstar_decoding.agents import (
    AStarPlanner,
    MaskableDQN,
    MaskableQRDQN,
    MaskedReplayBuffer,
    QHeuristic,
    QStar,
    TokenQPolicy,
    TokenQuantilePolicy,
)
from qstar_decoding.agents.learning.policies import TokenScorer
from qstar_decoding.envs import TabularLM, TokenDecodingVecEnv
from qstar_decoding.errors import ConfigurationError, TrainingDivergedError
from qstar_decoding.rewards import as_reward

AGENTS = [MaskableDQN, MaskableQRDQN]
SMALL = {"learning_starts": 20, "buffer_size": 500, "train_freq": 2, "seed": 0, "device": "cpu"}
SIZE, ACTIONS = 7, 5


def legal(state):
    """Return which actions may be taken in a state: other ones in each, one at the least."""
    return np.array([(state * 3 + a) % 5 < 2 or a == state % ACTIONS for a in range(ACTIONS)])


class Walk(gym.Env):
    """States on a ring; action a goes a + 1 on, and arriving at 0 ends the episode. Illegal actions are counted."""

    def __init__(self, as_dict=False, endless=False, tells=True):
        box = spaces.Box(0.0, 1.0, (SIZE,), np.float32)
        self.as_dict, self.endless, self.tells = as_dict, endless, tells
        self.observation_space = spaces.Dict({"at": box, "index": spaces.Discrete(SIZE)}) if as_dict else box
        self.action_space = spaces.Discrete(ACTIONS)
        self.violations, self.taken = 0, set()

    def action_masks(self):
        return legal(self.state)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = int(self.np_random.integers(1, SIZE))
        return self._observation(), {}

    def step(self, action):
        self.violations += not legal(self.state)[action]
        self.taken.add((self.state, int(action)))
        self.state = (self.state + int(action) + 1) % SIZE
        ended = self.state == 0 and not self.endless
        info = {"action_mask": legal(self.state)} if self.tells else {}
        return self._observation(), float(self.state) / SIZE, ended, False, info

    def _observation(self):
        at = np.eye(SIZE, dtype=np.float32)[self.state]
        return {"at": at, "index": self.state} if self.as_dict else at


class WithoutMasks(gym.Wrapper):
    """Hides ``action_masks()``."""

    def get_wrapper_attr(self, name):
        if name == "action_masks":
            raise AttributeError(name)
        return super().get_wrapper_attr(name)


def policy_of(env):
    return "MultiInputPolicy" if isinstance(env.observation_space, spaces.Dict) else "MlpPolicy"


def kwargs_of(agent_class):
    return {"net_arch": [16], **({"n_quantiles": 8} if agent_class is MaskableQRDQN else {})}


def make_agent(agent_class, env, **kwargs):
    return agent_class(policy_of(env), env, policy_kwargs=kwargs_of(agent_class), **{**SMALL, **kwargs})


def linear_agent(agent_class, env, online, target, **kwargs):
    """Return an agent whose networks are the given tables [SIZE, ACTIONS], and which does not change them."""
    policy_kwargs = {"net_arch": [], **({"n_quantiles": 1} if agent_class is MaskableQRDQN else {})}
    agent = agent_class(policy_of(env), env, learning_rate=0.0, policy_kwargs=policy_kwargs, **{**SMALL, **kwargs})
    name = "quantile_net" if agent_class is MaskableQRDQN else "q_net"
    for network, table in ((getattr(agent, name), online), (getattr(agent, f"{name}_target"), target)):
        (layer,) = getattr(network, name)
        with torch.no_grad():
            layer.weight[:] = torch.as_tensor(np.asarray(table).T)
            layer.bias[:] = 0.0
    agent.set_logger(configure(None, []))
    return agent


# -- acting -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_dict", [False, True])
@pytest.mark.parametrize("agent_class", AGENTS)
def test_no_illegal_action_is_ever_taken_and_every_legal_one_is(agent_class, as_dict):
    walks = [Walk(as_dict) for _ in range(3)]
    # ActionMasker and Monitor outside, as users have them.
    masker = [ActionMasker(walk, lambda env: env.unwrapped.action_masks()) for walk in walks]
    env = DummyVecEnv([lambda w=w: Monitor(TimeLimit(w, 5)) for w in masker])
    agent = make_agent(agent_class, env, exploration_fraction=0.8, n_steps=2).learn(1500)
    assert agent._n_updates > 200
    evaluate_policy(agent, env, 10)
    assert sum(walk.violations for walk in walks) == 0
    everything = {(s, a) for s in range(1, SIZE) for a in np.flatnonzero(legal(s)).tolist()}
    assert set.union(*(walk.taken for walk in walks)) == everything


def test_a_plain_dqn_takes_illegal_actions_in_the_same_environment():
    walk = Walk()
    DQN("MlpPolicy", walk, **SMALL).learn(300)
    assert walk.violations > 50  # so that the test above can fail


@pytest.mark.parametrize("agent_class", AGENTS)
def test_the_greedy_action_is_the_best_legal_one(agent_class):
    table = np.tile([5.0, 4.0, 3.0, 2.0, 1.0], (SIZE, 1))
    agent = linear_agent(agent_class, Walk(), table, table)
    observations = np.eye(SIZE, dtype=np.float32)
    masks = np.array([legal(s) for s in range(SIZE)])
    actions, _ = agent.predict(observations, deterministic=True, action_masks=masks)
    np.testing.assert_array_equal(actions, masks.argmax(axis=1))
    assert set(actions) != {0}
    action, state = agent.predict(observations[3], "state", deterministic=True, action_masks=masks[3])
    assert action == actions[3]
    assert (action.shape, state) == ((), "state")
    assert (agent.predict(observations, deterministic=True)[0] == 0).all()  # without masks everything may be done


@pytest.mark.parametrize("agent_class", AGENTS)
def test_exploration_is_tossed_per_environment_and_uniform_over_legal_actions(agent_class):
    table = np.tile([0.0, 0.0, 0.0, 0.0, 1.0], (SIZE, 1))
    agent = linear_agent(agent_class, Walk(), table, table)
    agent.exploration_rate = 0.5
    torch.manual_seed(0)
    mask = np.array([True, True, False, True, True])
    observations, masks = np.zeros((400, SIZE), np.float32), np.tile(mask, (400, 1))
    observations[:, 2] = 1.0
    counts = np.bincount(agent.predict(observations, action_masks=masks)[0], minlength=ACTIONS)
    assert counts[2] == 0
    # 50 expected for each other legal action, 250 for the greedy one; stable-baselines3's coin gives (0, 400) or 100s.
    assert all(25 < counts[a] < 80 for a in (0, 1, 3))
    assert 210 < counts[4] < 290


def test_masks_in_a_dict_observation_hold_where_none_are_given():
    env = make_token_env(top_p=0.7, prompts=["a"])
    agent = MaskableDQN(TokenQPolicy, env, **SMALL)
    agent.exploration_rate = 1.0
    vec = agent.get_env()
    observation = vec.reset()
    mask = observation["action_mask"][0].astype(bool)
    assert not mask.all()
    batch = {key: np.repeat(value, 50, axis=0) for key, value in observation.items()}
    assert set(agent.predict(batch)[0]) == set(np.flatnonzero(mask))
    agent.policy.set_training_mode(False)
    with torch.no_grad():
        agent.q_net.scorer.direct.weight[0, 0] = -10.0  # now it is the unlikeliest token that it likes best
    assert mask[agent.predict(observation, deterministic=True)[0]].all()
    other = np.ones_like(mask)
    assert not mask[agent.predict(observation, deterministic=True, action_masks=other)[0]].all()


# -- learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_steps", [1, 3])
@pytest.mark.parametrize("agent_class", AGENTS)
def test_the_bellman_target_takes_the_best_legal_next_action(agent_class, n_steps):
    rng = np.random.default_rng(0)
    online, target = rng.normal(size=(2, SIZE, ACTIONS)).astype(np.float32)
    target[n_steps, ~legal(n_steps)] += 10.0  # where the target looks, what may not be taken would be the best
    agent = linear_agent(agent_class, Walk(), online, target, gamma=0.9, n_steps=n_steps)
    rows, action, rewards = np.eye(SIZE, dtype=np.float32), 3, [0.5, -0.25, 2.0]
    for t in range(n_steps):
        info = {"action_mask": legal(t + 1)}
        step = rows[t : t + 1], rows[t + 1 : t + 2], np.array([action]), np.array([rewards[t]]), np.array([False])
        agent.replay_buffer.add(*step, [info])
    agent.replay_buffer.valid[1:] = False  # so that the first step is the only one to sample
    agent.train(1, batch_size=4)
    value = target[n_steps][legal(n_steps)].max()
    wanted = sum(0.9**t * rewards[t] for t in range(n_steps)) + 0.9**n_steps * value
    error = wanted - online[0, action]
    huber = 0.5 * error**2 if abs(error) < 1 else abs(error) - 0.5
    loss = huber if agent_class is MaskableDQN else 0.5 * huber  # one quantile, the median: weight |0.5 - 1(error<0)|
    assert agent.logger.name_to_value["train/loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("tells", [False, True])
@pytest.mark.parametrize("agent_class", AGENTS)
def test_masks_in_replay_are_those_of_the_next_states_also_of_truncated_ones(agent_class, tells):
    # What a truncated state allows, only the info can tell; all others are asked for.
    limit = 3 if tells else 1000
    env = DummyVecEnv([lambda: Monitor(TimeLimit(Walk(as_dict=True, tells=tells), limit)) for _ in range(2)])
    agent = make_agent(agent_class, env, n_steps=2, buffer_size=60).learn(200)
    batch = agent.replay_buffer.sample(500)
    following = batch.next_observations["at"].argmax(dim=1).numpy()
    done = batch.dones[:, 0].numpy() > 0
    np.testing.assert_array_equal(batch.next_observations["index"][~done, 0], following[~done])
    masks = np.array([legal(s) for s in following])
    np.testing.assert_array_equal(batch.next_action_masks.numpy()[~done], masks[~done])
    assert batch.next_action_masks[done].all()
    assert 0 < done.sum() < 500
    # Each action leads where the rules say, so no transition crosses an episode's end.
    first = batch.observations["at"].argmax(dim=1).numpy()
    one_step = np.isclose(batch.discounts[:, 0], 0.99) & ~done
    np.testing.assert_array_equal(following[one_step], ((first + batch.actions[:, 0].numpy() + 1) % SIZE)[one_step])
    assert one_step.any()


@pytest.mark.parametrize("agent_class", AGENTS)
def test_it_learns_the_optimum_over_legal_actions(agent_class):
    class Corridor(gym.Env):
        """Doors in a row, one key each; the illegal actions pay at once and end the episode."""

        observation_space, action_space = spaces.Box(0, 1, (5,), np.float32), spaces.Discrete(4)

        def action_masks(self):
            return np.array([False, True, True, False])

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            self.room = 0
            return np.eye(5, dtype=np.float32)[0], {}

        def step(self, action):
            assert action in (1, 2)
            self.room += int(action == 1 + self.room % 2)
            return np.eye(5, dtype=np.float32)[self.room], float(self.room == 4), self.room == 4, False, {}

    env = TimeLimit(Corridor(), 12)
    settings = {**SMALL, "learning_rate": 2e-3, "gamma": 0.9, "target_update_interval": 100, "n_steps": 2}
    agent = agent_class("MlpPolicy", env, policy_kwargs=kwargs_of(agent_class), **settings).learn(1200)
    rewards, lengths = evaluate_policy(agent, env, 3, warn=False, return_episode_rewards=True)
    assert (rewards, lengths) == ([1.0] * 3, [4] * 3)  # a random legal agent needs 8 steps on average
    values = agent._online(torch.eye(5)[:4]).detach().mean(dim=1)
    best = torch.tensor([values[room, 1 + room % 2] for room in range(4)])
    torch.testing.assert_close(best, torch.tensor([0.9**3, 0.9**2, 0.9, 1.0]), atol=0.12, rtol=0.0)


@pytest.mark.parametrize("agent_class", AGENTS)
def test_a_loss_that_is_not_finite_stops_training_and_leaves_the_network(agent_class):
    class Broken(Walk):
        def step(self, action):
            observation, _, *rest = super().step(action)
            return observation, np.inf, *rest

    agent = make_agent(agent_class, Broken())
    with pytest.raises(
        TrainingDivergedError, match=r"the loss became (inf|nan) after 0 updates; lower the learning rate"
    ):
        agent.learn(100)
    assert all(parameter.isfinite().all() for parameter in agent.policy.parameters())


# -- stable-baselines3's interface ------------------------------------------------------------------------------------


@pytest.mark.parametrize("agent_class", AGENTS)
def test_a_saved_agent_is_the_same_and_goes_on(agent_class, tmp_path):
    env = Walk(as_dict=True)
    agent = make_agent(agent_class, env, n_steps=3, buffer_bytes=40_000, gamma=0.8).learn(200)
    agent.save(tmp_path / "agent")
    agent.save_replay_buffer(tmp_path / "replay")
    loaded = agent_class.load(tmp_path / "agent", env)
    loaded.load_replay_buffer(tmp_path / "replay")
    observation = {"at": np.eye(SIZE, dtype=np.float32), "index": np.arange(SIZE)}
    inputs = agent.policy.obs_to_tensor(observation)[0]
    torch.testing.assert_close(loaded._online(inputs), agent._online(inputs), rtol=0, atol=0)
    assert loaded.replay_buffer.size() == agent.replay_buffer.size() == 200
    buffer = loaded.replay_buffer
    assert (buffer.n_steps, buffer.gamma, buffer.nbytes) == (3, 0.8, agent.replay_buffer.nbytes)
    assert agent.n_steps == loaded.n_steps == 3
    loaded.learn(100, reset_num_timesteps=False)
    assert (loaded.num_timesteps, buffer.size()) == (300, 300)
    assert env.violations == 0
    assert agent_class.load(tmp_path / "agent").predict({k: v[0] for k, v in observation.items()})[0] in range(ACTIONS)
    fresh = agent_class.load(tmp_path / "agent", env, n_steps=2)
    assert fresh.replay_buffer.n_steps == 2


@pytest.mark.parametrize("agent_class", AGENTS)
def test_set_env_goes_on_in_the_other_environment(agent_class):
    one, other = Walk(), Walk()
    agent = make_agent(agent_class, one).learn(100)
    agent.set_env(other)
    agent.learn(100, reset_num_timesteps=False)
    assert agent.num_timesteps == 200
    assert other.taken
    assert other.violations == 0
    with pytest.raises(ConfigurationError, match=r"no action_masks\(\)"):
        agent.set_env(WithoutMasks(Walk()))
    assert agent.get_env().envs[0].unwrapped is other


@pytest.mark.parametrize("agent_class", AGENTS)
def test_callbacks_tensorboard_and_masked_evaluation(agent_class, tmp_path):
    class Stop(BaseCallback):
        def _on_step(self):
            return self.n_calls < 150

    evaluated = Walk()
    evaluation = MaskableEvalCallback(Monitor(TimeLimit(evaluated, 9)), eval_freq=50, n_eval_episodes=2, verbose=0)
    agent = make_agent(agent_class, Walk(), tensorboard_log=str(tmp_path))
    agent.learn(1000, callback=[evaluation, Stop()], log_interval=1)
    assert agent.num_timesteps == 150
    assert np.isfinite(evaluation.last_mean_reward)
    assert evaluated.violations == 0
    (run,) = tmp_path.iterdir()
    assert run.name == f"{agent_class.__name__}_1"
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logged = EventAccumulator(str(run)).Reload().Tags()["scalars"]
    assert {"train/loss", "rollout/exploration_rate", "rollout/ep_rew_mean", "eval/mean_reward"} <= set(logged)


def test_vec_normalize_normalises_what_is_sampled():
    env = VecNormalize(DummyVecEnv([lambda: Monitor(TimeLimit(Walk(), 9))] * 2), clip_obs=100.0)
    agent = make_agent(MaskableDQN, env, n_steps=2).learn(200)
    batch, plain = (agent.replay_buffer.sample(300, env=e) for e in (env, None))
    assert set(np.unique(plain.observations)) == {0.0, 1.0}
    assert batch.observations.min() < 0
    # A step's observations are recognised as one ring, although they reach the buffer before and after normalising.
    assert (plain.discounts < 0.985).float().mean() > 0.3


# -- the replay buffer ------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n_envs=st.integers(1, 3),
    rows=st.integers(2, 12),
    steps=st.integers(1, 40),
    n_steps=st.integers(1, 5),
    as_dict=st.booleans(),
    timeouts=st.booleans(),
)
def test_n_step_samples_equal_a_slow_reference(seed, n_envs, rows, steps, n_steps, as_dict, timeouts):
    rng, gamma, k = np.random.default_rng(seed), 0.9, 4
    box = spaces.Box(-np.inf, np.inf, (2,), np.float64)
    space = spaces.Dict({"x": box, "n": spaces.Discrete(10**6)}) if as_dict else box
    buffer = MaskedReplayBuffer(
        (rows - 1) * n_envs, space, spaces.Discrete(k), "cpu", n_envs,
        handle_timeout_termination=timeouts, n_steps=n_steps, gamma=gamma,
    )  # fmt: skip
    assert buffer.buffer_size == rows

    def observed(ids):
        x = np.stack([ids, np.ones(len(ids))], axis=1)  # observations differ in part only
        return {"x": x, "n": np.asarray(ids)} if as_dict else x

    # Every state has a number of its own; the reference is a list of steps per environment.
    fresh = iter(range(1, 10**6))
    history = [[] for _ in range(n_envs)]
    now = [next(fresh) for _ in range(n_envs)]
    used = np.zeros(n_envs, dtype=int)  # rows written, those that only end an episode too
    for _ in range(steps):
        cut = rng.random() < 0.1  # a reset from outside, between two calls of learn
        if cut:
            for i in range(n_envs):
                if history[i] and not history[i][-1]["done"]:
                    history[i][-1]["cut"] = True
            now = [next(fresh) for _ in range(n_envs)]
        after = [next(fresh) for _ in range(n_envs)]
        done, truncated = rng.random(n_envs) < 0.3, rng.random(n_envs) < 0.5
        masks = rng.random((n_envs, k)) < 0.5
        masks[np.arange(n_envs), rng.integers(k, size=n_envs)] = True
        given_mask = rng.random(n_envs) < 0.8
        actions, rewards = rng.integers(k, size=n_envs), rng.normal(size=n_envs).astype(np.float32)
        infos = [
            {
                "TimeLimit.truncated": bool(done[i] and truncated[i]),
                **({"action_mask": masks[i]} if given_mask[i] else {}),
            }
            for i in range(n_envs)
        ]
        buffer.add(observed(now), observed(after), actions, rewards, done, infos)
        for i in range(n_envs):
            if history[i] and (history[i][-1].get("cut") or (history[i][-1]["done"] and not history[i][-1]["over"])):
                used[i] += 1
            over = bool(done[i]) and not (timeouts and truncated[i])
            mask = masks[i] if given_mask[i] else np.ones(k, dtype=bool)
            history[i].append(
                {"id": now[i], "action": actions[i], "reward": rewards[i], "next": after[i], "done": bool(done[i]),
                 "over": over, "mask": mask, "row": used[i]}
            )  # fmt: skip
            used[i] += 1
        now = [next(fresh) if d else a for d, a in zip(done, after, strict=True)]

    # What is left: the rows of the last T, one of which is taken by where the newest step led to, if it led anywhere.
    left = {}
    for i in range(n_envs):
        end = used[i] + (not history[i][-1]["over"])
        for t, step in enumerate(history[i]):
            if step["row"] >= end - rows:
                left[step["id"]] = (i, t)
    torch.manual_seed(seed)
    batch = buffer.sample(60 * len(left))
    observations, following = (o["x"] if as_dict else o for o in (batch.observations, batch.next_observations))
    assert observations.dtype == torch.float64
    if as_dict:
        np.testing.assert_array_equal(batch.observations["n"][:, 0], observations[:, 0])
    assert {int(x) for x in observations[:, 0]} == set(left)
    assert buffer.size() == len(left) // n_envs
    for row, first in enumerate(observations[:, 0].int().tolist()):
        i, t = left[first]
        total, weight = 0.0, 1.0
        for step in history[i][t : t + n_steps]:
            total, weight = total + weight * step["reward"], weight * gamma
            if step["done"] or step.get("cut"):
                break
        assert batch.actions[row].item() == history[i][t]["action"]
        assert batch.rewards[row].item() == pytest.approx(total, abs=1e-5)
        assert batch.discounts[row].item() == pytest.approx(weight, abs=1e-6)
        assert batch.dones[row].item() == step["over"]
        if not step["over"]:
            assert following[row].tolist() == [step["next"], 1.0]
            assert batch.next_action_masks[row].tolist() == step["mask"].tolist()


def test_n_steps_stop_at_a_truncation_even_if_the_next_episode_begins_with_what_the_last_one_ended_with():
    buffer = MaskedReplayBuffer(3, spaces.Box(0, 1, (1,), np.float32), spaces.Discrete(2), n_steps=3, gamma=0.5)
    same, one = np.zeros((1, 1), dtype=np.float32), np.ones(1)
    for t in range(5):
        buffer.add(same, same, np.zeros(1), t * one, one > 0, [{"TimeLimit.truncated": True}])
    batch = buffer.sample(50)
    assert set(batch.discounts.flatten().tolist()) == {0.5}
    assert set(batch.rewards.flatten().tolist()) == {3.0, 4.0}  # of four rows, two are where the steps led to


def test_with_one_step_and_no_end_it_samples_what_stable_baselines3s_buffer_does():
    arguments = 40, spaces.Box(0, 1, (3,), np.float32), spaces.Discrete(2), "cpu", 2
    rng, ours, theirs = np.random.default_rng(0), MaskedReplayBuffer(*arguments), ReplayBuffer(*arguments)
    observation = rng.random((2, 3), dtype=np.float32)
    for _ in range(33):
        following = rng.random((2, 3), dtype=np.float32)
        step = observation, following, rng.integers(2, size=2), rng.random(2), np.zeros(2, dtype=bool), [{}, {}]
        ours.add(*step)
        theirs.add(*step)
        observation = following
    assert ours.size() == theirs.size() == 20

    def contents(batch):
        fields = (batch.observations, batch.actions, batch.rewards, batch.next_observations, batch.dones)
        return {tuple(row) for row in torch.cat([field.float() for field in fields], dim=1).tolist()}

    np.random.seed(0)  # noqa: NPY002  stable-baselines3's generator
    assert contents(ours.sample(1000)) == contents(theirs.sample(1000))


def test_the_buffer_is_sized_in_bytes_and_stores_observations_once():
    space = spaces.Dict(
        {"hidden": spaces.Box(-1, 1, (500,), np.float32), "image": spaces.Box(0, 255, (10, 10), np.uint8)}
    )
    buffer = MaskedReplayBuffer(10**9, space, spaces.Discrete(8), "cpu", 4, buffer_bytes=1_000_000)
    assert 0.99 * 1_000_000 < buffer.nbytes <= 1_000_000
    steps = (buffer.buffer_size - 1) * 4
    theirs = DictReplayBuffer(steps, space, spaces.Discrete(8), "cpu", 4)
    twice = sum(array.nbytes for part in (theirs.observations, theirs.next_observations) for array in part.values())
    assert buffer.nbytes < 0.52 * twice
    rng = np.random.default_rng(0)
    image = np.zeros((4, 10, 10), dtype=np.uint8)
    full = np.ones(4, dtype=bool)
    for t in range(steps):  # every episode is truncated after one step: the most there can be to keep
        hidden = rng.random((2, 4, 500), dtype=np.float32)
        observations = ({"hidden": h, "image": image + t % 7} for h in hidden)
        buffer.add(*observations, np.zeros(4), np.ones(4), full, [{"TimeLimit.truncated": True}] * 4)
    assert buffer.nbytes <= 1_000_000
    assert buffer.size() == buffer.buffer_size // 2
    assert buffer.sample(8).observations["image"].dtype == torch.uint8
    agent = MaskableDQN("MultiInputPolicy", Walk(as_dict=True), buffer_bytes=50_000, device="cpu")
    assert 0.99 * 50_000 < agent.replay_buffer.nbytes <= 50_000


def test_an_emptied_buffer_is_empty():
    agent = make_agent(MaskableDQN, Walk()).learn(60)
    agent.replay_buffer.reset()
    assert agent.replay_buffer.size() == 0
    with pytest.raises(ConfigurationError, match="the replay buffer is empty"):
        agent.replay_buffer.sample(1)
    agent.learn(60)
    assert agent.replay_buffer.size() == 60


# -- bad input --------------------------------------------------------------------------------------------------------


def with_masks(masks):
    env = Walk()
    env.action_masks = lambda: masks(env) if callable(masks) else masks
    return env


@pytest.mark.parametrize("agent_class", AGENTS)
def test_an_environment_without_masks_is_refused(agent_class):
    for env in ("CartPole-v1", DummyVecEnv([lambda: WithoutMasks(Walk())])):
        with pytest.raises(ConfigurationError, match=r"no action_masks\(\).*ActionMasker.*use DQN or QRDQN"):
            agent_class("MlpPolicy", env)


@pytest.mark.parametrize("started", [0, 20])
@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (np.zeros(ACTIONS, dtype=bool), r"environment 1 masks all of its 5 actions; .* must end its episode"),
        (np.ones(ACTIONS + 1, dtype=bool), r"environment 1 has shape \(6,\) and dtype bool; .* must return 5"),
        (np.ones((1, ACTIONS)), r"environment 1 has shape \(1, 5\)"),
        (None, r"environment 1 has shape \(\) and dtype object"),
    ],
)
def test_bad_masks_name_the_environment(masks, message, started):
    calls = []

    def later(env):
        calls.append(1)
        return legal(env.state) if len(calls) <= started else masks

    env = DummyVecEnv([Walk, lambda: with_masks(later)])
    with pytest.raises(ConfigurationError, match=message):
        make_agent(MaskableDQN, env).learn(100)
    assert len(calls) == started + 1


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (np.ones((2, ACTIONS)), "2 action masks for 3 observations"),
        (np.ones(ACTIONS), "1 action masks for 3 observations"),
        (np.ones((3, 4)), r"environment 0 has shape \(4,\)"),
        (np.arange(3 * ACTIONS).reshape(3, ACTIONS) >= ACTIONS, "environment 0 masks all"),
    ],
)
def test_bad_masks_for_predict_are_named(masks, message):
    agent = make_agent(MaskableQRDQN, Walk())
    with pytest.raises(ConfigurationError, match=message):
        agent.predict(np.zeros((3, SIZE), dtype=np.float32), action_masks=masks)


def test_predict_names_what_gymnasiums_reset_returns():
    env = Walk()
    with pytest.raises(ConfigurationError, match="got a tuple"):
        make_agent(MaskableDQN, env).predict(env.reset(seed=0))


def test_a_truncated_state_must_allow_something_a_terminated_one_need_not():
    class Ends(Walk):
        def step(self, action):
            observation, reward, *_ = super().step(action)
            return observation, reward, not self.endless, self.endless, {"action_mask": np.zeros(ACTIONS, dtype=bool)}

    assert make_agent(MaskableDQN, Ends()).learn(40).replay_buffer.size() == 40
    with pytest.raises(ConfigurationError, match="environment 0 masks all"):
        make_agent(MaskableDQN, Ends(endless=True)).learn(40)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_steps": 0}, "n_steps is an integer >= 1, got 0"),
        ({"gamma": 1.5}, "gamma"),
        ({"buffer_bytes": 0}, "buffer_bytes"),
        ({"buffer_bytes": 100, "n_steps": 3}, r"buffer_bytes=100 holds 2 rows .* n_steps=3 needs 192 bytes"),
        ({"replay_buffer_class": ReplayBuffer}, "ReplayBuffer does not store; use MaskedReplayBuffer"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ConfigurationError, match=message):
        make_agent(MaskableDQN, Walk(), **arguments)


def test_the_buffer_refuses_what_it_cannot_store():
    box = spaces.Box(0, 1, (2,), np.float32)
    with pytest.raises(ConfigurationError, match="discrete actions"):
        MaskedReplayBuffer(10, box, box)
    with pytest.raises(ConfigurationError, match="stores observations once as it is"):
        MaskedReplayBuffer(10, box, spaces.Discrete(2), optimize_memory_usage=True)


def test_optimize_memory_usage_changes_nothing(recwarn):
    one, other = (make_agent(MaskableDQN, Walk(), optimize_memory_usage=o, n_steps=2).learn(50) for o in (False, True))
    assert other.replay_buffer.nbytes == one.replay_buffer.nbytes
    other.learn(50)
    assert not [w for w in recwarn if "n_steps" in str(w.message) or "trajectory" in str(w.message)]


# -- policies ---------------------------------------------------------------------------------------------------------


def make_token_env(**kwargs):
    table = np.array([[0.6, 0.1, 0.2, 0.1], [0.5, 0.2, 0.2, 0.1], [0.4, 0.2, 0.3, 0.1], [0.25] * 4])
    reward = as_reward(lambda prompt, completion: min(completion.count("ab") / 3, 1.0), lower=0.0, upper=1.0)
    arguments = {"model": TabularLM(table), "prompts": ["a", "b", "c"], "reward": reward, "top_k": 3}
    return gym.make("TokenDecoding-v0", **{**arguments, "max_new_tokens": 8, "candidate_dims": 8, **kwargs})


def token_observation(batch=2, k=5):
    mask = torch.ones(batch, k, dtype=torch.int8)
    mask[:, 1] = 0
    return {
        "hidden": torch.randn(batch, 6),
        "candidates": torch.randn(batch, k * 4),
        "logprobs": -torch.rand(batch, k),
        "potential": torch.rand(batch, 1),
        "remaining": torch.rand(batch, 1),
        "action_mask": mask,
    }


def shuffled(observation, order):
    batch, k = observation["logprobs"].shape
    candidates = observation["candidates"].view(batch, k, -1)[:, order].reshape(batch, -1)
    return {
        **observation,
        "candidates": candidates,
        "logprobs": observation["logprobs"][:, order],
        "action_mask": observation["action_mask"][:, order],
    }


def make_scorer(**kwargs):
    torch.manual_seed(0)
    scorer = TokenScorer(6, 4, width=16, **kwargs).eval()
    for parameter in scorer.parameters():
        torch.nn.init.normal_(parameter)
    return scorer


@pytest.mark.parametrize("dueling", [False, True])
@pytest.mark.parametrize("n_quantiles", [None, 3])
def test_the_scorer_does_not_mind_the_order_of_the_candidates(dueling, n_quantiles):
    scorer, observation, order = (
        make_scorer(dueling=dueling, n_quantiles=n_quantiles),
        token_observation(),
        [3, 0, 4, 1, 2],
    )
    q = scorer(observation)
    assert q.shape == ((2, 5) if n_quantiles is None else (2, 3, 5))
    torch.testing.assert_close(q[..., order], scorer(shuffled(observation, order)))
    assert q.std(dim=-1).min() > 0.1


@pytest.mark.parametrize("n_quantiles", [None, 3])
def test_dueling_adds_the_value_to_advantages_less_their_masked_mean(n_quantiles):
    scorer, observation = make_scorer(dueling=True, n_quantiles=n_quantiles), token_observation()
    q = scorer(observation)
    state = torch.cat([observation[key] for key in ("hidden", "potential", "remaining")], dim=1)
    value = scorer.value(state)  # [B, outputs]
    legal_actions = [0, 2, 3, 4]
    torch.testing.assert_close(q[..., legal_actions].mean(dim=-1), value[:, 0] if n_quantiles is None else value)
    # The differences are those of the network without a value, and what is masked has no part in the others.
    plain = TokenScorer(6, 4, width=16, n_quantiles=n_quantiles).eval()
    plain.load_state_dict({name: p for name, p in scorer.state_dict().items() if not name.startswith("value")})
    torch.testing.assert_close(q - q[..., :1], plain(observation) - plain(observation)[..., :1])
    logprobs = observation["logprobs"].clone()
    logprobs[:, 1] = -9.0
    torch.testing.assert_close(scorer({**observation, "logprobs": logprobs})[..., legal_actions], q[..., legal_actions])


@pytest.mark.parametrize("dueling", [False, True])
@pytest.mark.parametrize("agent_class", [DQN, MaskableDQN, QStar, QRDQN, MaskableQRDQN])
def test_every_agent_takes_the_policy_and_serves_as_heuristic(agent_class, dueling, tmp_path):
    quantiles = agent_class in (QRDQN, MaskableQRDQN)
    policy = TokenQuantilePolicy if agent_class is QRDQN else TokenQPolicy
    policy_kwargs = {"width": 16, "dueling": dueling, **({"n_quantiles": 6} if quantiles else {})}
    small = {"learning_starts": 10, "buffer_size": 200}
    if agent_class is QStar:
        small = {"searches_per_round": 2, "tokens_per_search": 20, "gradient_steps": 2}
    env = make_token_env(top_p=0.9 if issubclass(agent_class, (MaskableDQN, MaskableQRDQN)) else 1.0)
    agent = agent_class(policy, env, seed=0, device="cpu", policy_kwargs=policy_kwargs, **small).learn(60)
    network = agent.quantile_net if quantiles else agent.q_net
    assert (network.scorer.value is not None) == dueling
    again = TokenScorer(**network.scorer_kwargs).eval()
    again.load_state_dict(network.scorer.state_dict())
    observation = agent.policy.obs_to_tensor(env.reset(seed=0)[0])[0]
    agent.policy.set_training_mode(False)
    answer = network(observation)
    assert answer.shape == ((1, 6, 3) if quantiles else (1, 3))
    torch.testing.assert_close(again(observation), answer)
    assert AStarPlanner(env, heuristic=QHeuristic(agent)).plan("a", 10).completions
    agent.policy.save(tmp_path / "policy")
    policy = type(agent.policy).load(tmp_path / "policy")
    assert policy.predict(env.reset(seed=0)[0])[0] == agent.policy.predict(env.reset(seed=0)[0])[0]
    if agent_class is not QStar:
        agent.save(tmp_path / "agent")
        loaded = agent_class.load(tmp_path / "agent", env)
        loaded.policy.set_training_mode(False)
        loaded_network = loaded.quantile_net if quantiles else loaded.q_net
        torch.testing.assert_close(loaded_network(observation), answer, rtol=0, atol=0)


@pytest.mark.parametrize("agent_class", AGENTS)
def test_masked_agents_learn_in_the_vectorised_token_environment(agent_class):
    env = make_token_env().unwrapped
    vec = TokenDecodingVecEnv(
        4, model=env.mdp.model, prompts=["a", "b", "c"], reward=env.mdp.reward, top_k=3, top_p=0.7, max_new_tokens=8,
        candidate_dims=8,
    )  # fmt: skip
    policy_kwargs = {"width": 16, **({"n_quantiles": 6} if agent_class is MaskableQRDQN else {})}
    arguments = {**SMALL, "buffer_bytes": 100_000, "n_steps": 4, "gamma": 1.0, "policy_kwargs": policy_kwargs}
    agent = agent_class(TokenQPolicy, vec, **arguments).learn(400)  # an illegal action would be an error
    assert agent._n_updates > 30
    batch = agent.replay_buffer.sample(200)
    alive = batch.dones[:, 0] == 0
    torch.testing.assert_close(batch.next_action_masks[alive], batch.next_observations["action_mask"][alive] > 0)
    assert not batch.next_action_masks[alive].all()
