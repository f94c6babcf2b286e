"""Workers in the processes of a Ray cluster."""

from __future__ import annotations

import logging
import math
import os
import shutil
import socket
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from ...checks import check_integer, check_number, first_line
from ...errors import ConfigurationError, QStarError, WorkerError
from .jobs import Job

__all__ = ["RayWorkers", "check_address"]

ATTEMPTS = 3  # workers that may die over one job before it counts as the cause
_CONNECT_SECONDS = 5.0
_PAUSE = 0.5  # seconds
_START_SECONDS = 300.0  # a worker may have to convert or download its language model
_OBJECT_STORE_BYTES = 1 << 28  # for weights and results in transit; Ray would reserve a third of the memory


class RayWorkers:
    """Processes of a Ray cluster, each of which runs one job at a time.

    A worker takes its next job when it has finished the last one, so the load balances itself. Ray restarts a worker
    that dies, on another machine if its own is gone. Its job goes back to the front of the queue, and the others
    continue meanwhile.

    Use it as a context manager, or call :meth:`close`.
    """

    def __init__(
        self,
        address: str,
        make: Callable[[], Any],
        *,
        count: int | None = None,
        threads: int = 1,
        gpus: float = 0.0,
    ) -> None:
        """Connect to a cluster and begin to start the workers.

        Args:
            address: ``"local"`` starts a cluster on this machine for as long as the workers live, which listens on
                loopback only. Otherwise the address of a running one: ``"host:6379"``, ``"ray://host:10001"`` or
                ``"auto"``. A connection that this process already has takes precedence.
            make: Makes a worker's object; pickled, and called in every worker.
            count: Number of workers; None for as many as the cluster has processors for.
            threads: Threads of torch in each worker; as many processors are reserved for it.
            gpus: GPUs reserved for each worker; a fraction shares one.

        Raises:
            ConfigurationError: Ray is not installed, the address does not answer, or the cluster is too small.
        """
        if count is not None:
            check_integer("the number of workers", count)
        threads, gpus = check_integer("threads", threads), check_number("gpus", gpus, low=0)
        self._folder: str | None = None
        self._ray = ray = _import_ray(alone=address == "local")
        self._connected = not ray.is_initialized()
        if self._connected:
            self._connect(address, count, threads)
        try:
            processors = int(ray.cluster_resources().get("CPU", 0))
            self.count = count or max(processors // threads, 1)
            if self.count * threads > processors:
                raise ConfigurationError(
                    f"{self.count} workers of {threads} threads need {self.count * threads} processors, and the "
                    f"cluster at {address!r} has {processors}; ask for fewer, or add machines with "
                    "`ray start --address=…`"
                )
            self._news: tuple[int, list[Any]] = (0, [])
            self._make = [ray.put(make)]  # stored once for all workers
            # Ray restarts workers and repeats no call: whether a job is repeated is decided here.
            options = {"num_cpus": threads, "num_gpus": gpus, "max_restarts": -1, "max_task_retries": 0}
            actor = ray.remote(Worker).options(**options)
            self._slots = [_Slot(actor.remote(threads)) for _ in range(self.count)]
            self._waited_for: dict[Any, _Slot] = {}  # calls whose end frees a slot
            for slot in self._slots:
                self._start(slot)
        except BaseException:
            self._disconnect()
            raise

    def run(
        self, jobs: Iterable[Job], *, keep_going: bool = False, started: Callable[[Job], None] | None = None
    ) -> Iterator[tuple[Job, Any]]:
        """See :class:`Workers`."""
        queue, lost = _Queue(jobs), Counter[Job]()
        in_hand: dict[Any, tuple[_Slot, Job]] = {}
        patience = time.monotonic() + _START_SECONDS
        try:
            while queue or in_hand:
                self._start_again()
                for slot in self._slots:
                    if slot.free and queue:
                        job = queue.take(slot)
                        if started is not None:
                            started(job)
                        in_hand[slot.actor.work.remote(self._make, job.method, job.args, self._news)] = slot, job
                        slot.free = False
                if not self._slots or (not in_hand and time.monotonic() > patience):
                    raise WorkerError(
                        f"no worker became ready: {self._why or f'nothing was heard of them for {_START_SECONDS:g} s'}"
                        "; every machine of the cluster needs this version of qstar-decoding and free processors"
                    )
                for ref in self._ready([*in_hand, *self._waited_for]):
                    if ref in self._waited_for:
                        self._arrived(ref)
                        continue
                    slot, job = in_hand.pop(ref)
                    result = self._result(ref, slot)
                    patience = time.monotonic() + _START_SECONDS
                    if isinstance(result, _Lost):
                        lost[job] += 1
                        if job.parts:
                            queue.put_back(job.parts)
                            continue
                        if lost[job] < ATTEMPTS:
                            queue.put_back([job])
                            continue
                        result = WorkerError(f"{job.name}: {ATTEMPTS} workers died over it; the last: {result.reason}")
                    if isinstance(result, Exception) and not keep_going:
                        raise result
                    yield job, result
        finally:
            # A caller that stops iterating leaves jobs behind; calls are done in order, so this one ends after them.
            for slot, _ in in_hand.values():
                if slot in self._slots:
                    self._start(slot)

    def share(self, value: Any) -> None:
        """See :class:`Workers`: the value is stored once, and a worker whose version is another fetches it."""
        self._news = self._news[0] + 1, [self._ray.put(value)]

    def pids(self) -> list[int]:
        """Return the workers' process ids, once all have started."""
        while not all(slot.free for slot in self._slots):
            self._start_again()
            for ref in self._ready(list(self._waited_for)):
                self._arrived(ref)
        found: list[int] = self._ray.get([slot.actor.start.remote(self._make) for slot in self._slots])
        return found

    def close(self) -> None:
        """Stop the workers, and the cluster if it was started for them."""
        for slot in self._slots:
            self._ray.kill(slot.actor)
        self._slots = []
        self._disconnect()

    def __enter__(self) -> Self:
        """Return the workers."""
        return self

    def __exit__(self, *_: object) -> None:
        """See :meth:`close`."""
        self.close()

    # -----------------------------------------------------------------------------------------------------------------

    _why = ""  # the reason of the last worker that did not start

    def _ready(self, refs: list[Any]) -> list[Any]:
        """Wait a moment for calls to end; return the finished ones."""
        if not refs:
            time.sleep(_PAUSE)
            return []
        done: list[Any] = self._ray.wait(refs, num_returns=1, timeout=_PAUSE)[0]
        if done and len(refs) > 1:  # all finished ones: each wait costs time in proportion to the workers
            done = self._ray.wait(refs, num_returns=len(refs), timeout=0)[0]
        return done

    def _start(self, slot: _Slot) -> None:
        slot.free, slot.again = False, math.inf
        self._waited_for[slot.actor.start.remote(self._make)] = slot

    def _start_again(self) -> None:
        """Ask the workers again that Ray was still restarting."""
        for slot in self._slots:
            if slot.again < time.monotonic():
                self._start(slot)

    def _arrived(self, ref: Any) -> None:
        """Take note that a worker has started, or has not."""
        slot = self._waited_for.pop(ref)
        try:
            self._ray.get(ref)
        except self._ray.exceptions.RayTaskError as error:
            raise _cause(error) from None  # its object cannot be made, there or anywhere
        except self._ray.exceptions.RayError as error:
            self._why, now = first_line(error), time.monotonic()
            if isinstance(error, self._ray.exceptions.ActorDiedError) or now > slot.since + _START_SECONDS:
                self._slots.remove(slot)  # for good
            else:
                slot.again = now + _PAUSE
        else:
            slot.free = True

    def _result(self, ref: Any, slot: _Slot) -> Any:
        """Return a job's value, its exception, or the fact that it was lost."""
        try:
            result = self._ray.get(ref)
        except self._ray.exceptions.RayTaskError as error:
            result = _cause(error)
        except self._ray.exceptions.RayError as error:
            slot.since = time.monotonic()
            self._start(slot)
            return _Lost(first_line(error))
        slot.free = True
        return result

    def _connect(self, address: str, count: int | None, threads: int) -> None:
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if address == "local":
            # A socket's path has room for 107 characters, which a user's TMPDIR and Ray's names may exceed.
            self._folder = tempfile.mkdtemp(prefix="qstar-", dir="/tmp" if os.path.isdir("/tmp") else None)
            processors = (count or max((os.cpu_count() or 1) // threads, 1)) * threads
            options |= {
                "num_cpus": processors,
                "include_dashboard": False,
                "object_store_memory": _OBJECT_STORE_BYTES,
                "_temp_dir": self._folder,
                "address": "local",
            }
        else:
            check_address(address)
            options["address"] = address
        try:
            self._ray.init(**options)
        except (Exception, SystemExit) as error:  # Ray leaves the process when a cluster stops answering in between
            self._disconnect()
            raise ConfigurationError(f"cannot use the Ray cluster at {address!r}: {first_line(error)}") from error

    def _disconnect(self) -> None:
        if self._connected:
            self._ray.shutdown()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


class Worker:
    """The actor in each process of the cluster."""

    def __init__(self, threads: int) -> None:
        """Hold nothing yet: making the object takes long and may fail, so ``start`` does it."""
        self.held: Any = None
        self.version = 0
        os.environ["OMP_NUM_THREADS"] = str(threads)  # which torch reads when it is loaded

    def start(self, make: list[Any]) -> int:
        """Make this worker's object, unless that is done; return the process's id.

        Args:
            make: A reference to the function, in a list, so that Ray does not fetch it unasked.
        """
        if self.held is None:
            import ray

            self.held = ray.get(make[0])()
        return os.getpid()

    def work(self, make: list[Any], method: str, args: tuple[Any, ...], news: tuple[int, list[Any]]) -> Any:
        """Run a job with the version of the shared value that belongs to it.

        Args:
            make: See ``start``; Ray may have restarted this worker between two jobs.
            method: See :class:`Job`.
            args: See :class:`Job`.
            news: The version, and a reference to the value in a list.
        """
        self.start(make)
        version, box = news
        if version != self.version:
            import ray

            self.held.receive(ray.get(box[0]))
            self.version = version
        return getattr(self.held, method)(*args)


@dataclass(eq=False)
class _Slot:
    """The scheduler's view of a worker."""

    actor: Any
    free: bool = False
    group: str | None = None
    since: float = field(default_factory=time.monotonic)  # the time at which it began to start
    again: float = math.inf  # the time at which to ask it again whether it has started


@dataclass
class _Lost:
    reason: str


@dataclass
class _Queue:
    """The waiting jobs by group, each group in order."""

    jobs: Iterable[Job]
    waiting: dict[str, deque[Job]] = field(default_factory=dict)
    workers: Counter[str | None] = field(default_factory=Counter)  # by the group of their last job

    def __post_init__(self) -> None:
        for job in self.jobs:
            self.waiting.setdefault(job.group, deque()).append(job)

    def __bool__(self) -> bool:
        return bool(self.waiting)

    def put_back(self, jobs: Sequence[Job]) -> None:
        for job in reversed(jobs):
            self.waiting.setdefault(job.group, deque()).appendleft(job)

    def take(self, slot: _Slot) -> Job:
        """Return a job of the slot's own group, or else of the one with the most waiting jobs per worker."""
        if slot.group not in self.waiting:
            self.workers[slot.group] -= 1
            slot.group = max(self.waiting, key=lambda group: len(self.waiting[group]) / (1 + self.workers[group]))
            self.workers[slot.group] += 1
        jobs = self.waiting[slot.group]
        job = jobs.popleft()
        if not jobs:
            del self.waiting[slot.group]
        return job


def _import_ray(alone: bool) -> Any:
    """Import Ray without usage reports, and without a port open to other machines where it runs here alone."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # a future default, of which it warns
    if alone:
        # Ray's switch for loopback, its default on Windows and macOS. Elsewhere it replaces 127.0.0.1 by the machine's
        # address, and everybody who reaches that may run code.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        os.environ.setdefault("RAY_worker_niceness", "0")  # 15 otherwise: slower than without Ray on a busy machine
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise ConfigurationError(f'Ray is not installed ({error}): run pip install "qstar-decoding[ray]"') from error
    return ray


def check_address(address: str) -> None:
    """Check that a cluster answers at an address. Ray itself would retry for minutes.

    Raises:
        ConfigurationError: Ray is not installed, nothing answers, or something that does not speak Ray's protocol.
    """
    _import_ray(alone=address == "local")
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS", address)
    if address in ("auto", "local"):
        return  # Ray looks for a cluster on this machine, and fails at once if there is none
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise ConfigurationError(
            f"a Ray address is 'local', 'auto', 'host:6379' or 'ray://host:10001', got {address!r}"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ConfigurationError(
            f"no Ray cluster answers at {address!r} ({error}); start one there with `ray start --head`, or give "
            "'local' to use this machine alone"
        ) from None
    if os.environ.get("RAY_USE_TLS", "0") != "0":
        return  # needs the cluster's certificates
    import grpc

    method = "RayletDriver/ClusterInfo" if address.startswith("ray://") else "NodeInfoGcsService/CheckAlive"
    with grpc.insecure_channel(f"{host}:{port}") as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=_CONNECT_SECONDS)
            channel.unary_unary(f"/ray.rpc.{method}")(b"", timeout=_CONNECT_SECONDS)
        except grpc.FutureTimeoutError:
            raise ConfigurationError(
                f"the server at {address!r} is no Ray cluster (it does not speak gRPC); `ray status` on the head's "
                "machine shows its address"
            ) from None
        except grpc.RpcError as error:
            # This call carries no token. Only a refusal for that matters, and only if Ray carries none either.
            locked = error.code() == grpc.StatusCode.UNAUTHENTICATED
            if locked and os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
                raise ConfigurationError(
                    f"the Ray cluster at {address!r} asks for its token: set RAY_AUTH_MODE=token, and have the head's "
                    "token in ~/.ray/auth_token (`ray get-auth-token` shows it there) or RAY_AUTH_TOKEN"
                ) from None


def _cause(error: Any) -> Exception:
    """Return a job's exception: our own errors as they are, others as Ray shows them, with the worker's traceback."""
    cause: Exception = error.cause if isinstance(error.cause, QStarError) else error
    return cause
