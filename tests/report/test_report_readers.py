"""The order of what is read, whether a file system answers at once or lets one wait."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from maehpc.report.readers import FETCHED, PROBED, Readers


@pytest.mark.parametrize("count", [0, 1, PROBED, PROBED + 1, FETCHED, 2 * FETCHED + 3])
@pytest.mark.parametrize("slow", [True, False, None])
def test_results_come_in_order(count: int, slow: bool | None) -> None:
    with Readers(slow, lambda shard: []) as readers:
        for _ in range(2):
            assert readers.map(lambda shard: 3 * shard, range(count)) == list(range(0, 3 * count, 3))


def test_one_waits_in_threads_for_a_file_system_that_lets_one_wait() -> None:
    threads: set[int] = set()

    def look(shard: int) -> int:
        time.sleep(0.02)
        threads.add(threading.get_ident())
        return shard

    with Readers(None, lambda shard: []) as readers:
        assert readers.map(look, range(40)) == list(range(40))
        assert len(threads) > 5
    assert threading.active_count() == 1 or not [one for one in threading.enumerate() if one.name.startswith("reading")]


def test_what_answers_at_once_is_read_in_this_thread_and_asked_for_ahead(tmp_path: Path) -> None:
    asked: list[int] = []
    looked: list[int] = []

    def files(shard: int) -> list[Path]:
        asked.append(shard)
        return [tmp_path / "absent", Path(__file__)]

    def look(shard: int) -> None:
        assert threading.current_thread() is threading.main_thread()
        assert shard < PROBED or shard in asked
        looked.append(shard)

    with Readers(None, files) as readers:
        readers.map(look, range(3 * FETCHED))
    assert looked == list(range(3 * FETCHED)) and asked == looked[PROBED:]


def test_what_looking_raises_is_raised() -> None:
    def look(shard: int) -> None:
        raise KeyError(shard)

    for slow in (True, False):
        with pytest.raises(KeyError), Readers(slow, lambda shard: []) as readers:
            readers.map(look, range(9))
