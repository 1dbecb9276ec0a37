"""A pool over the hosts of a job: rank 0 begins the cluster and drives it, every other host joins.

A job in the background of this machine has rank 0 alone, and its cluster keeps all others out.

    rank 0                                   one task on each other host
    cluster of Ray, announced in             waits for the announcement, joins, and begins
    the job's folder; the driver             anew where Ray ends; ends with the attempt

The hosts meet through the job's folder alone. A host that comes late is put to work when it is there, and one that is
lost costs the shards that it had in hand. Rank 0 calls the roll (`rollcall.py`): hosts that never come end the attempt,
unless fewer are enough.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from maehpc.addresses import address_for, route_to
from maehpc.errors import InputError, LostRanksError, RunError
from maehpc.interruption import Stop
from maehpc.launch import slurm
from maehpc.launch.logs import log_files, start_of_last_lines
from maehpc.launch.profile import Profile, SlurmProfile, parse_profile
from maehpc.launch.record import JobFolder, JobRecord
from maehpc.launch.rollcall import Absent, RollCall
from maehpc.launch.seat import Seat

if TYPE_CHECKING:
    import torch

    from maehpc.pool.cluster import Head
    from maehpc.stages.context import Context
    from maehpc.stages.fleet import Announce, Fleet, Lost

ANNOUNCED_WITHIN_S = 7200.0
"""Seconds that a host waits for rank 0, which first reads all that is done already; where rank 0 is killed meanwhile,
nothing else ends the wait."""
AGAIN_S = 5.0
"""Seconds before a host joins anew."""
FUTILE = 3
"""Attempts in a row to join that Ray ended by itself, none of which lasted `LASTING_S`; then rank 0 counts as lost."""
LASTING_S = 60.0
PARTING_S = 15.0
"""Seconds that a host that was asked to end gives rank 0 to say how the attempt ended."""
FAREWELL_S = 5.0
"""Seconds that the hosts that came have to end Ray before Slurm asks them to end, too."""
LOOK_S = 1.0
ANSWERED_WITHIN_S = 5.0
"""Seconds that Ray has to tell, at the end, who has come."""
_LONGEST = 300
"""Bytes of a host's last line that are told."""


def fleet(
    job: JobFolder,
    record: JobRecord,
    seat: Seat,
    attempt: int,
    context: Context,
    seconds_left: Callable[[], float | None],
    absent: set[str],
) -> Fleet:
    """The workers of all hosts that the job has, for rank 0.

    In the block of its cluster a RunError is raised where too few of the hosts come up. Names of hosts that have not
    come by its end are put into `absent`.

    Raises:
        InputError: a host has fewer GPUs than workers, or Ray's dashboard cannot be served on this one.
        RunError: there is no such network interface.
    """
    from maehpc.pool import dashboard
    from maehpc.pool.cluster import LOOPBACK, cluster
    from maehpc.stages.fleet import Fleet, threads_each

    if record.dashboard_port is not None:
        dashboard.check(record.dashboard_port)
    profile, each = parse_profile(record.profile), record.workers_per_node
    gpus = _gpus(context.device, each)
    threads = profile.threads or threads_each(_cpus(seat), each)
    if seat.scheduler == "local":
        begun: Callable[[Announce], AbstractContextManager[Lost]] = partial(
            cluster, each, gpus * each, LOOPBACK, dashboard=record.dashboard_port
        )
    else:
        address = address_for(seat.hosts[1:], _interface(profile))
        begun = partial(_called, job, record, seat, attempt, context, absent, each, gpus * each, address)
    host = "" if seat.scheduler == "local" else seat.hosts[0]
    return Fleet(each * len(seat.hosts), threads, gpus, begun, seconds_left, host)


