"""Old names that work with a warning until version 0.3: module paths, names and methods of version 0.1."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, TypeVar

__all__ = ["MOVED", "MOVED_NAMES", "find_moved_name", "install", "with_old_names"]

C = TypeVar("C", bound=type)

_ROOT = __package__ or "qstar_decoding"

# By old path, the modules that its names have moved to; relative to the package.
MOVED: dict[str, tuple[str, ...]] = {
    "agents.astar": ("agents.planning.astar",),
    "agents.batch": ("agents.distributed.batch",),
    "agents.checkpoints": (
        "agents.learning.checkpoints",
        "agents.learning.q_function",
        "agents.learning.q_heuristic",
    ),
    "agents.comparison": ("agents.evaluation.comparison",),
    "agents.contenders": ("agents.planning.registry",),
    "agents.decoders": ("agents.planning.greedy", "agents.planning.beam", "agents.planning.sampling"),
    "agents.diagnostics": (
        "agents.evaluation.diagnostics",
        "agents.evaluation.calibration",
        "agents.evaluation.curves",
    ),
    "agents.experience": ("agents.learning.experience", "agents.search.backup"),
    "agents.hub": ("agents.learning.hub",),
    "agents.masked_dqn": ("agents.learning.dqn.masked_dqn",),
    "agents.plots": ("agents.evaluation.plots", "agents.evaluation.curves"),
    "agents.policies": ("agents.learning.policies",),
    "agents.q_function": (
        "agents.learning.q_function",
        "agents.learning.q_heuristic",
        "agents.learning.checkpoints",
    ),
    "agents.qstar": ("agents.learning.qstar", "agents.learning.experience", "agents.learning.config"),
    "agents.replay": ("agents.learning.dqn.replay",),
    "agents.report": ("agents.evaluation.report",),
    "agents.results": ("agents.evaluation.results",),
    "agents.search_tree": ("agents.search.snapshot",),
    "agents.tree_search": ("agents.planning.mcts", "agents.planning.levin", "agents.planning.particles"),
    "console": ("cli.console",),
    "doctor": ("cli.doctor",),
    "envs.embedded_model": ("models.embedded_model",),
    "envs.kv_pool": ("models.tree_engine",),
    "envs.language_model": ("models.base", "models.transformers_lm", "models.registry"),
    "envs.prepacking": ("models.flat.packed_weights",),
    "envs.toy": ("models.tabular",),
    "rewards.classifier": ("rewards.library.classifier",),
    "rewards.creativity": ("rewards.library.creativity",),
    "rewards.engagement": ("rewards.library.engagement",),
    "rewards.guidelines": ("rewards.library.guidelines",),
    "rewards.language": ("rewards.library.language", "rewards.library.likelihood"),
    "rewards.profanity": ("rewards.library.classifier",),
    "rewards.reasoning": ("rewards.library.reasoning",),
    "rewards.relevance": ("rewards.library.relevance",),
    "rewards.sentiment": ("rewards.library.sentiment",),
}

# By module that is still there, the names that have left it, and their new homes.
MOVED_NAMES: dict[str, dict[str, str]] = {
    "agents.heuristics": {
        "QHeuristic": "agents.learning.q_heuristic",
        "ValueHeuristic": "agents.learning.q_heuristic",
        "shipped_heuristic": "agents.learning.q_heuristic",
    },
    "agents.planning": {"Plan": "agents.search.plan", "mdp_of": "envs.mdp"},
}


def find_moved_name(module: str, name: str) -> Any:
    """Return a name that has left ``module``, with a warning; the ``__getattr__`` of such modules.

    Raises:
        AttributeError: The module never had such a name.
    """
    home = MOVED_NAMES[module.partition(".")[2]].get(name)
    if home is None:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    warnings.warn(
        f"{module}.{name} has moved to {_ROOT}.{home}; the old place goes in version 0.3",
        DeprecationWarning,
        stacklevel=3,
    )
    return getattr(importlib.import_module(f"{_ROOT}.{home}"), name)


class _Moved(MetaPathFinder, Loader):
    """Makes a module of an old path whose names are those of the new modules."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        del path, target
        root, _, name = fullname.partition(".")
        return ModuleSpec(fullname, self) if root == _ROOT and name in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        homes = [f"{_ROOT}.{home}" for home in MOVED[module.__name__.partition(".")[2]]]
        warnings.warn(
            f"{module.__name__} has moved to {' and '.join(homes)}; the old path goes in version 0.3",
            DeprecationWarning,
            stacklevel=2,
        )

        def find(name: str) -> Any:
            for home in homes:
                if hasattr(found := importlib.import_module(home), name):
                    return getattr(found, name)
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

        vars(module)["__getattr__"] = find


def install() -> None:
    """Let Python's import find the old paths, after everything else."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.append(_Moved())


def with_old_names(**names: str) -> Callable[[C], C]:
    """Return a class decorator that adds deprecated methods.

    Args:
        names: By old name, the method that it calls.
    """

    def decorate(cls: C) -> C:
        for old, new in names.items():
            setattr(cls, old, _alias(f"{cls.__name__}.{old}", new))
        return cls

    return decorate


def _alias(old: str, new: str) -> Callable[..., Any]:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        warnings.warn(f"{old} is called {new} now; the old name goes in version 0.3", DeprecationWarning, stacklevel=2)
        return getattr(self, new)(*args, **kwargs)

    method.__doc__ = f"Call :meth:`{new}` (deprecated)."
    return method
