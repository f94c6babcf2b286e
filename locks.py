"""A lock that threads get in the order in which they asked for it."""

from __future__ import annotations

import threading
from collections import deque

__all__ = ["FairLock"]


class FairLock:
    """A re-entrant lock with a queue: a thread that releases it and asks again comes after those that wait.

    A :class:`threading.RLock` goes to the thread that happens to be awake, which is the one that has just released it.
    """

    def __init__(self) -> None:
        """Make a free lock."""
        self._mutex = threading.Lock()
        self._owner: int | None = None
        self._depth = 0
        self._queue: deque[tuple[int, threading.Lock]] = deque()

    def acquire(self) -> None:
        """Wait for the lock; the thread that has it already gets it again at once."""
        me = threading.get_ident()
        if self._owner == me:  # only this thread could change that
            self._depth += 1
            return
        with self._mutex:
            if self._owner is None:
                self._owner, self._depth = me, 1
                return
            turn = threading.Lock()
            turn.acquire()
            self._queue.append((me, turn))
        try:
            turn.acquire()  # released by the thread that hands the lock over
        except BaseException:  # Ctrl-C
            with self._mutex:
                if (me, turn) in self._queue:
                    self._queue.remove((me, turn))
                    raise
            self.release()  # it was handed over in the meantime
            raise

    def release(self) -> None:
        """Hand the lock to the thread that waits longest, if the caller has released it as often as it acquired it.

        Raises:
            RuntimeError: The caller does not have it.
        """
        if self._owner != threading.get_ident():
            raise RuntimeError("a thread releases a lock that it does not have")
        self._depth -= 1
        if self._depth:
            return
        with self._mutex:
            if not self._queue:
                self._owner = None
                return
            self._owner, turn = self._queue.popleft()
            self._depth = 1
            turn.release()

    def __enter__(self) -> None:
        """Do as :meth:`acquire`."""
        self.acquire()

    def __exit__(self, *error: object) -> None:
        """Do as :meth:`release`."""
        self.release()
