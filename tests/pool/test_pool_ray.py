"""Real Ray on this machine: what workers, the head and the driver survive, and that nothing is left running."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from maehpc.errors import RunError
from maehpc.interruption import Stop
from maehpc.pool import Done, Event, Failed, Joined, Left, Schedule, Shard, Work, drive
from maehpc.pool.cluster import cluster
from maehpc.pool.crew import ClusterLostError, RayCrew
from maehpc.pool.host import marked
from maehpc.pool.watchdog import Watchdog
from maehpc.pool.worker import Spec

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("nothing_left")]

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers find this folder's computers."""
    monkeypatch.setenv("PYTHONPATH", f"{HERE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")


class Pool:
    """A local pool over one store, and what was seen of it."""

    def __init__(self, folder: Path, shards: int, workers: int = 2, factory: str = "computer", **trouble: Any) -> None:
        self.book = folder / "book"
        self.book.touch()
        self.shards = tuple(Shard("store", number, 4) for number in range(shards))
        self.schedule = Schedule({"store": Work(self.shards)})
        self.workers = workers
        self.spec = Spec(f"pool_computers:{factory}", {"book": str(self.book), **trouble})
        self.events: list[Event] = []
        self.warned: list[str] = []
        self.crew: RayCrew | None = None

    def run(
        self,
        on: Callable[[Event], object] = lambda event: None,
        stop: Stop | None = None,
        watchdog: Watchdog | None = None,
    ) -> Any:
        def watch(event: Event) -> None:
            self.events.append(event)
            on(event)

        with cluster(self.workers) as lost:
            self.crew = RayCrew(self.spec, self.workers, warn=self.warned.append, lost=lost)
            return drive(self.schedule, self.crew, stop, watch, watchdog)

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    def done(self) -> Counter[int]:
        return Counter(event.shard.number for event in self.of(Done))

    def begun(self) -> Counter[int]:
        return Counter(int(line.split()[0]) for line in self.book.read_text().splitlines())


def test_every_shard_is_computed_once_by_processes_that_stay(tmp_path: Path) -> None:
    pool = Pool(tmp_path, 30, seconds=0.5)
    ended = pool.run()
    assert ended.reason is None and not ended.quarantined and not ended.unfinished
    assert pool.done() == pool.begun() == Counter(range(30))
    processes = {line.split()[1] for line in pool.book.read_text().splitlines()}
    assert len(processes) == len(pool.of(Joined)) == 2
    assert pool.warned == ["the first shard is odd"]


def test_a_shard_is_written_while_the_next_is_computed_and_none_computed_beside_another(tmp_path: Path) -> None:
    pool = Pool(tmp_path, 8, workers=1, seconds=0.4, slow=range(8))
    pool.run()
    assert pool.done() == Counter(range(8))
    begun = {int(number): float(at) for number, _, _, at in map(str.split, pool.book.read_text().splitlines())}
    lines = pool.book.with_suffix(".written").read_text().splitlines()
    written = {int(number): float(at) for number, at in map(str.split, lines)}
    order = sorted(begun, key=begun.__getitem__)
    assert all(begun[later] >= begun[one] + 0.4 for one, later in pairwise(order))
    # The last two are not dealt ahead: near the end nobody hoards.
    assert all(begun[later] < written[one] for one, later in list(pairwise(order))[:5])


def test_kill_9_of_a_worker(tmp_path: Path) -> None:
    pool = Pool(tmp_path, 24, seconds=1.0)

    def kill(event: Event) -> None:
        if isinstance(event, Done) and len(pool.of(Done)) == 5:
            assert pool.crew is not None
            os.kill(pool.crew.processes[event.worker], signal.SIGKILL)

    ended = pool.run(kill)
    assert not ended.quarantined and pool.done() == Counter(range(24))
    assert len(pool.of(Left)) == 1 and len(pool.of(Joined)) == 3
    assert sum(pool.begun().values()) <= 25, "what the dead worker had only been promised was not begun twice"


def test_a_worker_that_hangs_is_killed_and_its_shard_computed_by_another(tmp_path: Path) -> None:
    pool = Pool(tmp_path, 12, seconds=0.2, hanging=[4])
    ended = pool.run(watchdog=Watchdog(least_s=3.0))
    assert not ended.quarantined and not ended.unfinished and pool.done() == Counter(range(12))
    (left,) = pool.of(Left)
    assert "it said nothing for" in left.reason and re.search(r"such shards take [\d.]+ s", left.reason)
    assert pool.begun()[4] == 2


