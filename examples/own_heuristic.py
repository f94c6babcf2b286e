"""A heuristic of your own is a function: what you know of the reward tells A* where to look. Seconds on a CPU core."""

import numpy as np

from qstar_decoding.agents import AStarPlanner, BoundHeuristic
from qstar_decoding.tasks import load_task

task = load_task("toy")  # a language of seven letters; the reward is 3/26 for each different one that a text uses
mdp, prompts = task.mdp(), task.prompts.of("test")


def letters_to_come(mdp, prompts, nodes):
    """Each token brings one letter at most, and there are seven; float64 [n, k] for all edges of n nodes."""
    h = mdp.edge_returns(nodes)  # α · log π(a | s), what the edges themselves pay
    later = mdp.remaining(nodes) - 1
    for row, text in enumerate(mdp.texts(nodes)):
        for action, token in enumerate(mdp.tree.tokens[nodes[row]].tolist()):
            letter = mdp.token_text(token) if token not in mdp.model.eos_token_ids else ""
            more = later[row] if letter else 0  # after the end nothing comes
            h[row, action] += 3 / 26 * min(len(set(text + letter)) + more, 7)
    return h


print("mean J on held-out prompts, by LM tokens a prompt")
for name, heuristic in (("the reward's bound", BoundHeuristic()), ("letters to come", letters_to_come)):
    planner = AStarPlanner(mdp, heuristic=heuristic)
    found = {budget: planner.plan_many(prompts, budget) for budget in (8, 16, 32, 64)}
    means = [f"{budget:>3}: {np.mean([p.objective for p in plans]):.3f}" for budget, plans in found.items()]
    print(f"{name:<20}", "   ".join(means))
best = np.mean([plan.objective for plan in AStarPlanner(mdp).plan_many(prompts)])
print(f"{'the best there is':<61} {best:.3f}")
