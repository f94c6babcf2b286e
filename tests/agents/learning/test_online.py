"""Learning while decoding: the learner, its guard, and the planners that have one."""

import asyncio
import math
import shutil
import struct
import time
import zlib
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

from qstar_decoding.agents import (
    AStarPlanner,
    BoundHeuristic,
    OnlineLearner,
    QHeuristic,
    QStar,
    SearchEngine,
    TokenQPolicy,
    ZeroHeuristic,
)
from qstar_decoding.agents.distributed.jobs import InProcess, Job
from qstar_decoding.agents.learning import LearningDecoder, LearningWorkers, carried_weight
from qstar_decoding.agents.learning.online.guard import Guard
from qstar_decoding.agents.learning.online.lessons import JOURNAL
from qstar_decoding.agents.search.budget import Budget
from qstar_decoding.envs import TabularLM
from qstar_decoding.envs.prompts import as_prompt
from qstar_decoding.errors import CheckpointError, ConfigurationError
from qstar_decoding.rewards import as_reward

SMALL = {"batch_size": 32, "policy_kwargs": {"width": 32, "dropout": 0.0}, "seed": 0}
BUDGET = 10


def likes_ab(prompt, completion):
    """Likes b after a, which the language model below finds unlikely."""
    return min(completion.count("ab") / 3, 1.0)


def make_env(**kwargs):
    table = np.array([[0.6, 0.1, 0.2, 0.1], [0.5, 0.2, 0.2, 0.1], [0.4, 0.2, 0.3, 0.1], [0.25] * 4])
    settings = {
        "model": TabularLM(table),
        "prompts": ["a", "b", "c"],
        "reward": as_reward(likes_ab, lower=0.0, upper=1.0),
        "top_k": 3,
        "max_new_tokens": 8,
        "candidate_dims": 8,
    }
    return gym.make("TokenDecoding-v0", **{**settings, **kwargs})


def make_planner(env=None, **settings):
    env = env or make_env()
    learner = OnlineLearner(QStar(TokenQPolicy, env, **SMALL), **{"gradient_steps": 8, "seed": 0, **settings})
    return AStarPlanner(env, learn=learner)


def draw_prompts(count):
    rng = np.random.default_rng(0)
    return ["".join(rng.choice(list("abc"), 3)) for _ in range(count)]


def wait_until(condition):
    for _ in range(2000):
        if condition():
            return True
        time.sleep(0.01)
    return False


def mean_objective(plans):
    return np.mean([plan.objective for plan in plans])


@pytest.fixture(scope="module")
def learned():
    planner = make_planner()
    return planner, planner.plan_many(draw_prompts(64), BUDGET)


def test_a_planner_that_learns_overtakes_the_bound_within_a_few_prompts(learned):
    planner, plans = learned
    bound = AStarPlanner(make_env()).plan_many(draw_prompts(64), BUDGET)
    assert mean_objective(plans[24:]) > mean_objective(bound[24:]) + 0.3
    assert planner.learner.version == 8  # once a group
    assert planner.learner.agent.num_timesteps == sum(plan.usage.lm_tokens for plan in plans)  # and none of its own


def test_the_guard_says_how_often_it_used_which_heuristic(learned):
    planner, plans = learned
    uses = planner.learner.uses()
    assert set(uses) == {"bound", "learned"}
    assert sum(use.searches for use in uses.values()) == len(plans)
    assert uses["learned"].objective > uses["bound"].objective
    assert uses["learned"].searches > 32
    total = sum(use.searches * use.objective for use in uses.values())
    assert total == pytest.approx(sum(plan.objective for plan in plans))


def test_the_same_seed_gives_the_same_plans():
    first, second = (make_planner().plan_many(draw_prompts(24), BUDGET) for _ in range(2))
    assert [plan.token_ids for plan in first] == [plan.token_ids for plan in second]
    assert [plan.objective for plan in first] == [plan.objective for plan in second]