def test_shards_that_are_to_blame_are_given_up_and_named(tmp_path: Path) -> None:
    pool = Pool(tmp_path, 12, deadly=[3], hungry=[5], broken=[7])
    ended = pool.run()
    reasons = {shard.number: reason for shard, reason in ended.quarantined.items()}
    assert set(reasons) == {3, 5, 7}
    assert "out of memory" in reasons[5] and "ValueError: the shard is broken" in reasons[7]
    assert pool.done() == Counter(set(range(12)) - {3, 5, 7})
    begun = pool.begun()
    assert begun[3] == begun[5] == begun[7] == 3
    assert len(pool.of(Left)) == 3 and len(pool.of(Failed)) == 6


def test_what_would_befall_all_ends_the_pool(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="the disk is full"):
        Pool(tmp_path, 12, fatal=[4]).run()


def test_a_computer_that_cannot_be_made_is_told_and_not_tried_for_ever(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no worker comes up: .*there is no such model"):
        Pool(tmp_path, 3, workers=1, factory="stillborn").run()


def test_a_wish_to_stop_reaches_shards_that_are_being_computed(tmp_path: Path) -> None:
    pool, stop = Pool(tmp_path, 8, seconds=60.0), Stop()
    begun = time.monotonic()

    def ask() -> None:
        while sum(pool.begun().values()) < 2:
            time.sleep(0.05)
        stop.request("SIGTERM")

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    ended = pool.run(stop=stop)
    asking.join()
    assert ended.reason == "SIGTERM" and len(ended.unfinished) == 8 and time.monotonic() - begun < 55


@pytest.mark.parametrize("victim", ["raylet/raylet", "gcs/gcs_server", "ray.scripts.scripts", "maehpc.pool.host"])
def test_kill_9_of_the_head(victim: str, tmp_path: Path) -> None:
    pool = Pool(tmp_path, 200, seconds=0.2)
    killed: list[float] = []

    def kill(event: Event) -> None:
        if isinstance(event, Done) and not killed:
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):  # it has ended meanwhile
                    if any(victim in word for word in process.cmdline()[:5]):
                        process.kill()
                        killed.append(time.monotonic())

    with pytest.raises(ClusterLostError, match="head has ended"):
        pool.run(kill)
    assert killed and time.monotonic() - killed[0] < 30, "Ray itself takes a minute, and then ends this process"


DRIVER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_pool_ray import Pool
pool = Pool(Path(sys.argv[1]), 500, seconds=0.2)
pool.run(lambda event: print(event, flush=True))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_driver_dies(number: signal.Signals, tmp_path: Path) -> None:
    """Whatever it started ends within seconds, though nobody tidies up after a kill -9."""
    environment = {**os.environ, "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}{os.pathsep}{os.environ['PYTHONPATH']}"}
    words = [sys.executable, "-c", DRIVER, str(tmp_path), str(HERE)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment) as driver:
        assert driver.stdout is not None
        while "Done" not in driver.stdout.readline():
            assert driver.poll() is None
        below = psutil.Process(driver.pid).children(recursive=True)
        assert any("raylet" in process.name() for process in below)
        driver.send_signal(number)
    _, alive = psutil.wait_procs(below, timeout=20)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def test_two_clusters_of_one_host_do_not_meet(tmp_path: Path) -> None:
    words = [sys.executable, "-c", DRIVER.replace("500, seconds=0.2", "20, seconds=0.1"), str(tmp_path), str(HERE)]
    environment = {**os.environ, "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}{os.pathsep}{os.environ['PYTHONPATH']}"}
    (tmp_path / "mine").mkdir()
    pool = Pool(tmp_path / "mine", 20, seconds=0.1)
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment) as other:
        ended = pool.run()
        told, _ = other.communicate(timeout=100)
    assert other.returncode == 0 and told.count("Done") == 20
    assert not ended.unfinished and pool.done() == Counter(range(20))


def listened(process: psutil.Process) -> list[tuple[str, int]]:
    """Where it listens, as one of this host would call."""
    with suppress(psutil.Error):  # it has ended meanwhile
        places = [one.laddr for one in process.net_connections("tcp") if one.status == psutil.CONN_LISTEN]
        return [("127.0.0.1" if ip in ("::", "0.0.0.0") else ip.removeprefix("::ffff:"), port) for ip, port in places]
    return []