@contextmanager
def _called(
    job: JobFolder,
    record: JobRecord,
    seat: Seat,
    attempt: int,
    context: Context,
    absent: set[str],
    cpus: int,
    gpus: int,
    address: str,
    announce: Announce,
) -> Iterator[Lost]:
    """The cluster, and the roll call of its hosts whenever somebody asks whether it is still there."""
    from maehpc.pool.asked import Asked
    from maehpc.pool.cluster import joined

    profile = parse_profile(record.profile)
    assert isinstance(profile, SlurmProfile)
    names = Asked(joined, LOOK_S)
    with _announced(job, attempt, seat.hosts[0], cpus, gpus, address, announce, record.dashboard_port) as lost:
        roll = RollCall(
            job.label,
            seat.hosts,
            record.min_nodes or len(seat.hosts),
            profile.host_timeout_s,
            lambda: names.newest() or (),
            partial(_absent, job, seat, attempt),
            context.progress.warn,
        )

        def look() -> str | None:
            why = lost()
            if why is None and context.stop.reason is None:
                roll.look()
            return why

        try:
            yield look
            if context.stop.reason is None:
                roll.close(names.anew(ANSWERED_WITHIN_S) or ())
        finally:
            absent |= roll.missing


def end_step(seat: Seat) -> None:
    """Ends what is left of the ranks, where a host did not come up; rank 0's own last act.

    A host that cannot reach this one cannot tell srun of its end either, for which srun would wait until the wall time.
    """
    time.sleep(FAREWELL_S)
    with suppress(RunError):
        slurm.cancel([f"{seat.job_id}.{os.environ['SLURM_STEP_ID']}"])


def _absent(job: JobFolder, seat: Seat, attempt: int, host: str) -> Absent:
    """What is known of a host that has not joined; what cannot be read now is left out."""
    said: str | None = None
    log: Path | None = None
    with suppress(InputError, OSError):
        said = job.said(attempt, host)
    with suppress(InputError, OSError):
        ours = (seat.job_id, seat.hosts.index(host))  # with one task a host, ranks are in the order of hosts
        printed = [one.path for one in log_files(job) if (one.job_id, one.rank) == ours]
        log = next((path for path in reversed(printed) if path.stat().st_size), printed[0] if printed else None)
        if said is None and log is not None and not seat.restart:  # a restart appends to what an earlier one said
            with log.open("rb") as handle:
                handle.seek(start_of_last_lines(log, 1))
                said = " ".join(handle.read(_LONGEST).decode(errors="replace").split()) or None
    return Absent(host, said, log)