def test_a_search_keeps_the_version_of_q_that_it_began_with(learned):
    planner, _ = learned
    old = planner.learner._heuristics["learned"]
    mdp, prompts = planner.mdp, [as_prompt("ab")]
    roots = mdp.roots(prompts)
    before = old(mdp, prompts, roots)
    planner.plan_many(draw_prompts(8), BUDGET)
    assert planner.learner._heuristics["learned"] is not old
    np.testing.assert_array_equal(old(mdp, prompts, roots), before)
    newest = planner.learner._heuristics["learned"]
    assert not np.array_equal(newest(mdp, prompts, roots), before)


def test_a_heuristic_that_finishes_no_text_is_tried_seldom():
    guard, used = Guard(seed=0), []
    for _ in range(200):
        used.append(guard.draw(["fruitless", "fine"]))
        guard.enter(used[-1], math.nan if used[-1] == "fruitless" else 0.5)
    assert used[:3] == ["fruitless"] * 3
    assert 5 <= used.count("fruitless") <= 30  # it may have improved
    assert guard.use("fruitless").searches == 0
    assert math.isnan(guard.use("fruitless").objective)


class Misleading:
    """Promises most where the language model is least sure, and nothing for what the reward wants."""

    def __call__(self, mdp, prompts, nodes):
        return -10.0 - mdp.edge_returns(nodes)


@pytest.mark.parametrize("seed", range(3))
def test_a_heuristic_that_does_harm_is_soon_left_alone(seed):
    env = make_env()
    learner = OnlineLearner(QStar(TokenQPolicy, env, **SMALL), gradient_steps=8, seed=seed)
    planner = AStarPlanner(env, heuristic=Misleading(), learn=learner)
    planner.plan_many(draw_prompts(80), BUDGET)
    uses = learner.uses()
    assert set(uses) == {"bound", "given", "learned"}
    assert uses["given"].searches <= 20
    assert uses["learned"].searches >= 40


def test_a_trained_q_is_used_from_the_beginning(learned):
    trained = learned[0].learner.agent
    learner = OnlineLearner(trained, seed=0)
    planner = AStarPlanner(trained.env.envs[0], heuristic=QHeuristic(trained), learn=learner)
    planner.plan_many(draw_prompts(8), BUDGET)
    assert learner.uses()["learned"].searches >= 3
    assert "given" not in learner.uses()  # it is the agent's own


@pytest.mark.parametrize(
    "changes",
    [
        {"reward": as_reward(lambda prompt, completion: 0.5, lower=0, upper=1)},
        {"logprob_weight": 0.5},
        {"top_k": 2},
        {"heuristic": BoundHeuristic()},
    ],
    ids=["reward", "alpha", "top_k", "heuristic"],
)
def test_requests_of_another_problem_teach_nothing(learned, changes):
    planner, _ = learned
    before = planner.learner.uses(), planner.learner.version
    planner.plan("ab", BUDGET, **changes)
    assert (planner.learner.uses(), planner.learner.version) == before


@pytest.mark.parametrize("changes", [{"max_new_tokens": 5}, {"stop": "c"}, {"n": 2}], ids=str)
def test_requests_of_the_same_reward_teach(changes):
    planner = make_planner()
    planner.plan("ab", BUDGET, **changes)
    assert planner.learner.uses()["bound"].searches == 1
    assert planner.learner.version == 1


def test_streams_and_engines_teach_too():
    planner = make_planner()
    for _ in planner.stream("ab", BUDGET):
        pass
    assert planner.learner.uses()["bound"].searches == 1

    async def ask():
        return [better async for better in planner.stream("ba", BUDGET)]

    assert asyncio.run(ask())
    assert planner.learner.uses()["bound"].searches == 2
    with SearchEngine(planner) as engine:
        handles = [engine.submit(prompt, BUDGET) for prompt in draw_prompts(12)]
        plans = [handle.result() for handle in handles]
    assert sum(use.searches for use in planner.learner.uses().values()) == 14
    assert all(math.isfinite(plan.objective) for plan in plans)


