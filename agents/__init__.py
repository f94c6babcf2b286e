"""Planners, baseline decoders, and agents that learn Q.

A name is imported when it is first used, so planning does not load the learners.
"""

from typing import Any

import lazy_loader

# The names stand in __init__.pyi, once; a name is imported when it is first used.
_find, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    if name == "Contender":  # the name in version 0.1; its home warns
        from .planning import registry

        return registry.Contender
    return _find(name)
