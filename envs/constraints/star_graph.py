"""Star graphs: find the path from the centre to a named leaf."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import NamedTuple

from ...errors import ConfigurationError
from ...rewards.checking import plain
from ..prompts import Prompt
from .moves import MovesConstraint

__all__ = ["StarGraphConstraint"]


class _Walk(NamedTuple):
    """Edges of the graph, and the node at which a path has arrived; ``""`` before its first node."""

    edges: tuple[tuple[str, str], ...]
    node: str
    start: str


class StarGraphConstraint(MovesConstraint):
    """Legal moves in a directed graph, from the columns ``edges`` and ``start``: each node follows along an edge.

    A path is written ``a>b>c``, begins at the start and ends where no edge goes on. The goal is not looked at.
    """

    def start(self, prompt: Prompt) -> Hashable:
        """See :class:`MovesConstraint`."""
        edges = plain(prompt.columns.get("edges"))
        start = prompt.columns.get("start")
        is_list = isinstance(edges, (list, tuple)) and all(
            isinstance(edge, (list, tuple)) and len(edge) == 2 and all(isinstance(n, str) and n for n in edge)
            for edge in edges
        )
        if not is_list or not isinstance(start, str) or not start:
            raise ConfigurationError(
                f"{self!r} reads the columns 'edges', a list of pairs of names, and 'start', a name; got edges="
                f"{str(edges)[:80]} and start={start!r} for the prompt {prompt.text[-60:]!r}"
            )
        return _Walk(tuple((a, b) for a, b in edges), "", start)

    def moves(self, state: Hashable) -> Iterable[tuple[str, Hashable]]:
        """See :class:`MovesConstraint`."""
        assert isinstance(state, _Walk)
        if not state.node:
            return [(state.start, state._replace(node=state.start))]
        return [(f">{b}", state._replace(node=b)) for a, b in state.edges if a == state.node]

    def is_final(self, state: Hashable) -> bool:
        """See :class:`MovesConstraint`."""
        assert isinstance(state, _Walk)
        return bool(state.node) and all(a != state.node for a, _ in state.edges)