def test_a_cancelled_stream_teaches_nothing():
    planner = make_planner()
    stream = planner.stream("ab", 50)
    next(stream)
    stream.close()
    assert list(stream) == []
    uses = planner.learner.uses()
    assert uses["bound"].searches <= 1
    planner.plan("ba", BUDGET)  # and the learner goes on
    assert planner.learner.version >= 1


def test_texts_ranked_by_q_are_scored_for_learning():
    env = make_env()
    learner = OnlineLearner(QStar(TokenQPolicy, env, **SMALL), gradient_steps=8, guard=False, seed=0)
    planner = AStarPlanner(env, heuristic=ZeroHeuristic(), score="q", learn=learner)
    planner.plan_many(draw_prompts(48), BUDGET)
    experience = learner.agent.experience
    assert experience.size > 20
    assert np.nanmax(experience.state()["target"]) > 0.3  # rewards, not estimates


def test_no_more_time_is_spent_than_the_share_allows():
    planner = make_planner(share=0.0)
    planner.plan_many(draw_prompts(16), BUDGET)
    assert planner.learner.version == 0
    assert planner.learner.agent._n_updates == 0
    planner.learner.share = 1.0
    planner.plan("ab", BUDGET)
    assert planner.learner.agent._n_updates == 17 * 8  # what was put off is done then


def test_the_agent_itself_will_do():
    env = make_env()
    agent = QStar(TokenQPolicy, env, **SMALL)
    planner = AStarPlanner(env, learn=agent)
    planner.plan("ab", BUDGET)
    assert planner.learner.agent is agent


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda env: AStarPlanner(env, learn="sentiment"), "learn is a QStar agent"),
        (lambda env: AStarPlanner(make_env(), learn=QStar(TokenQPolicy, env, **SMALL)), "another process"),
        (lambda env: OnlineLearner(object()), "needs a QStar agent"),
        (lambda env: OnlineLearner(QStar(TokenQPolicy, env, **SMALL), share=2), "share"),
        (lambda env: OnlineLearner(QStar(TokenQPolicy, env, **SMALL), group=0), "group"),
        (lambda env: OnlineLearner(QStar(TokenQPolicy, env, **SMALL), guard="no"), "guard is true or false"),
        (lambda env: OnlineLearner(QStar(TokenQPolicy, env, **SMALL), folder=__file__), "something else"),
        (
            lambda env: OnlineLearner(QStar(TokenQPolicy, env, **SMALL), folder=Path(__file__) / "q"),
            "can be written",
        ),
        (lambda env: make_planner(env).plan_many(["a", "b"], 10, shared=True), "shared or learn"),
    ],
    ids=["name", "other env", "no agent", "share", "group", "guard", "file", "in a file", "shared budget"],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make(make_env())


def test_an_interrupt_ends_all_groups():
    planner = make_planner(group=2)
    calls = 0

    def progress(search):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt

    plans = planner.plan_many(draw_prompts(8), BUDGET, progress=progress)
    assert len(plans) == 8
    assert all(plan.stop_reason == "interrupted" for plan in plans[2:])
    assert all(plan.usage.lm_forwards == 0 for plan in plans[2:])


def test_a_folder_is_gone_on_with(tmp_path):
    env, folder = make_env(), tmp_path / "runs" / "q"

    def agent(saved):
        return QStar(TokenQPolicy, env, **SMALL) if saved is None else QStar.load(saved, env)

    with OnlineLearner.open(folder, agent, seed=0) as learner:
        AStarPlanner(env, learn=learner).plan_many(draw_prompts(16), BUDGET)
        steps, states = learner.agent._n_updates, learner.agent.experience.size
        with pytest.raises(ConfigurationError, match="another process"), OnlineLearner.open(folder, agent):
            pass
        before = learner.uses()
    with OnlineLearner.open(folder, agent, seed=0) as learner:
        assert learner.uses() == before  # the guard knows what it knew
        assert (learner.agent._n_updates, learner.agent.experience.size) == (steps, states)
        AStarPlanner(env, learn=learner).plan_many(draw_prompts(8), BUDGET)
        assert learner.uses()["learned"].searches > 0
        assert learner.agent._n_updates > steps
    assert QHeuristic(folder).q.spec.top_k == 3