def asked_for_metrics(ip: str, port: int) -> int | None:
    """What a stranger is answered over HTTP; None where no HTTP is spoken."""
    try:
        return requests.get(f"http://{ip}:{port}/metrics", timeout=10).status_code
    except requests.RequestException:
        return None


def test_who_has_no_token_gets_nothing() -> None:
    stranger = "import os, ray; ray.init(address=os.environ['ADDRESS']); print('let in', ray.cluster_resources())"

    def asks(**variables: str) -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MAEHPC_POOL"))}
        words = [sys.executable, "-c", stranger]
        environment = {**kept, "ADDRESS": address, **variables}
        return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120, check=False)

    with cluster(1):
        import ray

        (dashboard,) = [
            one for one in psutil.Process().children(recursive=True) if "dashboard.py" in str(one.cmdline())
        ]
        ours = [dashboard, *dashboard.children(recursive=True)]
        assert not [place for one in ours for place in listened(one)]
        everywhere = {place for one in psutil.Process().children(recursive=True) for place in listened(one)}
        answers = {place: answer for place in everywhere if (answer := asked_for_metrics(*place)) is not None}
        assert everywhere and set(answers.values()) <= {401}, answers
        address = ray.get_runtime_context().gcs_address
        token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
        assert token.stat().st_mode & 0o777 == 0o600 and token.parent.stat().st_mode & 0o777 == 0o700
        wrong = asks(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="f" * 64)
        right = asks(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token.read_text())
    assert right.returncode == 0 and "let in" in right.stdout, right.stderr
    assert wrong.returncode != 0 and "let in" not in wrong.stdout
    assert "InvalidAuthToken" in wrong.stderr, wrong.stderr
    assert "RAY_AUTH_TOKEN_PATH" not in os.environ, "the environment is as it was"


def test_ray_that_does_not_start_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another program of that name stands in its way."""
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "__init__.py").write_text("raise ImportError('this is not Ray')\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ['PYTHONPATH']}")
    with pytest.raises(RunError, match=r"Ray did not start: .*this is not Ray"), cluster(1):
        pass


def test_a_cluster_without_hosts_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray itself would wait for ever for a worker that fits nowhere."""
    monkeypatch.setattr("maehpc.pool.crew.ALONE_S", 3.0)
    pool = Pool(tmp_path, 2)
    with cluster(0) as lost, pytest.raises(ClusterLostError, match="no worker was there"):
        drive(pool.schedule, RayCrew(pool.spec, 1, lost=lost))


def test_marks_are_found_in_children_alone() -> None:
    with subprocess.Popen(["sleep", "60"], env={**os.environ, "MAEHPC_POOL": "a-mark-of-its-own"}) as sleeping:
        while not Path(f"/proc/{sleeping.pid}/environ").read_bytes():  # it is there a moment before its environment
            time.sleep(0.01)
        assert list(marked("a-mark-of-its-own")) == [sleeping.pid]
        assert list(marked("another")) == []
        sleeping.kill()


def test_workers_that_do_not_come_up_are_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is room for one of the two: a host of theirs is missing."""
    monkeypatch.setattr("maehpc.pool.crew.LATE_S", 0.5)
    pool = Pool(tmp_path, 4, seconds=1.0)
    with cluster(1) as lost:
        ended = drive(pool.schedule, RayCrew(pool.spec, 2, warn=pool.warned.append, lost=lost))
    assert ended.reason is None and pool.begun() == Counter(range(4))
    assert "1 of 2 workers have not come up; the others go on" in pool.warned


TERMINATED = """
import os, signal, threading, time
from maehpc.pool import cluster

heard = []
signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
over = threading.Event()
others = [threading.Thread(target=over.wait) for _ in range(4)]  # the system may hand a signal to any of them
for thread in others:
    thread.start()
answered = cluster._await_head

def then_terminate(*words):
    answered(*words)
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()

cluster._await_head = then_terminate
with cluster.cluster(1):
    deadline = time.monotonic() + 10
    while not heard and time.monotonic() < deadline:
        time.sleep(0.01)
over.set()
print(heard)
"""


def test_a_sigterm_while_ray_comes_up_is_ours() -> None:
    done = subprocess.run([sys.executable, "-c", TERMINATED], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, f"[{signal.SIGTERM.value}]\n"), done.stderr
    assert "SIGTERM" not in done.stderr
