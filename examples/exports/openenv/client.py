"""A client of ``server.py``: plays an episode greedily, beside the text that a search finds."""

import sys

from openenv.core import GenericEnvClient


def play(address: str, prompt: str | None = None, plan_tokens: int = 0) -> dict:
    """Take the likeliest token until the text ends; return the last observation, and the return of the episode."""
    with GenericEnvClient(base_url=address).sync() as client:
        result = client.reset(prompt=prompt, plan_tokens=plan_tokens)
        reference, total = result.observation["reference"], 0.0
        while not result.done:
            legal = [rank for rank, logprob in enumerate(result.observation["logprobs"]) if logprob is not None]
            result = client.step({"action": legal[0]})
            total += result.reward
        return {**result.observation, "reference": reference, "return": total}


if __name__ == "__main__":
    print(play(sys.argv[1] if len(sys.argv) > 1 else "http://localhost:8000", plan_tokens=100))
