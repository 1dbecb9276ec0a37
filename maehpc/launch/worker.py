"""One rank of a job: `python -m maehpc.launch.worker FOLDER`, started by srun or by submitit's local executor.

Signals are taken from the first line on. They only ask for the end: the ranks agree on a step, a whole checkpoint is
written, and the attempt's outcome says that it is to be continued. The batch script's last line (`after.py`) sees to
that. Rank 0 alone writes into the job's folder; other hosts of a pool leave word there of their own part.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maehpc.errors import InputError, Interrupted, LostRanksError, MaehpcError, RunError
from maehpc.interruption import Stop
from maehpc.launch.profile import DebugProfile, Profile, SlurmProfile, parse_profile
from maehpc.launch.pulse import BEAT_S, Pulse, PulsingProgress, watched
from maehpc.launch.record import Attempt, JobFolder, JobRecord, Outcome
from maehpc.launch.seat import Seat, find_seat, own_folder
from maehpc.launch.signals import take_signals
from maehpc.progress import LineProgress

if TYPE_CHECKING:
    from maehpc.stages.context import Context
    from maehpc.stages.fleet import Fleet
    from maehpc.stages.prometheus import ExplainMetrics

LOCAL_RESTART = 144
"""With this exit code submitit's local controller starts the tasks again."""
START_LIMIT_S = 300.0
"""Seconds that ranks wait for rank 0 to begin the attempt; hosts of a large job do not start together."""
LOOK_S = 2.0
"""Seconds between two looks at whether a newer attempt has begun, or the wall time is near."""


def begin(job: JobFolder, seat: Seat) -> int:
    """This start's attempt number: rank 0 records it, the others find it.

    Raises:
        RunError: rank 0 did not begin.
    """
    if seat.rank == 0:
        facts = Attempt(job_id=seat.job_id, restart=seat.restart, hosts=seat.hosts, ranks=seat.size, pid=os.getpid())
        return job.begin_attempt(facts)
    deadline, pause = time.monotonic() + START_LIMIT_S, 0.05
    while time.monotonic() < deadline:
        number = job.newest_attempt()
        attempt = job.attempt(number) if number else None
        if attempt is not None and _same_start(attempt, seat):
            return number
        time.sleep(pause)
        pause = min(2 * pause, 1.0)  # a thousand ranks must not ask a shared file system all the time
    raise LostRanksError(f"rank 0 did not begin within {START_LIMIT_S:.0f} s; see its log")


def _same_start(attempt: Attempt, seat: Seat) -> bool:
    if (attempt.job_id, attempt.restart) != (seat.job_id, seat.restart):
        return False
    if seat.scheduler == "slurm":
        return True
    # The local executor starts its tasks again under the same id: rank 0 of this start is a child of our own parent.
    import psutil

    try:
        return bool(psutil.Process(attempt.pid).ppid() == os.getppid())
    except psutil.NoSuchProcess:
        return False


class _Meeting:
    """Ranks find each other through the job's folder."""

    def __init__(self, job: JobFolder, attempt: int) -> None:
        self._job = job
        self._attempt = attempt

    def publish(self, facts: dict[str, Any]) -> None:
        self._job.publish_rendezvous(self._attempt, facts)

    def find(self) -> dict[str, Any] | None:
        return self._job.rendezvous(self._attempt)