def open_in(folder, env, **settings):
    def agent(saved):
        return QStar(TokenQPolicy, env, **SMALL) if saved is None else QStar.load(saved, env)

    return OnlineLearner.open(folder, agent, **{"gradient_steps": 8, "seed": 0, "save_every": 1e9, **settings})


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The folder of a learner as a kill leaves it, and what the learner knew."""
    root, env = tmp_path_factory.mktemp("killed"), make_env()
    with open_in(root / "q", env) as learner:
        AStarPlanner(env, learn=learner).plan_many(draw_prompts(32), BUDGET)
        shutil.copytree(root / "q", root / "left")
        known = learner.uses(), learner.agent.experience.size, learner.agent.num_timesteps
        assert learner.version == 4  # of which the first was saved
    return root / "left", known


def test_a_kill_loses_no_lesson(tmp_path, killed):
    left, known = killed
    shutil.copytree(left, tmp_path / "q")
    env = make_env()
    with open_in(tmp_path / "q", env) as learner:
        agent = learner.agent
        assert (learner.uses(), agent.experience.size, agent.num_timesteps) == known
        assert (learner.version, agent._n_updates) == (1, 8 * 8)
        learner.learn()  # the gradient steps of the lessons since the save
        assert agent._n_updates == 32 * 8
    with open_in(tmp_path / "q", env) as learner:
        assert learner.version == 2
        assert (learner.uses(), learner.agent._n_updates) == (known[0], 32 * 8)
    assert not (tmp_path / "q" / JOURNAL).exists()  # saved at the end


@pytest.mark.parametrize("damage", ["cut off", "overwritten"])
def test_a_kill_while_a_lesson_is_written_loses_that_one_alone(tmp_path, killed, damage):
    left, (uses, _, _) = killed
    shutil.copytree(left, tmp_path / "q")
    journal = tmp_path / "q" / JOURNAL
    content = journal.read_bytes()
    journal.write_bytes(content[:-7] if damage == "cut off" else content[:-7] + bytes(7))
    env = make_env()
    searches = sum(use.searches for use in uses.values())
    with open_in(tmp_path / "q", env) as learner:
        assert sum(use.searches for use in learner.uses().values()) == searches - 1
        AStarPlanner(env, learn=learner).plan("abc", BUDGET)
        shutil.copytree(tmp_path / "q", tmp_path / "again")
    with open_in(tmp_path / "again", env) as learner:  # what is written after the damage can be read
        assert sum(use.searches for use in learner.uses().values()) == searches


def test_a_save_that_was_killed_half_way_is_gone_on_with(tmp_path, killed):
    left, known = killed
    shutil.copytree(left, tmp_path / ".q.old")  # moved away, and the new one not moved in
    env = make_env()
    with open_in(tmp_path / "q", env) as learner:
        assert learner.uses() == known[0]
        AStarPlanner(env, learn=learner).plan("abc", BUDGET)
    with open_in(tmp_path / "q", env) as learner:
        assert sum(use.searches for use in learner.uses().values()) == 33


def test_one_call_may_learn_and_one_may_not():
    env = make_env()
    learner = OnlineLearner(QStar(TokenQPolicy, env, **SMALL), gradient_steps=8, seed=0)
    planner = AStarPlanner(env)
    planner.plan_many(draw_prompts(8), BUDGET, learn=learner)
    assert (learner.version, planner.learner) == (1, None)
    planner = AStarPlanner(env, learn=learner)
    planner.plan_many(draw_prompts(8), BUDGET, learn=False)
    assert learner.version == 1
    planner.plan_many(draw_prompts(8), BUDGET, learn=True)
    assert learner.version == 2
    for learn, message in ((True, "learner"), ("q", "QStar agent")):
        with pytest.raises(ConfigurationError, match=message):
            AStarPlanner(env).plan_many(["a"], BUDGET, learn=learn)


def test_workers_search_with_the_newest_q_and_send_what_they_have_learned():
    env = make_env()
    learner = OnlineLearner(QStar(TokenQPolicy, env, **SMALL), gradient_steps=8, seed=0)
    decoder = LearningDecoder(lambda: make_env().unwrapped.mdp, {"heuristic": ZeroHeuristic()}, Budget(BUDGET))
    received = []
    decoder.receive = lambda news: received.append(news.version) or LearningDecoder.receive(decoder, news)
    prompts = [as_prompt(text) for text in draw_prompts(64)]
    jobs = [Job("decode", (prompts[i : i + 8],), str(i)) for i in range(0, 64, 8)]
    results = [records for _, records in LearningWorkers(InProcess(decoder), learner).run(jobs)]
    assert received == [*range(9)]  # a newer version before each job
    objectives = [record["objective"] for records in results for record in records]
    bound = AStarPlanner(make_env()).plan_many(draw_prompts(64), BUDGET)
    assert np.mean(objectives[24:]) > mean_objective(bound[24:]) + 0.3
    assert set(learner.uses()) == {"bound", "given", "learned"}
    assert sum(use.searches for use in learner.uses().values()) == 64
    assert learner.agent.num_timesteps == sum(record["usage"]["lm_tokens"] for records in results for record in records)


def test_an_error_of_a_worker_teaches_nothing_and_is_handed_on():
    learner = OnlineLearner(QStar(TokenQPolicy, make_env(), **SMALL), seed=0)
    workers = InProcess(LearningDecoder(lambda: make_env().unwrapped.mdp, {}, Budget(BUDGET)))
    jobs = [Job("decode", (None,), "broken"), Job("decode", ([as_prompt("ab")],), "sound")]
    (_, broken), (_, records) = LearningWorkers(workers, learner).run(jobs, keep_going=True)
    assert isinstance(broken, TypeError)
    assert [record["prompt"] for record in records] == ["ab"]
    assert learner.uses()["bound"].searches == 1


def test_an_engine_learns_between_ticks_and_while_it_is_idle():
    planner = make_planner(gradient_steps=64)
    with SearchEngine(planner) as engine:
        for prompt in draw_prompts(4):
            engine.submit(prompt, BUDGET).result()
        learner = planner.learner
        assert wait_until(lambda: learner.agent._n_updates == 4 * 64)  # nobody asks any more
        assert learner.version > 1
    planner = make_planner(share=0.0)
    with SearchEngine(planner) as engine:
        engine.submit("ab", BUDGET).result()
    assert planner.learner.agent._n_updates == 0


def test_an_engine_goes_on_with_the_last_q_if_learning_fails():
    planner = make_planner()

    def fail(*_):
        raise FloatingPointError("the loss became nan")

    planner.learner.agent.train = fail
    with pytest.warns(RuntimeWarning, match="loss became nan"), SearchEngine(planner) as engine:
        plans = [engine.submit(prompt, BUDGET).result() for prompt in draw_prompts(4)]
    assert all(math.isfinite(plan.objective) for plan in plans)


def test_steps_beyond_the_share_are_put_off_and_the_oldest_are_left_out():
    planner = make_planner(share=0.0)
    planner.plan_many(draw_prompts(80), BUDGET)
    planner.learner.share = 1.0
    planner.plan("abc", BUDGET)
    assert planner.learner.agent._n_updates == 64 * 8


def test_a_journal_of_something_else_is_named(tmp_path):
    env, folder = make_env(), tmp_path / "q"

    def agent(saved):
        return QStar(TokenQPolicy, env, **SMALL) if saved is None else QStar.load(saved, env)

    with OnlineLearner.open(folder, agent) as learner:
        AStarPlanner(env, learn=learner).plan_many(draw_prompts(8), BUDGET)
    body = b"no lesson"
    (folder / "lessons.bin").write_bytes(struct.pack("<QI", len(body), zlib.crc32(body)) + body)
    with pytest.raises(CheckpointError, match="is damaged or does not fit"), OnlineLearner.open(folder, agent):
        pass


def test_a_file_or_a_folder_of_something_else_is_refused_and_kept(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes").write_text("mine")
    for name in ("file", "folder"):
        with (
            pytest.raises(ConfigurationError, match="something else"),
            OnlineLearner.open(tmp_path / name, lambda saved: QStar(TokenQPolicy, make_env(), **SMALL)),
        ):
            pass
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "notes").read_text() == "mine"


def test_nothing_is_saved_where_nothing_was_learned(tmp_path):
    with OnlineLearner.open(tmp_path / "q", lambda saved: QStar(TokenQPolicy, make_env(), **SMALL)):
        pass
    assert not (tmp_path / "q").exists()


def test_it_is_saved_from_time_to_time(tmp_path):
    planner = make_planner(folder=tmp_path / "q", save_every=0.0)
    planner.plan("ab", BUDGET)
    assert QStar.load(tmp_path / "q", make_env()).num_timesteps == planner.learner.agent.num_timesteps > 0


def test_a_q_without_training_state_goes_on_as_it_is(tmp_path, learned):
    agent = learned[0].learner.agent
    agent.save(tmp_path / "q", training_state=False)
    env = make_env()
    loaded = QStar.load(tmp_path / "q", env)
    scale = loaded.q_net.scorer.hidden_scale.clone()
    AStarPlanner(env, learn=OnlineLearner(loaded, seed=0)).plan_many(draw_prompts(4), BUDGET)
    assert loaded._n_updates > 1
    np.testing.assert_array_equal(loaded.q_net.scorer.hidden_scale.numpy(), scale.numpy())  # not standardised anew


@pytest.mark.parametrize(
    ("trained", "reward", "weight"),
    [
        ("sentiment", "sentiment - repetition", 1.0),
        ("sentiment", "0.5 * sentiment + 0.5 * length", 0.5),
        ("sentiment", "repetition - sentiment", 0.0),
        ("sentiment", "length", 0.0),
        ("0.8 * keywords + 0.2 * complete_sentence", "0.4 * keywords + 0.4 * complete_sentence", 0.5),
        ("0.8 * keywords + 0.2 * complete_sentence", "keywords", 1.25),
        ("0.8 * keywords + 0.2 * complete_sentence", "keywords - complete_sentence", 1.25),
        ("0.8 * keywords + 0.2 * complete_sentence", "complete_sentence", 0.0),
        ("0.8 * keywords + 0.2 * complete_sentence", "0.2 * complete_sentence + 0.4 * keywords - repetition", 0.5),
        ("sentiment", "-repetition + sentiment", 1.0),
        ("sentiment", "2 * (sentiment - repetition)", 2.0),
        ("sentiment", "-(repetition - sentiment)", 1.0),
        ("sentiment", "-1 * sentiment", 0.0),
        ("sentiment", "length - 2 * sentiment", 0.0),
        ("sentiment", "sentiment - sentiment + length", 0.0),
        ("sentiment", "clip(sentiment, -1, 0.7) - repetition", 1.0),
        ("sentiment", "0.5 * normalise(clip(sentiment - repetition, -1, 0.5), -1, 1)", 0.5),
        ("clip(sentiment, -1, 0.7) - repetition", "sentiment - 2 * repetition", 1.0),
        ("clip(sentiment, -1, 0.7) - repetition - address", "sentiment", 0.0),
        ("sentiment", "2 * sentiment - sentiment", 1.0),
        ("sentiment", "min(sentiment, length)", 0.0),
    ],
)
def test_the_weight_of_a_trained_reward_in_a_new_one(trained, reward, weight):
    assert carried_weight(trained, reward) == pytest.approx(weight)
