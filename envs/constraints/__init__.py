"""Hard constraints on completions, and the stop strings that end them.

A constraint is given to the environment (``gym.make("TokenDecoding-v0", constraint=…)``) or to the MDP. The k
candidates of a state are then the k likeliest *allowed* tokens, with the log-probabilities of the full softmax. All
constraints of a list must hold. Every constraint speaks of the returned text: the completion up to its stop string.
"""

import lazy_loader

# The names stand in __init__.pyi, once; a name is imported when it is first used.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