@contextmanager
def _announced(
    job: JobFolder,
    attempt: int,
    name: str,
    cpus: int,
    gpus: int,
    address: str,
    also: Announce,
    dashboard: int | None,
) -> Iterator[Lost]:
    from maehpc.pool.cluster import cluster

    secret = _token_path(job, attempt)

    def announce(head: Head) -> None:
        with os.fdopen(os.open(secret, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as handle:
            handle.write(head.token)
        job.publish_rendezvous(attempt, {"address": head.address, "mark": head.mark})
        also(head)

    secret.parent.mkdir(exist_ok=True)
    for older in secret.parent.glob("*.token"):  # of an attempt that was killed
        older.unlink(missing_ok=True)
    try:
        with cluster(cpus, gpus, address, announce, name, dashboard) as lost:
            yield lost
    finally:
        secret.unlink(missing_ok=True)


def _token_path(job: JobFolder, attempt: int) -> Path:
    return job.path / "rendezvous" / f"{attempt:04d}.token"


def _left_path(job: JobFolder, attempt: int) -> Path:
    return job.path / "rendezvous" / f"{attempt:04d}.left"


def leave(job: JobFolder, attempt: int) -> None:
    """Tells the other hosts that rank 0 needs them no more, however the attempt ends."""
    path = _left_path(job, attempt)
    with suppress(OSError):  # on a disk that takes no writes; Ray's own end tells them too
        path.parent.mkdir(exist_ok=True)
        path.touch()


def say(job: JobFolder, attempt: int, seat: Seat, sentence: str) -> None:
    """Leaves word for rank 0 of how this host's part stands."""
    with suppress(RunError):  # a disk that takes no writes; the log has it too
        job.say(attempt, seat.hosts[seat.rank], sentence)


def serve(job: JobFolder, record: JobRecord, seat: Seat, attempt: int, stop: Stop) -> None:
    """Another host's part: joins the cluster, again and again, until the attempt has ended.

    Raises:
        LostRanksError: rank 0's cluster is gone and it does not say why.
        RunError: rank 0 announced nothing, or there is no such network interface.
    """
    from maehpc.pool.cluster import join

    profile, each = parse_profile(record.profile), record.workers_per_node
    ended = _ended(job, attempt, stop)
    name = seat.hosts[seat.rank]
    say(job, attempt, seat, "waits for rank 0's cluster")
    head = _found(job, attempt, ended)
    secret = _token_path(job, attempt)

    def over() -> bool:
        with suppress(OSError):  # a file system that stumbles: the next look tells
            return ended() or not secret.exists()  # which lies there as long as the cluster is wanted
        return False

    interface = _interface(profile)
    futile = 0
    said: str | None = None
    while head is not None and not over():
        begun = time.monotonic()
        address = address_for((), interface) if interface else route_to(head.address.rpartition(":")[0])
        gpus = _visible_gpus() if profile.device != "cpu" else 0
        if said is None:  # else why it ended says more
            say(job, attempt, seat, f"Ray is begun at {address} to join {head.address}, and has not come up")
        try:
            said = join(head, each, min(gpus, each), address, over, name)
        except OSError as error:  # no room for Ray's files, say
            said = " ".join(str(error).split())
        if said is not None:
            say(job, attempt, seat, f"Ray ended: {said}")
            futile = futile + 1 if time.monotonic() - begun < LASTING_S else 1
            if futile >= FUTILE:
                raise LostRanksError(f"rank 0's cluster cannot be joined any more ({said}); see its log")
            print(f"maehpc: Ray ended on {name} ({said}); it is begun anew", flush=True)
            until = time.monotonic() + AGAIN_S
            while time.monotonic() < until and not over():
                time.sleep(LOOK_S)


def _ended(job: JobFolder, attempt: int, stop: Stop) -> Callable[[], bool]:
    """What tells whether the attempt has ended, or this host was asked to end and rank 0 does not say how it ended."""
    asked: float | None = None

    def ended() -> bool:
        nonlocal asked
        now = time.monotonic()
        if stop.reason is not None:
            asked = asked or now
            if now - asked > PARTING_S:
                return True
        with suppress(OSError):  # a file system that stumbles: the next look tells
            return job.outcome(attempt) is not None or _left_path(job, attempt).exists()
        return False

    return ended


def _found(job: JobFolder, attempt: int, ended: Callable[[], bool]) -> Head | None:
    from maehpc.pool.cluster import Head

    deadline = time.monotonic() + ANNOUNCED_WITHIN_S
    while not ended():
        facts = job.rendezvous(attempt)
        if facts is not None:
            try:
                token = _token_path(job, attempt).read_text()
            except OSError:  # the cluster has ended already
                return None
            return Head(facts["address"], facts["mark"], token)
        if time.monotonic() > deadline:
            raise RunError(f"rank 0 began no cluster within {ANNOUNCED_WITHIN_S:.0f} s; see its log")
        time.sleep(LOOK_S)
    return None


def _interface(profile: Profile) -> str | None:
    return profile.interface if isinstance(profile, SlurmProfile) else None


def _cpus(seat: Seat) -> int:
    return seat.cpus or len(os.sched_getaffinity(0))


def _visible_gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _gpus(device: torch.device, workers: int) -> int:
    if device.type != "cuda":
        return 0
    seen = _visible_gpus()
    if seen < workers:
        raise InputError(
            f"{workers} workers a host, and PyTorch sees {seen} GPUs; ask for as many GPUs a node, or fewer tasks"
        )
    return 1
