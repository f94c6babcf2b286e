"""Rewards: pluggable, batched, checked and composable scores of texts.

`as_reward` turns a name, a weighted sum or a plain function into a `Reward`; subclass `Reward` to write one with a
potential or with state. Importing this package loads no optional library.
"""

from .base import Reward
from .composition import WeightedSum, clip, minimum, normalise
from .functions import FunctionReward, RewardSpec, as_reward
from .registry import make_reward, register_reward, reward_names
from .specs import parse_spec
from .types import Column, OnError, RewardOptions, Scores, Texts, TokenIds

__all__ = [
    "Column",
    "FunctionReward",
    "OnError",
    "Reward",
    "RewardOptions",
    "RewardSpec",
    "Scores",
    "Texts",
    "TokenIds",
    "WeightedSum",
    "as_reward",
    "clip",
    "make_reward",
    "minimum",
    "normalise",
    "parse_spec",
    "register_reward",
    "reward_names",
]
