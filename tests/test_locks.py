"""The fair lock: its order, its re-entrance, and what an interrupt leaves behind."""

import ctypes
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from qstar_decoding.locks import FairLock


def waiting(lock, count):
    """Wait until ``count`` threads stand in the queue."""
    while len(lock._queue) < count:
        time.sleep(0.001)


def test_threads_get_it_in_the_order_in_which_they_asked():
    lock, order = FairLock(), []

    def ask(name):
        with lock:
            order.append(name)

    threads = [threading.Thread(target=ask, args=(name,)) for name in range(6)]
    with lock, lock:  # re-entrant
        for count, thread in enumerate(threads):
            thread.start()
            waiting(lock, count + 1)
    with lock:  # comes after those that waited
        assert order == [*range(6)]
    for thread in threads:
        thread.join(10)


def test_a_thread_that_asks_again_comes_after_those_that_wait():
    lock, turns, go_on = FairLock(), [], threading.Event()

    def work(name):
        go_on.wait(10)
        for _ in range(50):
            with lock:
                turns.append(name)
                time.sleep(0.001)

    threads = [threading.Thread(target=work, args=(name,)) for name in range(3)]
    for thread in threads:
        thread.start()
    with lock:
        go_on.set()
        waiting(lock, 3)
    for thread in threads:
        thread.join(30)
    # While all three are at work, each has its turn in every three.
    assert all(set(turns[i : i + 3]) == {0, 1, 2} for i in range(0, 120, 3))


def test_it_keeps_others_out_under_contention():
    lock, total = FairLock(), [0]

    def add():
        for _ in range(300):
            with lock, lock:
                before = total[0]
                time.sleep(0)
                total[0] = before + 1

    threads = [threading.Thread(target=add) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert total == [1800]
    assert lock._owner is None


def test_a_thread_that_does_not_have_it_cannot_release_it():
    lock = FairLock()
    with pytest.raises(RuntimeError, match="does not have"):
        lock.release()
    with lock, ThreadPoolExecutor(1) as pool, pytest.raises(RuntimeError, match="does not have"):
        pool.submit(lock.release).result(10)
    with lock:
        pass


def test_a_thread_that_is_interrupted_while_it_waits_leaves_the_queue():
    lock, outcome = FairLock(), []

    def ask():
        try:
            with lock:
                outcome.append("had it")
        except KeyboardInterrupt:
            outcome.append("interrupted")

    thread = threading.Thread(target=ask)
    with lock:
        thread.start()
        waiting(lock, 1)
        interrupt = ctypes.py_object(KeyboardInterrupt)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), interrupt)
    thread.join(10)  # a thread sees it once its wait is over: the lock was handed over to it
    assert outcome[0] in ("interrupted", "had it")
    done = threading.Thread(target=lambda: lock.__enter__())
    done.start()
    done.join(10)
    assert not done.is_alive()
