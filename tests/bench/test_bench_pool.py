"""The simulated pool: its bound holds, its workers obey their clock, and the real schedule comes near the bound."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maehpc.bench.efficiency import Load as Explained
from maehpc.bench.efficiency import efficiency_part
from maehpc.bench.pool import Load, run_real, run_simulated, simulate
from maehpc.bench.simulated import Machines, SimulatedCrew
from maehpc.errors import RunError
from maehpc.pool import Done, Joined, Left, Shard
from maehpc.progress import Silent


def test_without_chance_it_is_arithmetic() -> None:
    """10 shards of 2 s on 4 workers after a start of 3 s: three rounds."""
    found = simulate(Load(100, 1, 10, 0.2), Machines(4, start_s=3.0, sigma=0.0), seed=0)
    assert found.makespan_s == pytest.approx(9.0)
    assert found.bound_s == pytest.approx(3.0 + 100 * 0.2 / 4)
    assert found.shards == 10 and not found.failures


@given(
    images=st.integers(1, 3000),
    stores=st.integers(1, 5),
    gpus=st.integers(1, 40),
    sigma=st.floats(0, 1),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_nothing_beats_the_bound_and_lists_stay_near_it(
    images: int, stores: int, gpus: int, sigma: float, seed: int
) -> None:
    load = Load(images, stores, 16, 0.5)
    found = simulate(load, Machines(gpus, sigma=sigma), seed)
    assert found.makespan_s >= found.bound_s * (1 - 1e-9)
    crew = SimulatedCrew(Machines(gpus, sigma=sigma), load.seconds(), seed)
    longest = max(crew.seconds_of(shard) for part in load.work().values() for shard in part.shards)
    # A worker may hold one shard ahead; without that it is Graham's bound for any list.
    assert found.makespan_s - 20.0 <= found.bound_s - 20.0 + 2 * longest


def test_shard_times_are_log_normal_about_their_mean() -> None:
    crew = SimulatedCrew(Machines(1, sigma=0.5), {"store": 0.25}, seed=7)
    seconds = [crew.seconds_of(Shard("store", number, 8)) for number in range(4000)]
    assert sum(seconds) / len(seconds) == pytest.approx(2.0, rel=0.03)
    assert seconds[:10] == [crew.seconds_of(Shard("store", number, 8)) for number in range(10)]


def test_a_host_that_fails_takes_its_workers_and_they_come_back_under_other_names() -> None:
    crew = SimulatedCrew(Machines(2, gpus_per_host=2, mtbf_h=1e-3, start_s=1.0, repair_s=5.0), {"store": 1e6}, seed=1)
    joined = crew.events()
    assert [type(event) for event in joined] == [Joined, Joined]
    crew.hand(joined[0].worker, Shard("store", 0, 1))
    left = crew.events()
    assert [type(event) for event in left] == [Left, Left] and crew.failures == 1
    failed_at = crew.now
    again = crew.events()
    assert crew.now == pytest.approx(failed_at + 6.0)
    assert {event.worker for event in again}.isdisjoint(event.worker for event in joined)
    crew.hand(again[0].worker, Shard("store", 0, 1))
    assert not any(isinstance(event, Done) for _ in range(3) for event in crew.events())


def test_hosts_fail_and_nothing_is_lost() -> None:
    found = simulate(Load(40_000, 4, 16, 0.1), Machines(64, mtbf_h=0.02, repair_s=10.0, start_s=5.0), seed=3)
    assert found.failures > 5
    assert found.shards + len(found.ended.quarantined) == sum(
        len(part.shards) for part in Load(40_000, 4, 16, 0.1).work().values()
    )
    assert not found.ended.unfinished and found.makespan_s < 2 * found.bound_s


def test_the_wall_time_is_kept() -> None:
    machines = Machines(16, wall_time_s=60.0, sigma=0.2, start_s=5.0)
    found = simulate(Load(40_000, 2, 16, 0.1), machines, seed=3)
    assert found.ended.reason is not None and found.ended.unfinished
    # One shard in twenty is slower than what was counted on.
    assert 50.0 < found.makespan_s < 63.0


def test_no_host_is_told() -> None:
    with pytest.raises(RunError, match="no worker"):
        SimulatedCrew(Machines(0), {}, seed=0).events()


def test_the_report_has_its_keys() -> None:
    told = run_simulated(Silent(), Load(20_000, 3, 16, 0.1), Machines(32), repeats=2, seed=0)
    record = told.as_json()
    assert 1.0 <= record["makespan_over_bound"] <= record["makespan_over_bound_worst"] < 1.1
    assert record["simulated"] is True and record["driver_seconds_per_shard"] > 0
    assert record["load"]["images"] == 20_000 and record["machines"]["gpus"] == 32
    assert "lower bound" in "\n".join(told.lines())


@pytest.mark.slow
def test_a_thousand_gpus_are_within_three_percent() -> None:
    found = simulate(Load(10_000_000, 12, 64, 0.08), Machines(1024, mtbf_h=24.0), seed=0)
    assert found.shards == 156_255 and not found.ended.quarantined
    assert found.makespan_s < 1.03 * found.bound_s


@pytest.mark.slow
def test_real_workers_are_measured() -> None:
    record = run_real(Silent(), workers=2, shards=60, seconds=0.1, repeats=1).as_json()
    assert record["simulated"] is False and record["workers"] == 2
    # Less than nothing where the two workers' first shards are heard of late, and together.
    assert -0.1 < record["overhead_seconds_per_shard"] < 1
    assert record["overhead_of_5s_shard"] == pytest.approx(record["overhead_seconds_per_shard"] / 5)
    assert 0 < record["bring_up_s"] < record["first_worker_s"] and record["end_s"] > 0


@pytest.mark.slow
def test_workers_explain_into_real_stores_and_nothing_stays(tmp_path: Path) -> None:
    load = Explained(shards=3, shard_images=1, image_size=32, samples=1)
    part, results = efficiency_part(Silent(), tmp_path, 2, load, repeats=1)
    assert list(tmp_path.iterdir()) == []
    assert results["efficiency_with_ends"] > 0 and results["efficiency"] > 0
    one, both, _ = part.figures
    assert results["efficiency"] == pytest.approx(both.median / (2 * one.median))
