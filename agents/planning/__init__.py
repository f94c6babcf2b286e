"""Algorithms of search: A*, beams, samplers, tree searches."""

from typing import Any

import lazy_loader

from ...deprecated import find_moved_name

# The names stand in __init__.pyi, once; a name is imported when it is first used.
_find, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    try:
        return _find(name)
    except AttributeError:
        return find_moved_name(__name__, name)
