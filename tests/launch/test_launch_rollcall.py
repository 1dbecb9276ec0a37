"""Hosts that come, come late, come and go, or never come, against a slow naive account of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from launch_jobs import new_job, start

from maehpc.errors import RunError
from maehpc.launch import allocation
from maehpc.launch.record import Accepted, JobFolder
from maehpc.launch.rollcall import NAMED, Absent, RollCall
from maehpc.launch.seat import Seat

WITHIN_S = 30
HOSTS = ("n1", "n2", "n3", "n4")


class Place:
    """Hosts on a clock that a test moves."""

    def __init__(self, wanted: int, hosts: tuple[str, ...] = HOSTS) -> None:
        self.now = 1000.0
        self.here: set[str] = set()
        self.asked = 0
        self.warned: list[str] = []
        self.roll = RollCall(
            "study/0001-explain", hosts, wanted, WITHIN_S, self._there, self._of, self.warned.append, lambda: self.now
        )

    def _there(self) -> set[str]:
        self.asked += 1
        return set(self.here)

    def _of(self, host: str) -> Absent:
        return Absent(host, "Ray ended: no room" if host == "n3" else None, Path("/logs") / f"{host}.err")

    def at(self, second: float, *here: str) -> None:
        self.now, self.here = 1000.0 + second, set(here)
        self.roll.look()


def test_all_that_have_come_once_have_come_whatever_befalls_them() -> None:
    place = Place(4)
    place.at(2, "n1", "n2")
    place.at(9, "n3", "n1")
    place.at(29, "n1", "n4", "somebody else")
    asked = place.asked
    place.at(300, "n1")
    assert place.warned == [] and place.asked == asked


def test_hosts_that_never_come_end_the_attempt_with_one_sentence() -> None:
    place = Place(4)
    place.at(29.9, "n1", "n2")
    with pytest.raises(RunError) as caught:
        place.at(30, "n1")
    assert str(caught.value) == (
        "2 of 4 hosts did not come up within 30 s: n3 (Ray ended: no room; log /logs/n3.err), n4 (it said nothing; "
        "log /logs/n4.err); everything computed is recorded: `maehpc resume study/0001-explain` tries all hosts again, "
        "and the same submission with --min-nodes 2 goes on without"
    )


def test_enough_hosts_go_on_with_one_warning() -> None:
    place = Place(2)
    for second in (10, 29, 31, 32, 500):
        place.at(second, "n1", "n4")
    (told,) = place.warned
    assert "n2 (it said nothing" in told and "n3 (Ray ended: no room" in told and "2 are enough" in told


def test_work_that_is_done_before_all_have_come_tells_who_is_missing() -> None:
    place = Place(4)
    place.at(12, "n1", "n2")
    place.now += 1
    place.roll.close({"n1", "n4"})
    assert place.warned == [
        "1 of 4 hosts had not come up when all was done, after 13 s: n3 (Ray ended: no room; log /logs/n3.err)"
    ]
    place.roll.close(place.here)
    place.at(31)
    assert len(place.warned) == 1 and place.roll.missing == {"n3"}


@pytest.mark.parametrize("second", [12.0, 31.0])
def test_work_that_is_done_when_all_have_come_or_the_rest_is_known_is_silent(second: float) -> None:
    place = Place(1)
    place.at(second, *(HOSTS if second < WITHIN_S else HOSTS[:1]))
    told = len(place.warned)
    assert told == (second > WITHIN_S)
    place.roll.close(place.here)
    assert len(place.warned) == told


def test_a_sentence_names_some_of_many() -> None:
    place = Place(1, tuple(f"h{number}" for number in range(20)))
    place.at(30, "h0")
    (told,) = place.warned
    assert told.startswith("19 of 20 hosts") and "h5" in told and "h6" not in told
    assert f"and {19 - NAMED} more" in told


def naive(wanted: int, looks: list[tuple[float, set[str]]]) -> tuple[str, float] | None:
    """What is told, and at which second; looks less than a second after the last one count for nothing."""
    seen: set[str] = set()
    last = 0.0
    for second, here in looks:
        late = second >= WITHIN_S
        if second - last < 1 and not late:
            continue
        last = second
        seen |= here
        if seen == set(HOSTS):
            return None
        if late:
            return ("warned" if len(seen) >= wanted else "failed"), second
    return None


@given(
    wanted=st.integers(1, 4),
    looks=st.lists(st.tuples(st.integers(0, 200).map(lambda tick: tick / 4), st.sets(st.sampled_from(HOSTS)))),
)
def test_any_coming_and_going(wanted: int, looks: list[tuple[float, set[str]]]) -> None:
    looks = sorted(looks, key=lambda look: look[0])
    place, found = Place(wanted), None
    for second, here in looks:
        try:
            place.at(second, *here)
        except RunError:
            found = "failed", second
            break
        if place.warned and found is None:
            found = "warned", second
    assert found == naive(wanted, looks)
    assert len(place.warned) == (found is not None and found[0] == "warned")


@pytest.mark.parametrize(
    ("word", "restart", "said"),
    [
        ("Ray ended: no room", 0, "Ray ended: no room"),
        (None, 0, "execve(): python: No such file or directory"),
        (None, 1, None),  # the line may be of an earlier start
    ],
)
def test_what_is_known_of_a_host_that_has_not_come(
    word: str | None, restart: int, said: str | None, tmp_path: Path
) -> None:
    job = new_job(tmp_path, stage="explain", workers_per_node=1)
    attempt = start(job, restart=restart)
    job.accept(job.intend("t"), Accepted(job_id="7", scheduler="slurm", logs=str(job.logs)))
    job.logs.mkdir()
    (job.logs / "7_1_log.out").write_text("")
    (job.logs / "7_1_log.err").write_text("first\nexecve(): python: No such file or directory\n")
    if word is not None:
        job.say(attempt, "n2", word)
    seat = Seat("slurm", "7", restart, 0, 3, 0, 1, ("n1", "n2", "n3"), None, 1)
    assert allocation._absent(job, seat, attempt, "n2") == Absent("n2", said, job.logs / "7_1_log.err")
    assert allocation._absent(job, seat, attempt, "n3") == Absent("n3")


def test_a_damaged_word_is_left_out(tmp_path: Path) -> None:
    job: JobFolder = new_job(tmp_path, stage="explain", workers_per_node=1)
    attempt = start(job)
    job.say(attempt, "n2", "here")
    (job.path / "hosts" / "0001" / "n2.json").write_text("{")
    seat = Seat("slurm", "7", 0, 0, 2, 0, 1, ("n1", "n2"), None, 1)
    assert allocation._absent(job, seat, attempt, "n2") == Absent("n2")
