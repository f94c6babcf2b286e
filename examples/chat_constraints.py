"""Chat messages in, JSON of a given form out, whatever the search prefers. Half a minute on two CPU cores."""

import json

import gymnasium as gym

from qstar_decoding.agents import AStarPlanner
from qstar_decoding.envs import BannedStrings, JSONConstraint

chat = [
    {"role": "system", "content": "You answer in JSON."},
    {"role": "user", "content": "Name a city that you would like to visit, its country, and whether it is sunny."},
]
name = {"type": "string", "maxLength": 20}
schema = {
    "type": "object",
    "properties": {"city": name, "country": name, "sunny": {"type": "boolean"}},
    "required": ["city", "country", "sunny"],
}


def answer(constraint):
    """The best text that A* finds with 100 LM tokens among those that keep the constraint."""
    env = gym.make(
        "qstar_decoding:TokenDecoding-v0", reward="sentiment", max_new_tokens=32, constraint=constraint, prompts=[chat]
    )
    return AStarPlanner(env).plan(chat, budget=100)


print("anything goes:          ", answer(None).text.strip())
as_json = answer(JSONConstraint(schema))
print("JSON of this schema:    ", json.loads(as_json.text), f"J {as_json.objective:.2f}")
city = json.loads(as_json.text)["city"]
other = answer([JSONConstraint(schema), BannedStrings(city)])
print(f"{f'without {city}:':<24}", json.loads(other.text), f"J {other.objective:.2f}")
