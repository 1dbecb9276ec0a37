"""Random faults in a pool for as long as one likes: nothing lost, nothing doubled, nothing left running (`make soak`).

Each round runs `maehpc run explain --workers K` on a small study, does something to it at a random moment, and then
holds the store to the bytes of one undisturbed process. Now and then an undisturbed command finishes the store, and it
begins anew. The first violation ends everything and names the seed and the round; `--seed` and `--first` draw that
round's faults again.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from pool_runs import (
    ALONE,
    SHARDS,
    bury,
    command,
    events,
    files_of,
    forget,
    ledger_of,
    make_study,
    maps_of,
    named,
    recorded,
    stored,
)

from maehpc import maps
from maehpc.files import is_partial, partial_name
from maehpc.pool.host import adopt

IMAGES = 4
"""Of a shard."""
ROUND_S = 300.0
"""Seconds after which a command hangs."""
GONE_S = 30.0
"""Seconds in which everything ends that a command has started."""
EARLY = 0.2
"""Share of faults that come before any shard is done."""
TITLES = {"worker": "ray::Actor", "raylet": "raylet/raylet", "head": "gcs/gcs_server", "host": "maehpc.pool.host"}
ALLOWED = {
    "nothing": {0},
    "worker": {0},
    "pause": {0},
    "raylet": {0, 1},
    "head": {0, 1},
    "host": {0, 1},
    "driver": {0, -signal.SIGKILL},
    "term": {0, 75, -signal.SIGTERM},
}
"""Exit codes by fault. A run may have ended before its fault came; SIGTERM may come before anybody listens."""
HARMS = ("truncated", "flipped", "partial")


class ViolationError(Exception):
    """Something that must hold does not."""


class Soak:
    """Rounds in one folder.

    Args:
        study: a folder in which one process has computed everything; read alone.
        place: an empty folder to work in.
        workers: of each pool.
        seed: of all draws.
        say: told a line a round.
    """

    def __init__(self, study: Path, place: Path, workers: int, seed: int, say: Callable[[str], object]) -> None:
        self.place, self.seed, self.say = place, seed, say
        self.pooled = (*ALONE, "--workers", str(workers))
        self.wanted = stored(study)
        self.temporary = Path(tempfile.mkdtemp(prefix="s", dir="/tmp"))  # short, for the sockets in it
        self.kills: Counter[str] = Counter()
        self.rounds = self.finished = self.images = 0
        shutil.copytree(study / "results", place / "results")
        self._begin_anew()

    def run(self, seconds: float, first: int = 1) -> None:
        """Rounds until the time is over, and a last undisturbed one.

        Raises:
            ViolationError: naming seed and round.
        """
        adopt()
        ends = time.monotonic() + seconds
        number = first
        try:
            while time.monotonic() < ends:
                self._told(number, self._round)
                number += 1
            self._told(number, self._finish)
        finally:
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    process.kill()
            shutil.rmtree(self.temporary, ignore_errors=True)

    def summary(self) -> str:
        """One line."""
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.kills.items()))
        return f"{self.rounds} rounds ({kinds}), {self.finished} stores finished, {self.images} images computed"

    def _told(self, number: int, work: Callable[[random.Random], str]) -> None:
        begun = time.monotonic()
        try:
            told = work(random.Random(f"{self.seed}/{number}"))
        except ViolationError as error:
            raise ViolationError(
                f"{error}; round {number} of seed {self.seed}: --seed {self.seed} --first {number}"
            ) from error
        self.say(f"round {number}: {told}, {time.monotonic() - begun:.0f} s")

    def _round(self, draw: random.Random) -> str:
        fault = draw.choice(sorted(ALLOWED))
        early, part, delay = draw.random() < EARLY, draw.random(), draw.uniform(0, 12)
        harms = [harm for harm in HARMS if draw.random() < 0.3]
        harmed = self._harm(draw, harms)
        missing = self._missing()
        moment = delay if early else int(part * len(missing) / 2)
        told = self._disturbed(draw, fault, moment, harmed, missing)
        self.rounds += 1
        if not self._missing():
            told += ", finished"
            self._whole()
            self._begin_anew(draw)
        elif draw.random() < 0.25:
            told += f"; then {self._finish(draw)}"
        return told

    def _disturbed(
        self, draw: random.Random, fault: str, moment: float | int, harmed: dict[int, str], missing: set[int]
    ) -> str:
        """One run; the fault comes at a moment: seconds after its beginning (float) or shards done by it (int)."""
        log, earlier = self.place / "log.txt", len(recorded(self.place))
        words = [sys.executable, "-m", "maehpc", *self.pooled]
        with log.open("w") as stderr:
            process = subprocess.Popen(
                words, cwd=self.place, stdout=stderr, stderr=stderr, env=self._environment(), start_new_session=True
            )
        if isinstance(moment, float):
            self._wait(process, lambda: False, limit=moment)
        else:
            self._wait(process, lambda: len(recorded(self.place)) >= earlier + moment)
        hit = self._do(draw, fault, process)
        self._wait(process, lambda: False)
        code = process.wait()
        self.kills[fault] += hit
        when = f"after {moment:.1f} s" if isinstance(moment, float) else f"after {moment} shards"
        told = f"{fault}{'' if hit else ' (too late)'} {when}, {harmed or 'no harm'} -> exit {code}"
        self._nothing_left(told)
        said = log.read_text()
        if code not in ALLOWED[fault]:
            raise ViolationError(f"{told}: {said[-1000:]}")
        if "Traceback" in said:
            raise ViolationError(f"{told}, with a traceback: {said[-2000:]}")
        if code >= 0 and (left := [path for path in (self.place / "results").rglob("*") if is_partial(path)]):
            raise ViolationError(f"{told}, and half-written files are left: {left}")
        now = self._missing()
        if now - missing:
            raise ViolationError(f"{told}, and shards are lost: {sorted(now - missing)}")
        if code == 0 and now:
            raise ViolationError(f"{told}, and shards are missing: {sorted(now)}")
        self._count(told, missing)
        return f"{told}, {SHARDS - len(now)} shards"

    def _count(self, told: str, missing: set[int]) -> None:
        """What the pool says it has done was missing, once, and is there."""
        log = events(self.place)
        begun = max((place for place, event in enumerate(log) if event["event"] == "begun"), default=len(log))
        done = [event["shard"] for event in log[begun:] if event["event"] == "done"]
        (self.place / "results/tiny/pool.jsonl").unlink(missing_ok=True)
        if len(done) != len(set(done)) or not set(done) <= missing or set(done) & self._missing():
            raise ViolationError(f"{told}, and of the missing {sorted(missing)} it says it has done {done}")
        self.images += IMAGES * len(done)

    def _do(self, draw: random.Random, fault: str, process: subprocess.Popen[bytes]) -> bool:
        """Does it; False where there is nobody left to do it to."""
        if process.poll() is not None:
            return False
        if fault == "driver":
            os.killpg(process.pid, signal.SIGKILL)
        elif fault == "term":
            process.terminate()
        elif fault != "nothing":
            found: list[psutil.Process] = []
            title = TITLES["worker" if fault == "pause" else fault]
            self._wait(process, lambda: bool(found.extend(self._below(process, title)) or found))
            if not found:
                return False
            victim = draw.choice(found)
            with suppress(psutil.NoSuchProcess):
                if fault != "pause":
                    victim.kill()
                    return True
                victim.suspend()
                time.sleep(draw.uniform(0.2, 5.0))
                victim.resume()
        return True

    @staticmethod
    def _below(process: subprocess.Popen[bytes], title: str) -> list[psutil.Process]:
        with suppress(psutil.NoSuchProcess):
            return [one for one in psutil.Process(process.pid).children(recursive=True) if named(title)(one)]
        return []

    def _wait(self, process: subprocess.Popen[bytes], due: Callable[[], bool], limit: float | None = None) -> None:
        """Until the process has ended, it is due, or the limit has passed; without one, a process that stays hangs."""
        begun = time.monotonic()
        while process.poll() is None:
            waited = time.monotonic() - begun
            if limit is not None and waited >= limit:
                return
            if due():
                return
            if waited >= ROUND_S:
                raise ViolationError(f"a command hangs: {(self.place / 'log.txt').read_text()[-1000:]}")
            time.sleep(0.01)

    def _harm(self, draw: random.Random, harms: Sequence[str]) -> dict[int, str]:
        """Damages shards that are there, each in its own way."""
        done = {}
        for harm in harms:
            whole = sorted(set(range(SHARDS)) - self._missing())
            if not whole:
                break
            shard = draw.choice(whole)
            path = draw.choice(files_of(self.place, shard))
            data = bytearray(path.read_bytes())
            if harm == "truncated":
                path.write_bytes(data[: draw.randrange(len(data))])
            elif harm == "flipped":
                data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
                path.write_bytes(data)
            else:
                partial_name(path).write_bytes(data[: len(data) // 2])
            self.kills[harm] += 1
            done[shard] = harm
        return done

    def _missing(self) -> set[int]:
        """Shards that are not recorded or not as recorded; what is recorded and whole has the right bytes.

        Raises:
            ViolationError: a recorded shard holds other bytes, or something foreign is there.
        """
        if not (ledger_of(self.place) / "store.json").exists():
            return set(range(SHARDS))
        problems = maps.verify(maps_of(self.place), ledger_of(self.place))
        missing = {problem.shard for problem in problems if problem.shard is not None}
        if strange := [problem.sentence for problem in problems if problem.shard is None and problem.kind == "foreign"]:
            raise ViolationError(f"foreign: {strange}")
        root = maps_of(self.place).parent
        for shard in set(range(SHARDS)) - missing:
            for path in files_of(self.place, shard):
                if path.read_bytes() != self.wanted[str(path.relative_to(root))]:
                    raise ViolationError(f"{path} is recorded and differs from that of one process")
        return missing

    def _finish(self, draw: random.Random) -> str:
        """An undisturbed command finishes the store."""
        alone = draw.random() < 0.3
        missing = self._missing()
        words = (*ALONE, "--threads", "1") if alone else self.pooled
        done = command(self.place, *words, environment=self._environment())
        how = f"{'one process' if alone else 'a pool'} finishes {len(missing)} shards"
        if done.returncode != 0:
            raise ViolationError(f"{how} -> exit {done.returncode}: {done.stderr[-1000:]}")
        self._nothing_left(how)
        if alone:
            self.images += IMAGES * len(missing)
        else:
            self._count(how, missing)
        self._whole()
        self._begin_anew(draw)
        return how

    def _whole(self) -> None:
        """The store is that of one undisturbed process, and `maehpc verify` finds nothing."""
        found = stored(self.place)
        if different := [
            name for name in found.keys() | self.wanted.keys() if found.get(name) != self.wanted.get(name)
        ]:
            raise ViolationError(f"the finished store differs from that of one process in {sorted(different)[:5]}")
        records = sorted(path.name for path in ledger_of(self.place).glob("shard-*"))
        if records != [f"shard-{shard:05d}.json" for shard in range(SHARDS)]:
            raise ViolationError(f"the ledger does not have each shard once: {records}")
        verified = command(self.place, "verify", "results", environment=self._environment())
        if verified.returncode != 0:
            raise ViolationError(f"verify: {verified.stdout}{verified.stderr}")
        self.finished += 1

    def _nothing_left(self, told: str) -> None:
        """Whoever was started has ended, whatever became of its parent, and the temporary folder is empty."""
        deadline = time.monotonic() + GONE_S
        while (left := psutil.Process().children(recursive=True)) and time.monotonic() < deadline:
            bury()
            time.sleep(0.05)
        if left:
            raise ViolationError(f"{told}, and processes are left: {left}")
        if files := sorted(path.name for path in self.temporary.iterdir()):
            raise ViolationError(f"{told}, and temporary files are left: {files}")

    def _begin_anew(self, draw: random.Random | None = None) -> None:
        """Leaves nothing of the store, or some shards, which a fault can then befall."""
        if draw is not None and draw.random() < 0.7:
            forget(self.place, draw.sample(range(SHARDS), draw.randint(SHARDS // 3, SHARDS - 5)))
        else:
            for folder in ("maps", "ledger"):
                shutil.rmtree(self.place / "results" / "tiny" / folder)
        (self.place / "results/tiny/pool.jsonl").unlink(missing_ok=True)

    def _environment(self) -> dict[str, str]:
        kept = {"TMPDIR": str(self.temporary), "TORCHINDUCTOR_CACHE_DIR": str(self.place / "inductor")}
        return {**os.environ, **kept}


def main() -> int:
    """Parses, soaks, tells."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6), help="[default: any]")
    parser.add_argument("--first", type=int, default=1, help="number of the first round")
    parser.add_argument("--place", type=Path, help="a new folder to work in  [default: a temporary one]")
    parser.add_argument("--study", type=Path, help="a finished study of tests/pool_runs.py  [default: made first]")
    told = parser.parse_args()
    place = told.place or Path(tempfile.mkdtemp(prefix="maehpc-soak-"))
    place.mkdir(parents=True, exist_ok=True)
    study = told.study
    if study is None:
        study = place / "study"
        study.mkdir()
        make_study(study)
    work = place / "work"
    work.mkdir()
    print(f"seed {told.seed}, in {place}", flush=True)
    soak = Soak(study, work, told.workers, told.seed, lambda line: print(line, flush=True))
    try:
        soak.run(60 * told.minutes, told.first)
    except ViolationError as error:
        print(f"{soak.summary()}\nVIOLATION: {error}; what it left is in {place}", file=sys.stderr)
        return 1
    print(soak.summary())
    shutil.rmtree(place)
    return 0


if __name__ == "__main__":
    sys.exit(main())
