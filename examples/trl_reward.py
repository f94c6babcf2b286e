"""Reward functions written for TRL's GRPOTrainer, used as they are. About a minute on two CPU cores."""

from qstar_decoding.agents import AStarPlanner, QHeuristic, QStar
from qstar_decoding.envs import TokenDecodingVecEnv
from qstar_decoding.rewards import as_reward
from qstar_decoding.rewards.adapters import from_trl


# As in TRL: keyword arguments, a list of numbers, columns of the data set by name.
def uses_the_word(completions, word, **kwargs):
    return [float(f" {w}" in completion) for completion, w in zip(completions, word, strict=True)]


# The conversational kind, whose completions are messages, goes through an adapter.
def is_brief(completions, **kwargs):
    return [1.0 - min(len(messages[0]["content"].split()), 12) / 12 for messages in completions]


reward = 0.8 * as_reward(uses_the_word, lower=0, upper=1) + 0.2 * from_trl(
    is_brief, conversational=True, lower=0, upper=1
)


def data(*pairs):
    return [{"prompt": f"A sentence with the word {word}: The {thing}", "word": word} for thing, word in pairs]


things, words = ["dog", "teacher", "king", "train", "farmer", "nurse"], ["home", "people", "time", "water"]
env = TokenDecodingVecEnv(
    num_envs=8, prompts=data(*((t, w) for t in things for w in words)), reward=reward, max_new_tokens=12
)
held_out = data(("cat", "home"), ("doctor", "people"), ("sailor", "water"), ("queen", "time"))
agent = QStar(env=env, seed=0, tokens_per_search=60, searches_per_round=16)


def show(title, planner):
    plans = planner.plan_many(held_out, 50)
    print(f"{title}: mean J {sum(plan.objective for plan in plans) / len(plans):.3f}")
    for plan in plans:
        print(f"    {plan.prompt}{plan.text}   reward {plan.reward:.2f}")


show("before, A* without Q, 50 LM tokens", AStarPlanner(env))
agent.learn(5_000)
show("after, A* on Q, 50 LM tokens", AStarPlanner(env, heuristic=QHeuristic(agent)))
