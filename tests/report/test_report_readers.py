"""The order of what is read, whether a file system answers at once or lets one wait."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from maehpc.report.readers import RUN, Readers


def none(shard: int) -> Iterator[str]:
    return iter(())


@pytest.mark.parametrize("count", [0, 1, RUN, RUN + 1, 5 * RUN + 3])
@pytest.mark.parametrize("slow", [True, False])
def test_results_come_in_order(count: int, slow: bool) -> None:
    with Readers(slow) as readers:
        for _ in range(2):
            assert readers.map(lambda shard: 3 * shard, range(count), none) == list(range(0, 3 * count, 3))


@pytest.mark.parametrize("each", [2, 9, 60])
def test_one_waits_in_threads_for_a_file_system_that_lets_one_wait(each: int) -> None:
    """Also where few shards are asked for at a time, and where it answers at once only at first."""
    threads: list[int] = []

    def look(shard: int) -> int:
        if shard >= 20:
            time.sleep(0.01)
        threads.append(threading.get_ident())
        return shard

    with Readers(slow=False) as readers:
        for start in range(0, 120, each):
            wanted = range(start, min(start + each, 120))
            assert readers.map(look, wanted, none) == list(wanted)
        assert threads[:20] == [threading.get_ident()] * 20
        assert threading.get_ident() not in threads[60:] and len(set(threads)) > 2
    assert not [one for one in threading.enumerate() if one.name.startswith("reading")]


def test_what_answers_at_once_is_read_in_this_thread_and_asked_for_ahead(tmp_path: Path) -> None:
    asked: list[int] = []
    looked: list[int] = []

    def files(shard: int) -> list[str]:
        asked.append(shard)
        return [str(tmp_path / "absent"), __file__]

    def look(shard: int) -> None:
        assert threading.current_thread() is threading.main_thread()
        assert shard in asked
        looked.append(shard)

    with Readers(slow=False) as readers:
        readers.map(look, range(3 * RUN + 1), files)
    assert looked == asked == list(range(3 * RUN + 1))


def test_what_looking_raises_is_raised() -> None:
    def look(shard: int) -> None:
        raise KeyError(shard)

    for slow in (True, False):
        with pytest.raises(KeyError), Readers(slow) as readers:
            readers.map(look, range(9), none)