def _threads(profile: Profile, seat: Seat, recorded: int | None) -> int:
    if profile.threads or recorded:
        return profile.threads or recorded or 1
    return seat.cpus or max(1, len(os.sched_getaffinity(0)) // seat.local_size)


@contextmanager
def _context(
    job: JobFolder,
    record: JobRecord,
    seat: Seat,
    attempt: int,
    pulse: Pulse,
    stop: Stop,
    metrics: ExplainMetrics | None,
) -> Iterator[Context]:
    """What the stage is given; where a pool computes, one rank of the job computes with it and meets no others."""
    from maehpc.devices import choose_device, set_threads
    from maehpc.experiment import Experiment
    from maehpc.recipes import Recipe
    from maehpc.stages.context import Context
    from maehpc.stages.provenance import recorded_threads
    from maehpc.training.distributed import ALONE, World, join

    profile = parse_profile(record.profile)
    experiment = Experiment(Path(record.results) / record.experiment)
    set_threads(_threads(profile, seat, recorded_threads(experiment.provenance)))
    device = choose_device(profile.device, seat.local_rank)
    world = ALONE if record.workers_per_node else World(seat.rank, seat.size, seat.local_rank)
    # What all ranks would say alike, rank 0 says.
    progress = PulsingProgress(LineProgress(quiet=seat.rank > 0), pulse)
    if device.type == "cpu" and isinstance(profile, SlurmProfile) and profile.gpus_per_node and seat.rank == 0:
        progress.warn(f"gpus_per_node is {profile.gpus_per_node}, and PyTorch sees no GPU: computing on the CPU")
    interface = profile.interface if isinstance(profile, SlurmProfile) else None
    timeout_s = 600 if isinstance(profile, DebugProfile) else profile.collective_timeout_s
    with join(world, device, _Meeting(job, attempt), timeout_s, interface) as joined:
        yield Context(
            experiment=experiment,
            recipe=Recipe.model_validate(record.recipe),
            device=device,
            packs=Path(record.packs),
            progress=progress,
            world=joined,
            stop=stop,
            identity=str(job.path),
            metrics=metrics,
        )


def _work(context: Context, record: JobRecord, pulse: Pulse, fleet: Fleet | None) -> None:
    from maehpc.experiment import Experiment
    from maehpc.recipes import Recipe
    from maehpc.report import aggregate
    from maehpc.stages.begin import begin as begin_experiment
    from maehpc.stages.guard import out_of_memory_told
    from maehpc.stages.pipeline import run_stages
    from maehpc.stages.preflight import check

    if record.stage == "report":
        pulse.phase("report")
        if context.world.leader:
            aggregate(context.experiment.root, progress=context.progress)
        context.world.barrier()
        return
    contexts = [context]
    for name, recipe in record.also.items():
        experiment = Experiment(Path(record.results) / name)
        contexts.append(replace(context, experiment=experiment, recipe=Recipe.model_validate(recipe)))
    with ExitStack() as until_end:
        for one in contexts:
            context.world.from_leader(partial(check, one, [record.stage]))
        for one in contexts:
            until_end.enter_context(begin_experiment(one, list(record.command), [record.stage]))
        until_end.enter_context(out_of_memory_told())
        run_stages(contexts, [record.stage], fleet)
    pulse.phase("ending")


def _say(sentence: str) -> None:
    with suppress(OSError):  # the log may lie on the disk that is full
        print(f"maehpc: {sentence}", file=sys.stderr, flush=True)


def run_rank(job: JobFolder, seat: Seat, stop: Stop) -> int:
    """Runs this rank to the attempt's end.

    Returns:
        The process's exit code.
    """
    from maehpc.launch import allocation

    absent: set[str] = set()
    try:
        return _run(job, seat, stop, absent)
    finally:
        if absent:
            allocation.end_step(seat)


def _run(job: JobFolder, seat: Seat, stop: Stop, absent: set[str]) -> int:
    from maehpc.launch import allocation
    from maehpc.launch.snapshot import verify_snapshot
    from maehpc.pool.crew import ClusterLostError

    record = job.record()
    seconds_left = _unknown
    attempt = begin(job, seat)
    leader = seat.rank == 0
    pulse = Pulse(partial(job.beat, attempt))

    def ended(outcome: Outcome) -> None:
        if record.workers_per_node and not leader:
            allocation.say(job, attempt, seat, outcome.reason)  # a pool may go on without this host
        elif leader or (outcome.outcome in ("failed", "refused") and job.outcome(attempt) is None):
            job.write_outcome(attempt, outcome)

    def look() -> None:
        try:
            newest = job.newest_attempt()
        except OSError:  # a file system that stumbles: the next look tells
            return
        if newest > attempt:
            sentence = f"attempt {attempt} no longer owns {job.path}: a newer one has begun; this process ends"
            _say(sentence)
            with suppress(RunError):
                ended(Outcome(outcome="fenced", reason=sentence))
            os._exit(LostRanksError.exit_code)

    if job.cancelled:  # a requeue brought it back to life
        ended(Outcome(outcome="interrupted", reason="the job was cancelled before it began"))
        return 1
    try:
        with ExitStack() as watches:
            if seat.local_rank == 0:  # one of each host: its end is noticed by the others
                watches.enter_context(watched(LOOK_S, look))
                verify_snapshot(Path(record.code), record.code_digest)
            if leader:
                pulse.write()
                watches.enter_context(watched(BEAT_S, pulse.write))
                seconds_left = watches.enter_context(_wall_time(seat, record, stop))
                ranks = "1 rank" if seat.size == 1 else f"{seat.size} ranks"
                if record.workers_per_node:
                    watches.callback(allocation.leave, job, attempt)
                    ranks = f"{len(seat.hosts) * record.workers_per_node} workers"
                print(f"maehpc: {job.label}, attempt {attempt}, {ranks} on {' '.join(seat.hosts)}", flush=True)
            if record.workers_per_node and not leader:
                allocation.serve(job, record, seat, attempt, stop)
                return 0
            metrics = watches.enter_context(_metrics(record, seat)) if record.metrics_port is not None else None
            with _context(job, record, seat, attempt, pulse, stop, metrics) as context:
                fleet = None
                if record.workers_per_node:
                    fleet = allocation.fleet(job, record, seat, attempt, context, seconds_left, absent)
                _work(context, record, pulse, fleet)
            if leader:
                pulse.write()
    except Interrupted as error:
        saved = "everything finished is saved" if error.step is None else f"saved after step {error.step}"
        ended(Outcome(outcome="interrupted", reason=f"{error.reason}, {saved}", requeue=not job.cancelled))
        if leader:
            _say(f"{error.work} was interrupted ({error.reason}), {saved}")
        return 0
    except ClusterLostError as error:  # as if this rank had died: another attempt has a new one
        _say(str(error))
        return LostRanksError.exit_code
    except LostRanksError as error:  # another rank died: what there is to say of that, the batch script says
        _say(str(error))
        return error.exit_code
    except MaehpcError as error:
        _say(str(error))
        refused = isinstance(error, InputError)
        ended(Outcome(outcome="refused" if refused else "failed", reason=str(error)))
        return error.exit_code
    ended(Outcome(outcome="done"))
    return 0


@contextmanager
def _metrics(record: JobRecord, seat: Seat) -> Iterator[ExplainMetrics]:
    """Serves metrics on the address of rank 0's host that others reach, as Prometheus is elsewhere."""
    from maehpc.addresses import address_for
    from maehpc.stages.prometheus import LOOPBACK, serving

    profile = parse_profile(record.profile)
    assert record.metrics_port is not None
    address = address_for(seat.hosts[1:], profile.interface) if isinstance(profile, SlurmProfile) else LOOPBACK
    with serving(record.metrics_port, address, lambda told: print(f"maehpc: {told}", flush=True)) as metrics:
        yield metrics


def _unknown() -> float | None:
    """Seconds left where nobody knows of an end."""
    return None


@contextmanager
def _wall_time(seat: Seat, record: JobRecord, stop: Stop) -> Iterator[Callable[[], float | None]]:
    """Asks for the end when less wall time is left than the profile's lead: the signal for it does not always come.

    The time left is the controller's word and is counted down by this process, whatever its clock says.

    Yields:
        What tells how many seconds are left until then; None where nobody knows.
    """
    from maehpc.launch import slurm

    profile = parse_profile(record.profile)
    if seat.scheduler != "slurm" or not isinstance(profile, SlurmProfile):
        yield _unknown
        return
    try:
        left = slurm.time_left_s(seat.job_id)
    except RunError:  # the controller is away: the signal will come
        left = None
    if left is None:
        yield _unknown
        return
    ends = time.monotonic() + left - profile.signal_lead_s

    def look() -> None:
        if time.monotonic() >= ends:
            stop.request("the wall time is near")

    with watched(LOOK_S, look):
        yield lambda: ends - time.monotonic()


def main(arguments: list[str]) -> int:
    """Runs the rank that the environment tells of.

    Args:
        arguments: the job's folder; of an array, its first member's.
    """
    stop = Stop()
    take_signals(stop)
    # Hosts whose addresses have no names are common, and each connection would say so in every rank's log.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        seat = find_seat(os.environ)
        job = own_folder(Path(arguments[0]), seat.member)
        code = run_rank(job, seat, stop)
    except MaehpcError as error:
        _say(str(error))
        return error.exit_code
    except Exception:
        with suppress(OSError):
            traceback.print_exc()
        return LostRanksError.exit_code  # nothing that a sentence exists for: it is taken for a crash
    if seat.scheduler == "local" and seat.rank == 0 and code in (0, LostRanksError.exit_code):
        from maehpc.launch.after import continues_locally

        return LOCAL_RESTART if continues_locally(job) else code
    return code


if __name__ == "__main__":
    exit_code = main(sys.argv[1:])
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(exit_code)  # threads of a communication library must not keep a rank that has ended
