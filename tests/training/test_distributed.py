"""Ranks meet, agree, and notice when one of them fails, dies, or never comes."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from tiny import FileMeeting, begun_world, in_child, in_world, wait_for

from maehpc.errors import InputError, Interrupted, LostRanksError, RunError
from maehpc.training import distributed
from maehpc.training.distributed import ALONE, World, join


def test_alone_every_method_is_what_one_process_does() -> None:
    rows = torch.arange(3)
    assert ALONE.leader
    assert ALONE.together(lambda: 5) == [5]
    assert ALONE.from_leader(lambda: (1, 2)) == (1, 2)
    assert ALONE.gather(rows)[0] is rows
    assert ALONE.largest(-2) == -2
    module = torch.nn.Linear(1, 1)
    assert ALONE.parallel(module) is module
    ALONE.barrier()


def test_what_ranks_tell_each_other() -> None:
    def work(world: World) -> None:
        assert world.together(lambda: {"rank": world.rank}) == [{"rank": rank} for rank in range(3)]
        assert world.from_leader(lambda: [world.rank, None, 0.1]) == [0, None, 0.1]
        assert world.largest(10 - world.rank) == 10
        flag = world.begin_largest(world.rank)
        parts = world.gather(torch.full((world.rank, 2), world.rank, dtype=torch.int16))
        assert [part.tolist() for part in parts] == [[], [[1, 1]], [[2, 2], [2, 2]]]
        assert flag.wait() == 2
        ones = world.gather(torch.ones(1, 4, dtype=torch.bfloat16) if world.rank == 1 else None)
        assert [tuple(part.shape) for part in ones] == [(0, 4), (1, 4), (0, 4)]
        assert ones[0].dtype == torch.bfloat16
        tensors = {"scalar": torch.tensor(3), "none": torch.zeros(0, 2), "w": torch.randn(2, 3, dtype=torch.float64)}
        copied = world.copy_from_leader(tensors if world.leader else None)
        assert copied["scalar"].item() == 3 and copied["none"].shape == (0, 2)
        assert len({str(part.tolist()) for part in world.gather(copied["w"])}) == 1

    in_world(3, work)


def test_an_error_of_one_rank_is_everybodys() -> None:
    def work(world: World) -> None:
        errors = [InputError("first"), RunError("second"), Interrupted("work", "a reason", 7)]
        for number, error in enumerate(errors):

            def fail(number: int = number, error: Exception = error) -> None:
                if world.rank == number % world.size:
                    raise error

            with pytest.raises(type(error)) as caught:
                world.together(fail)
            assert type(caught.value) is type(error)
            assert str(caught.value) == str(error)
        with pytest.raises(RunError, match="leader") as told:
            world.from_leader(lambda: (_ for _ in ()).throw(RunError("leader")))
        assert str(told.value) == "leader"
        assert world.together(lambda: 1) == [1, 1]

    in_world(2, work)


def test_what_nobody_expected_is_raised_where_it_happened_and_told_elsewhere() -> None:
    def work(world: World) -> None:
        def fail() -> int:
            return 1 // world.rank

        with pytest.raises(ZeroDivisionError if world.leader else LostRanksError, match="division"):
            world.together(fail)

    in_world(2, work)


@pytest.mark.slow
def test_slow_work_is_waited_for_longer_than_a_dead_peer() -> None:
    def work(world: World) -> None:
        distributed.TICK_S = 0.2
        assert world.from_leader(lambda: time.sleep(6)) is None

    codes = wait_for(begun_world(2, work, timeout_s=3.0))
    assert codes == [0, 0]


@pytest.mark.parametrize("where", ["gradient", "waiting", "flag"])
def test_a_rank_that_is_killed_ends_the_others_with_a_sentence(tmp_path: Path, where: str) -> None:
    def work(world: World) -> None:
        if world.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        begun = time.monotonic()
        try:
            if where == "gradient":
                module = world.parallel(torch.nn.Linear(2, 2))
                module(torch.ones(1, 2)).sum().backward()
            elif where == "flag":
                world.largest(1)
            else:
                world.barrier()
        finally:
            (tmp_path / str(world.rank)).write_text(str(time.monotonic() - begun))

    codes = wait_for(begun_world(3, work), limit=30.0)
    assert codes[1] == -signal.SIGKILL
    assert codes[0] == codes[2] == 1
    assert all(float((tmp_path / name).read_text()) < 10 for name in "02")


def test_a_rank_that_fails_alone_does_not_hang_and_ends_the_others(tmp_path: Path) -> None:
    meeting = FileMeeting(tmp_path / "meeting.json")

    def rank_work(rank: int) -> None:
        try:
            with join(World(rank, 2, rank), torch.device("cpu"), meeting, 60.0) as world:
                flag = world.begin_largest(0)
                if rank == 1:
                    raise RunError("mine alone")
                flag.wait()
                world.barrier()
        except RunError as error:
            (tmp_path / str(rank)).write_text(f"{type(error).__name__}: {error}")

    begun = time.monotonic()
    assert wait_for([in_child(lambda rank=rank: rank_work(rank)) for rank in range(2)], limit=40.0) == [0, 0]
    assert time.monotonic() - begun < 30
    assert (tmp_path / "1").read_text() == "RunError: mine alone"
    assert (tmp_path / "0").read_text().startswith("LostRanksError: rank 0 lost the other ranks")


def test_a_rank_that_never_comes_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(LostRanksError, match="rank 1 of 2 did not come within 1 s"),
        join(World(0, 2), torch.device("cpu"), FileMeeting(tmp_path / "m.json"), meet_s=1.0),
    ):
        raise AssertionError("met nobody")


@pytest.mark.slow
def test_those_who_came_are_told_that_one_did_not(tmp_path: Path) -> None:
    def come(rank: int) -> None:
        begun = time.monotonic()
        expected = "rank 2 of 3 did not come" if rank == 0 else "not all 3 ranks came|lost the other ranks"
        with (
            pytest.raises(LostRanksError, match=expected),
            join(World(rank, 3), torch.device("cpu"), FileMeeting(tmp_path / "m.json"), meet_s=3.0),
        ):
            raise AssertionError("met nobody")
        assert time.monotonic() - begun < 20

    assert wait_for([in_child(lambda rank=rank: come(rank)) for rank in range(2)], limit=40.0) == [0, 0]


def test_rank_0_that_never_publishes_or_never_answers_is_told(tmp_path: Path) -> None:
    with (
        pytest.raises(LostRanksError, match="rank 0 did not say where it listens"),
        join(World(1, 2), torch.device("cpu"), FileMeeting(tmp_path / "m.json"), meet_s=0.3),
    ):
        raise AssertionError("met nobody")
    (tmp_path / "m.json").write_text(json.dumps({"addresses": ["127.0.0.1"], "port": 1, "token": "t"}))
    with (
        pytest.raises(LostRanksError, match=r"rank 0 answers at none of 127\.0\.0\.1 \(port 1\)"),
        join(World(1, 2), torch.device("cpu"), FileMeeting(tmp_path / "m.json"), meet_s=0.3),
    ):
        raise AssertionError("met nobody")


def test_an_unknown_interface_is_told_with_those_there_are(tmp_path: Path) -> None:
    with (
        pytest.raises(RunError, match=r"network interface ib7 has no IPv4 address .*lo"),
        join(World(0, 2), torch.device("cpu"), FileMeeting(tmp_path / "m.json"), interface="ib7"),
    ):
        raise AssertionError("met nobody")


@pytest.mark.slow
def test_another_store_at_the_address_is_not_taken_for_rank_0(tmp_path: Path) -> None:
    stranger = FileMeeting(tmp_path / "stranger.json")

    def strange() -> None:
        with pytest.raises(LostRanksError):
            join(World(0, 2), torch.device("cpu"), stranger, meet_s=3.0).__enter__()

    thread = threading.Thread(target=strange)
    thread.start()
    while (facts := stranger.find()) is None:
        time.sleep(0.01)
    (tmp_path / "m.json").write_text(json.dumps({**facts, "addresses": ["127.0.0.1"], "token": "another"}))
    with (
        pytest.raises(LostRanksError, match="rank 0 answers at none of"),
        join(World(1, 2), torch.device("cpu"), FileMeeting(tmp_path / "m.json"), meet_s=0.5),
    ):
        raise AssertionError("joined strangers")
    thread.join()
