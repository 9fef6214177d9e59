from __future__ import annotations

import functools
import threading
from collections.abc import Iterator

import pytest

from mball.errors import Cancelled
from mball.swap.threads import Threads

WAIT_S = 60.0


@pytest.fixture
def threads() -> Iterator[Threads]:
    made = Threads(2)
    yield made
    assert made.close(WAIT_S)


def test_all_are_done(threads: Threads) -> None:
    assert threads.run((functools.partial(int, n) for n in range(100)), reading=True, deadline_s=WAIT_S) == 4950
    assert threads.run([], reading=False, deadline_s=WAIT_S) == 0


def test_reads_come_before_writes_that_wait_longer(threads: Threads) -> None:
    """One write is under way, and holds its thread; another waits. Reads are served by the thread that is left."""
    begun, go, order = threading.Event(), threading.Event(), list[str]()

    def write(name: str) -> int:
        begun.set()
        go.wait(WAIT_S)
        order.append(name)
        return 1

    writer = threading.Thread(
        target=lambda: threads.run(
            [functools.partial(write, "first"), functools.partial(write, "second")], reading=False, deadline_s=WAIT_S
        )
    )
    writer.start()
    assert begun.wait(WAIT_S)

    def read() -> int:
        order.append("read")
        return 1

    assert threads.run([read, read], reading=True, deadline_s=WAIT_S) == 2
    go.set()
    writer.join(WAIT_S)
    assert order == ["read", "read", "first", "second"]


def test_the_first_error_ends_all(threads: Threads) -> None:
    done: list[int] = []

    def fail() -> int:
        raise OSError(5, "planted")

    def work() -> int:
        done.append(1)
        return threading.Event().wait(0.01)

    with pytest.raises(OSError, match="planted"):
        threads.run([fail, *[work] * 1000], reading=True, deadline_s=WAIT_S)
    assert len(done) < 1000


def test_given_up(threads: Threads) -> None:
    cancel, done = threading.Event(), list[int]()

    def work() -> int:
        cancel.set()
        done.append(1)
        return threading.Event().wait(0.01)

    with pytest.raises(Cancelled):
        threads.run([work] * 1000, reading=False, deadline_s=WAIT_S, cancel=cancel)
    count = len(done)
    assert count < 1000
    assert threads.run([lambda: 7], reading=False, deadline_s=WAIT_S) == 7
    assert len(done) == count, "nothing of it runs any more"


def test_what_hangs_is_no_longer_waited_for() -> None:
    threads, go = Threads(2), threading.Event()
    with pytest.raises(TimeoutError, match="has not answered"):
        threads.run([lambda: int(go.wait(WAIT_S))], reading=True, deadline_s=0.05)
    assert not threads.close(0.05)
    go.set()
    assert threads.close(WAIT_S)
    with pytest.raises(Cancelled, match="closed"):
        threads.run([lambda: 1], reading=True, deadline_s=WAIT_S)


def test_closing_gives_up_what_waits() -> None:
    threads, begun, go, said = Threads(2), threading.Event(), threading.Event(), list[str]()

    def work() -> int:
        begun.set()
        return int(go.wait(WAIT_S))

    def run() -> None:
        try:
            threads.run([work, work], reading=False, deadline_s=WAIT_S)
        except Cancelled as error:
            said.append(str(error))

    caller = threading.Thread(target=run)
    caller.start()
    assert begun.wait(WAIT_S)
    assert not threads.close(0.0)
    go.set()
    caller.join(WAIT_S)
    assert said == ["the store is closed"]
    assert threads.close(WAIT_S)
