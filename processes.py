"""Functions called in other processes, with a limit on the time of a call."""

from __future__ import annotations

import contextlib
import multiprocessing.spawn
import os
import pickle
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from multiprocessing.process import current_process
from typing import IO, Any

from .errors import ConfigurationError, QStarError, WorkerError

__all__ = ["Limited", "TimeLimitError"]


class TimeLimitError(TimeoutError):
    """Raised when a call took longer than its limit; not by the function itself."""


class Limited:
    """A function that runs in processes of its own, one call at a time in each, and is killed when it takes too long.

    Any number of threads may call it. A process is started when no idle one is left, and kept for the next call.
    Starting it and preparing it are no part of a call's time.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        seconds: float | None,
        prepare: tuple[Any, ...] = (),
        with_main: bool = False,
    ) -> None:
        """Describe the calls; nothing is started yet.

        Args:
            function: A function of a module.
            seconds: Time that a call may take; None for any time.
            prepare: A function and its arguments, called first in every new process, such as one that loads a library.
            with_main: Whether the main module is imported there, as multiprocessing does, because arguments may be
                objects of its classes. The main module then needs ``if __name__ == "__main__":``.
        """
        self.function, self.seconds, self.prepare, self.with_main = function, seconds, prepare, with_main
        self._idle: list[_Process] = []
        self._busy: set[_Process] = set()

    def __call__(self, *args: Any) -> Any:
        """Return the function's value.

        Raises:
            TimeLimitError: It took longer than the limit; its process is killed.
            WorkerError: Its process died.
            Exception: The function raised it.
        """
        process = self._take()
        self._busy.add(process)
        try:
            return process.call(self.seconds, self.function, *args)
        finally:
            self._busy.discard(process)
            if process.is_usable:
                self._idle.append(process)

    def close(self) -> None:
        """End the processes, those that are at work too; the next call starts new ones."""
        while self._idle:
            self._idle.pop().close()
        for process in list(self._busy):
            process.close()

    @property
    def pids(self) -> list[int]:
        """The idle processes' numbers."""
        return [process.pid for process in self._idle]

    def _take(self) -> _Process:
        while True:
            try:
                process = self._idle.pop()
            except IndexError:
                break
            if process.is_usable:
                return process
        process = _Process(with_main=self.with_main)
        if self.prepare:
            process.call(None, _prepare, *self.prepare)
        return process


class _Process:
    """A process that answers one call after another over its standard input and output."""

    def __init__(self, *, with_main: bool) -> None:
        if getattr(current_process(), "_inheriting", False):
            raise ConfigurationError(
                "other processes import the main module, which starts processes itself as it is imported; put what it "
                "runs under if __name__ == '__main__':"
            )
        code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import _serve; _serve()"
        self._popen = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._owner = os.getpid()
        self.close: Callable[[], Any] = weakref.finalize(self, _end, self._popen, self._owner)
        if with_main:
            data = multiprocessing.spawn.get_preparation_data(current_process().name)
            data.pop("authkey", None)  # which is not to be pickled, and not needed
            self.call(None, _import_main, data)

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def is_usable(self) -> bool:
        """Whether the process lives and is this process's own, not that of one that was forked."""
        return self._owner == os.getpid() and self._popen.poll() is None

    def call(self, seconds: float | None, function: Callable[..., Any], *args: Any) -> Any:
        request = pickle.dumps((function, args))
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        timer = threading.Timer(seconds, self._popen.kill) if seconds is not None else None
        start = time.perf_counter()
        try:
            _write(self._popen.stdin, request)
            if timer is not None:
                timer.daemon = True
                timer.start()
            good, answer = pickle.loads(_read(self._popen.stdout))
        except BaseException as error:
            self.close()  # an answer to this call must not be taken for one to the next
            if seconds is not None and time.perf_counter() - start >= seconds:
                raise TimeLimitError(f"took more than {seconds:g} s") from None
            if isinstance(error, (OSError, EOFError, pickle.UnpicklingError)):
                raise WorkerError("a process died during a call; it may have run out of memory") from error
            raise
        finally:
            if timer is not None:
                timer.cancel()
        if seconds is not None and time.perf_counter() - start > seconds:  # before the timer came to it
            raise TimeLimitError(f"took more than {seconds:g} s")
        if good:
            return answer
        raise answer


def _end(popen: subprocess.Popen[bytes], owner: int) -> None:
    if owner == os.getpid():
        popen.kill()
        popen.wait()
        for pipe in (popen.stdin, popen.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # what was not written yet has no reader
                    pipe.close()


def _write(pipe: IO[bytes], data: bytes) -> None:
    pipe.write(len(data).to_bytes(8, "big") + data)
    pipe.flush()


def _read(pipe: IO[bytes]) -> bytes:
    """Read what `_write` wrote; raise EOFError where the other side is gone."""
    data = pipe.read(int.from_bytes(size, "big")) if len(size := pipe.read(8)) == 8 else b""
    if not data:
        raise EOFError
    return data


# ----------------------------------------------------------------------------------------------- in the other process


def _serve() -> None:
    """Answer calls until the caller is gone."""
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    # What functions print goes to the standard error, and they read nothing.
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    while True:
        try:
            request = _read(requests)
        except EOFError:
            return
        try:
            function, args = pickle.loads(request)
        except Exception as error:  # an argument that cannot be loaded here
            answer = _dumped(False, error)
        else:
            try:
                answer = _dumped(True, function(*args))
            except Exception as error:
                answer = _dumped(False, error)
        try:
            _write(answers, answer)
        except OSError:
            return


def _dumped(good: bool, answer: Any) -> bytes:
    """Pickle an answer; one that cannot be pickled and loaded again becomes an error that tells of it."""
    try:
        pickle.loads(data := pickle.dumps((good, answer)))
    except Exception as error:
        told = answer if isinstance(answer, Exception) else error
        data = pickle.dumps((False, QStarError(f"{type(told).__name__}: {told}")))
    return data


def _prepare(function: Callable[..., Any], *args: Any) -> None:
    function(*args)  # its value, such as a library, may not be picklable


def _import_main(data: dict[str, Any]) -> None:
    process: Any = current_process()
    process._inheriting = True
    try:
        multiprocessing.spawn.prepare(data)
    finally:
        del process._inheriting
