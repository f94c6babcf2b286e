"""Q* = Q-learning + A*, for language-model decoding.

Importing the package registers the Gymnasium environment ``TokenDecoding-v0`` and loads nothing heavy;
the rooms are :mod:`qstar_decoding.models`, :mod:`qstar_decoding.rewards`, :mod:`qstar_decoding.envs` and
:mod:`qstar_decoding.agents`.
"""

from gymnasium.envs.registration import register

from . import deprecated

__version__ = "0.2.0"

register(
    id="TokenDecoding-v0",
    entry_point="qstar_decoding.envs.token_decoding:TokenDecodingEnv",
    vector_entry_point="qstar_decoding.envs.vector:TokenDecodingVectorEnv",
    # Masked top-k decoding is deterministic given the actions; only the choice of the prompt is random.
    nondeterministic=False,
)

deprecated.install()
