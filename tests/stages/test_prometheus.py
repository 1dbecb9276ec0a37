"""What Prometheus scrapes: real runs over HTTP, read by its own parser and held to the ledger and the pool's log."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from tiny import tiny_context

from maehpc.errors import InputError
from maehpc.pool import Done, Event, Failed, Joined, Left, Schedule, Shard, Work, drive
from maehpc.stages.begin import begin
from maehpc.stages.context import Context
from maehpc.stages.explain import explain
from maehpc.stages.fleet import local_fleet
from maehpc.stages.pipeline import run_stages
from maehpc.stages.pooled import explain_pooled
from maehpc.stages.prometheus import LOOPBACK, ExplainMetrics, serving

DIGITS = (("dataset", "digits"), ("experiment", "tiny"))
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def parsed(text: str) -> Samples:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def scraped(url: str) -> Samples:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return parsed(answer.read().decode())


@contextmanager
def asked_for() -> Iterator[tuple[ExplainMetrics, str]]:
    """Metrics and their URL; nothing of the server is left afterwards."""
    told: list[str] = []
    before = set(threading.enumerate())
    with serving(0, LOOPBACK, told.append) as metrics:
        url = told[0].rpartition(" ")[2]
        yield metrics, url
    host, _, port = url.removeprefix("http://").removesuffix("/metrics").rpartition(":")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)), timeout=5)
    assert {thread for thread in threading.enumerate() if thread.is_alive() and "serve" in thread.name} <= before


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Context:
    context = tiny_context(tmp_path_factory.mktemp("metrics"), *SIZE)
    with begin(context, ["run", "finetune"], ["pretrain", "finetune"]):
        run_stages([context], ["pretrain", "finetune"])
    return context


SIZE = ("explain.images=60", "explain.maps.shard_images=4", "explain.sensitivity.samples=40")


def copy_of(context: Context, folder: Path) -> Context:
    shutil.copytree(context.experiment.root.parent, folder, dirs_exist_ok=True)
    return tiny_context(folder, *SIZE)


def recorded(context: Context) -> int:
    return len(list(context.experiment.ledger("digits").glob("shard-*.json")))


def test_one_process_tells_what_the_ledger_holds(finished: Context, tmp_path: Path) -> None:
    context = copy_of(finished, tmp_path)
    with asked_for() as (metrics, url):
        explain(replace(context, metrics=metrics), "digits")
        found = scraped(url)
    assert recorded(context) == 15
    assert found["maehpc_images", DIGITS] == found["maehpc_images_done_total", DIGITS] == 60
    assert found["maehpc_shards", DIGITS] == found["maehpc_shards_done_total", DIGITS] == 15
    assert found["maehpc_shard_seconds_count", DIGITS] == 15
    assert found["maehpc_shard_seconds_sum", DIGITS] > 0
    assert found["maehpc_workers", ()] == found["maehpc_workers_wanted", ()] == 1
    assert found["maehpc_worker_deaths_total", ()] == found["maehpc_shards_failed_total", DIGITS] == 0
    assert found["process_resident_memory_bytes", ()] > 0

    for name in ("shard-00003.json", "shard-00014.json"):
        (context.experiment.ledger("digits") / name).unlink()
    seen: list[Samples] = []

    class Looking(ExplainMetrics):
        """Scrapes before each shard's event is taken in."""

        def heard(self, event: Event) -> None:
            seen.append(parsed(generate_latest(self.registry).decode()))
            super().heard(event)

    again = Looking()
    explain(replace(context, metrics=again), "digits")
    assert [one["maehpc_images_done_total", DIGITS] for one in seen] == [52, 56]
    last = parsed(generate_latest(again.registry).decode())
    assert (last["maehpc_shards_done_total", DIGITS], last["maehpc_shard_seconds_count", DIGITS]) == (15, 2)


