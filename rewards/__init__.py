"""How good a text is: pluggable, batched, checked and composable rewards.

`as_reward` turns a name, a weighted sum or a plain function into a `Reward`; subclass `Reward` to write one with a
potential or with state. Importing this package loads no reward's library.
"""

from .base import OnError, Reward, WeightedSum
from .composition import clip, minimum, normalise
from .functions import FunctionReward, RewardSpec, as_reward
from .registry import make_reward, register_reward, reward_names
from .specs import parse_spec

__all__ = [
    "FunctionReward",
    "OnError",
    "Reward",
    "RewardSpec",
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
