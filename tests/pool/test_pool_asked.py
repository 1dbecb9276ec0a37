"""Questions whose answers take their time."""

from __future__ import annotations

import threading
import time

from maehpc.pool.asked import Asked


def test_nobody_waits_for_the_newest_answer() -> None:
    gate, asked = threading.Semaphore(0), 0

    def question() -> int:
        nonlocal asked
        gate.acquire(timeout=10)
        asked += 1
        return asked

    one = Asked(question, every_s=0.0)
    assert one.newest() is None
    gate.release()
    deadline = time.monotonic() + 10
    while one.newest() != 1:
        assert time.monotonic() < deadline
    gate.release(2)


def test_what_is_asked_anew_is_answered_from_now_on() -> None:
    world = ["old"]
    one = Asked(lambda: world[0], every_s=1000.0)
    assert one.anew(10.0) == "old"
    world[0] = "new"
    assert one.newest() == "old" and one.anew(10.0) == "new"


def test_an_answer_to_an_earlier_question_is_not_taken_for_the_new_one() -> None:
    world, begun = ["old"], threading.Event()

    def question() -> str:
        found = world[0]
        begun.set()
        time.sleep(0.3)
        return found

    one = Asked(question, every_s=0.0)
    one.newest()
    begun.wait(10)
    world[0] = "new"
    assert one.anew(10.0) == "new"


def test_one_that_is_not_answered_is_waited_for_no_longer_than_said() -> None:
    over = threading.Event()
    one = Asked(lambda: over.wait(60), every_s=0.0)
    begun = time.monotonic()
    assert one.anew(0.2) is None and one.anew(0.2) is None and time.monotonic() - begun < 10
    over.set()
