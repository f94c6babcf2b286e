"""A reward model trained from preferences, and what searching for it brings. About a minute on two CPU cores."""

import json
import tempfile
from pathlib import Path

from qstar_decoding.agents import AStarPlanner, GreedyDecoder, QHeuristic, QStar, SamplingDecoder, evaluate
from qstar_decoding.envs import TokenDecodingVecEnv
from qstar_decoding.rewards import as_reward, make_reward
from qstar_decoding.rewards.library.language import read_pairs, train_preference

places = ["hotel", "museum", "café", "beach", "market", "cinema", "station", "library"]
prompts = [f"{opening} the {place}" for opening in ("Yesterday at", "What I think of") for place in places]
gold = as_reward("sentiment")  # stands for the people whose judgement we have some of

with tempfile.TemporaryDirectory() as folder:
    # Preferences: of two samples for a prompt, the one that was liked better.
    env = TokenDecodingVecEnv(num_envs=8, prompts=prompts, max_new_tokens=10)
    pairs = Path(folder) / "pairs.jsonl"
    with pairs.open("w") as file:
        for seed in range(20):
            one, other = (evaluate(SamplingDecoder(env, n=1, seed=seed + s), prompts).plans for s in (0, 100))
            for a, b in zip(one, other, strict=True):
                if a.reward == b.reward:
                    continue  # nobody preferred either
                better, worse = (a, b) if a.reward > b.reward else (b, a)
                file.write(json.dumps({"prompt": a.prompt, "chosen": better.text, "rejected": worse.text}) + "\n")

    # On the command line: qstar train-reward pairs.jsonl --out folder
    found = train_preference(read_pairs(pairs), folder)
    print(f"{found['pairs']} pairs; right about {found['held_out_accuracy']:.0%} of {found['held_out_pairs']} held out")

    env = TokenDecodingVecEnv(
        num_envs=8, prompts=prompts, reward=make_reward("preference", folder), max_new_tokens=10, logprob_weight=0.005
    )
    agent = QStar(env=env, seed=0, tokens_per_search=40, searches_per_round=16)
    held_out = ["Yesterday at the airport", "What I think of the theatre", "Yesterday at the lake"]

    def show(title, planner):
        plans = planner.plan_many(held_out, 40)
        judged = gold([plan.prompt for plan in plans], [plan.text for plan in plans])
        print(f"{title}: J {sum(p.objective for p in plans) / len(plans):.3f}, gold {judged.mean():.3f}")
        for plan in plans:
            print(f"    {plan.prompt}{plan.text}   {plan.reward:.2f}")

    show("before, greedy decoding", GreedyDecoder(env))
    agent.learn(2_000)
    show("after, A* on Q, 40 LM tokens", AStarPlanner(env, heuristic=QHeuristic(agent)))