@pytest.mark.slow
def test_a_pool_tells_what_its_log_and_the_ledger_hold(
    finished: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = copy_of(finished, tmp_path)
    between: list[tuple[int, Samples, int]] = []
    meanwhile: list[tuple[int, Samples, int]] = []

    def scrape() -> tuple[int, Samples, int]:
        return recorded(context), scraped(url), recorded(context)

    def watch(over: threading.Event) -> None:
        while not over.wait(0.05):
            meanwhile.append(scrape())

    with asked_for() as (metrics, url):
        taken_in, killed = metrics.heard, []

        def heard_of(event: Event) -> None:
            """Scrapes after each shard, and kills a worker that is at work once three are done."""
            taken_in(event)
            between.append(scrape())
            for child in psutil.Process().children(recursive=True) if len(between) > 3 and not killed else ():
                with suppress(psutil.NoSuchProcess):  # it has ended meanwhile
                    if not killed and child.name() == "ray::Actor":  # and none that is still beginning
                        os.kill(child.pid, signal.SIGKILL)
                        killed.append(child.pid)

        monkeypatch.setattr(metrics, "heard", heard_of)
        over = threading.Event()
        thread = threading.Thread(target=watch, args=(over,))
        thread.start()
        try:
            explain_pooled([replace(context, metrics=metrics)], local_fleet(torch.device("cpu"), 2))
        finally:
            over.set()
            thread.join()
        found = scraped(url)
    events = [json.loads(line) for line in context.experiment.pool_log.read_text().splitlines()]

    def heard(kind: str) -> int:
        return sum(event["event"] == kind for event in events)

    assert heard("left") == 1
    assert found["maehpc_images_done_total", DIGITS] == 60 and found["maehpc_shards_done_total", DIGITS] == 15
    assert found["maehpc_shard_seconds_count", DIGITS] == heard("done") == recorded(context) == 15
    seconds = sum(event["seconds"] for event in events if event["event"] == "done")
    assert found["maehpc_shard_seconds_sum", DIGITS] == pytest.approx(seconds, abs=1e-3)
    assert found["maehpc_worker_deaths_total", ()] == found["maehpc_shards_failed_total", DIGITS] == 1
    assert found["maehpc_workers", ()] == heard("joined") - 1
    assert found["maehpc_workers_wanted", ()] == 2 and found["maehpc_shards_quarantined", DIGITS] == 0
    for scrapes in (between, meanwhile):
        done = [one.get(("maehpc_shards_done_total", DIGITS), 0.0) for _, one, _ in scrapes]
        assert done == sorted(done)
        # A shard is recorded before the driver hears of it, and a worker holds two at most.
        assert all(before - 4 <= value <= after for value, (before, _, after) in zip(done, scrapes, strict=True))
    assert meanwhile and len({one.get(("maehpc_shards_done_total", DIGITS), 0.0) for _, one, _ in between}) == 16


class Dice:
    """A crew whose every step a test draws."""

    def __init__(self, outcomes: Iterator[str]) -> None:
        self.outcomes = outcomes
        self.hands: dict[str, list[Shard]] = {"a1": [], "b1": []}
        self.coming: list[Event] = [Joined("a1"), Joined("b1")]
        self.blamed = 0

    def hand(self, worker: str, shard: Shard) -> None:
        self.hands[worker].append(shard)

    expected = 0

    def end(self, worker: str, reason: str) -> None:
        raise AssertionError(reason)

    def seconds_left(self, worker: str) -> float | None:
        return None

    def stop(self, reason: str) -> None:
        raise AssertionError("nobody asked for that")

    def events(self) -> list[Event]:
        if self.coming:
            events, self.coming = self.coming, []
            return events
        worker, hand = next((worker, hand) for worker, hand in self.hands.items() if hand)
        outcome = next(self.outcomes, "done")
        if outcome == "left":
            del self.hands[worker]
            heir = f"{worker[0]}{int(worker[1:]) + 1}"
            self.hands[heir] = []
            self.blamed += 1
            return [Left(worker, "killed"), Joined(heir)]
        shard = hand.pop(0)
        if outcome == "failed":
            self.blamed += 1
            return [Failed(worker, shard, "broken")]
        return [Done(worker, shard, 0.5 + shard.number)]


class Layout:
    images, shards = 48, 12


class Store:
    """Twelve shards of four images; what `begin` asks of a store."""

    layout = Layout()

    def images(self, shard: int) -> range:
        return range(4 * shard, 4 * shard + 4)


@settings(deadline=None, max_examples=50)
@given(outcomes=st.lists(st.sampled_from(["done", "done", "failed", "left"]), max_size=40))
def test_any_order_of_events(outcomes: list[str]) -> None:
    metrics, seen, crew = ExplainMetrics(), list[Event](), Dice(iter(outcomes))
    shards = tuple(Shard("x", number, 4) for number in range(2, 12))
    schedule = Schedule({"x": Work(shards)})
    metrics.begin("x", "tiny", "digits", Store(), [shard.number for shard in shards])
    metrics.pool(2, schedule)

    def watch(event: Event) -> None:
        seen.append(event)
        metrics.heard(event)

    ended = drive(schedule, crew, watch=watch)
    found = parsed(generate_latest(metrics.registry).decode())
    done = [event for event in seen if isinstance(event, Done)]
    left = sum(isinstance(event, Left) for event in seen)
    assert found["maehpc_images_done_total", DIGITS] == 8 + 4 * len(done)
    assert found["maehpc_shards_done_total", DIGITS] == 2 + len(done)
    assert found["maehpc_shard_seconds_sum", DIGITS] == sum(event.seconds for event in done)
    assert found["maehpc_shards_quarantined", DIGITS] == len(ended.quarantined)
    assert found["maehpc_shards_failed_total", DIGITS] == crew.blamed
    assert found["maehpc_worker_deaths_total", ()] == left
    assert found["maehpc_workers", ()] == sum(isinstance(event, Joined) for event in seen) - left


def test_a_port_that_is_taken_and_an_address_of_nobody() -> None:
    with socket.socket() as taken:
        taken.bind((LOOPBACK, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"--metrics-port {port}: .*in use.* give another"), _serving(port):
            pass
    with pytest.raises(InputError, match=r"198\.51\.100\.7"), _serving(0, "198.51.100.7"):
        pass


def _serving(port: int, address: str = LOOPBACK) -> object:
    return serving(port, address, lambda sentence: None)
