from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

from mball.memory.pace import Pace


def test_beside_one_that_rests_nothing_is_held_up() -> None:
    pace, both = Pace(lambda: False, share=1e-9), threading.Barrier(2, timeout=30)

    def work(_: int) -> None:
        with pace.turn():
            both.wait()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(2)))


def test_beside_one_that_computes_it_is_alone_and_pauses() -> None:
    pace, inside, most = Pace(lambda: True, share=0.5), 0, 0

    def work(_: int) -> None:
        nonlocal inside, most
        with pace.turn():
            inside += 1
            most = max(most, inside)
            time.sleep(0.02)
            inside -= 1

    began = time.monotonic()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(8)))
    assert most == 1
    assert time.monotonic() - began >= 8 * 2 * 0.02


def test_who_waits_for_it_ends_a_pause() -> None:
    pace, entered = Pace(lambda: True, share=1e-9), threading.Event()

    def work() -> None:
        with pace.turn():
            entered.set()
            time.sleep(0.001)
        with pace.turn():
            pass

    thread = threading.Thread(target=work)
    thread.start()
    assert entered.wait(30)
    pace.hurry()
    thread.join(30)
    assert not thread.is_alive()


def test_it_gives_way_for_so_long_and_no_longer() -> None:
    pace = Pace(lambda: True, share=1e-9, gives_way_s=0.0)
    for _ in range(3):
        with pace.turn():
            pass
