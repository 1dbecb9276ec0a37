"""The batch script's last line: `python -m maehpc.launch.after FOLDER CODE`, once srun has ended with CODE.

Here alone is decided whether a job goes on. Ranks only leave word (outcomes/NNNN.json): interrupted work is requeued,
or submitted anew where the site forbids requeueing; ranks that died are started again as long as attempts come
further; what failed for a reason that would recur stays failed. Slurm itself requeues after a host's failure and after
a preemption; this line then finds its job no longer running and keeps out of it.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from maehpc import files
from maehpc.errors import InputError, MaehpcError, RunError
from maehpc.launch import slurm
from maehpc.launch.profile import SlurmProfile, parse_profile
from maehpc.launch.record import Attempt, Heartbeat, JobFolder, Outcome
from maehpc.launch.seat import array_member, own_folder, restarts, slurm_job_id
from maehpc.launch.slurm_formats import SlurmJob

CANCELLED_WITHIN_S = 15.0
"""Seconds that a cancelled job waits for the scheduler's word."""
KILLED_WITHIN_S = 60.0
"""Seconds in which a requeued job's batch script is ended by Slurm."""
ROOM_BYTES = 1 << 16
"""What must fit into the results folder before a job is started again."""
LAST_SIGNAL = 31
"""Shells say 128 + N of a process that signal N ended; Slurm has codes of its own above these."""
LOCAL_ATTEMPTS = 3
"""Starts without progress after which the local profile gives up."""


def position(beat: Heartbeat | None) -> tuple[str, str, int] | None:
    """What an attempt was at: phase, data set, units."""
    return None if beat is None else (beat.phase, beat.dataset or "", beat.done or 0)


def attempts_without_progress(job: JobFolder) -> int:
    """How many of the newest attempts died one after another without coming further than those before them."""
    count = 0
    further: tuple[str, str, int] | None = None
    for number in sorted(job.attempts(), reverse=True):
        if job.outcome(number) is not None:
            break
        here = position(job.heartbeat(number))
        # Going back in time: a later attempt that stood further on, or at another piece of work, had made progress.
        if further is not None and (here is None or further[:2] != here[:2] or further[2] > here[2]):
            break
        count += 1
        further = here
    return count


def continues_locally(job: JobFolder) -> bool:
    """Whether the local executor shall start the ranks again."""
    if job.cancelled:
        return False
    outcome = job.outcome(job.newest_attempt())
    if outcome is not None:
        return outcome.outcome == "interrupted" and "SIGTERM" not in outcome.reason and outcome.requeue
    return attempts_without_progress(job) < LOCAL_ATTEMPTS


def decide(job: JobFolder, job_id: str, restart: int, code: int) -> tuple[str, str]:
    """What becomes of the job: (`done`, ``), (`end`, ``), (`continue`, why) or (`fail`, why).

    Args:
        job: its folder.
        job_id: the scheduler's.
        restart: how many times the scheduler had restarted it.
        code: srun's exit code.
    """
    if job.cancelled:
        return "end", ""
    newest = job.newest_attempt()
    mine = [
        number for number, attempt in job.attempts().items() if (attempt.job_id, attempt.restart) == (job_id, restart)
    ]
    if mine and mine[-1] != newest:
        return "end", ""  # this start was given up, and another one owns the job
    began = bool(mine)
    if not began:
        if code == InputError.exit_code:
            return "fail", "the ranks were refused before they began"
        # A start that no rank survived to tell of (a host's daemon had just come back, say) counts as an attempt too.
        job.begin_attempt(Attempt(job_id=job_id, restart=restart, hosts=(), ranks=0, pid=0))
    outcome = job.outcome(newest) if began else None
    if outcome is not None and outcome.outcome == "interrupted":
        return "continue", outcome.reason
    if outcome is not None:
        return ("done" if outcome.outcome == "done" else "end"), ""
    if code == 0:
        return "fail", "the ranks ended without saying how"
    profile = parse_profile(job.record().profile)
    limit = profile.requeue.attempts_without_progress if isinstance(profile, SlurmProfile) else LOCAL_ATTEMPTS
    count = attempts_without_progress(job)
    told = f"srun ended with {code}" + (f" (signal {code - 128})" if 128 < code <= 128 + LAST_SIGNAL else "")
    told += "" if began else " before any rank had begun"
    if count >= limit:
        return "fail", f"{told}; {count} attempts in a row came no further"
    return "continue", told


def require_room(job: JobFolder) -> None:
    """Another attempt on a disk that takes no more would fail like this one, and could not even say so.

    Raises:
        RunError: the job's folder cannot be written.
    """
    probe = job.path / ".room"
    files.write_bytes(probe, b"\0" * ROOM_BYTES)
    probe.unlink(missing_ok=True)


def ours_to_decide(mine: SlurmJob, restart: int) -> bool:
    """Whether Slurm would let the job end here.

    It would while it calls the job running (also within the grace of a preemption), and at the end of the wall time.
    Otherwise it is ending the job: because it requeues it by itself, and counts one restart more already, or because
    a person cancelled it, and a requeue would bring that job back to life.
    """
    if mine.restarts not in (None, restart):
        return False
    return mine.state == "RUNNING" or mine.reason == "TimeLimit"


def go_on(job: JobFolder, job_id: str, reason: str) -> int:
    """Requeues the job, or submits it anew where that is refused.

    Returns:
        The batch script's exit code.
    """
    profile = parse_profile(job.record().profile)
    allowed = isinstance(profile, SlurmProfile) and profile.requeue.enabled
    print(f"maehpc: {job.label} is to be continued ({reason})", file=sys.stderr, flush=True)
    if allowed and not job.cancelled and slurm.requeue(job_id):
        if JobFolder(job.path).cancelled:  # asked for meanwhile: the requeue must not bring the job back
            slurm.cancel([job_id])
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # ignored until now, so that nothing ends this line undecided
        time.sleep(KILLED_WITHIN_S)  # Slurm ends this script
        return 1
    from maehpc.launch.submission import resubmit

    submission = resubmit(job, dependency=f"afterany:{job_id}")
    accepted = submission.accepted
    assert accepted is not None
    print(f"maehpc: {job.label} goes on as job {accepted.job_id}", file=sys.stderr, flush=True)
    return 0


def _asked(job_id: str) -> SlurmJob | None:
    """What Slurm says of the job; a controller that is being restarted is asked again."""
    for patience in (2.0, 5.0, None):
        try:
            return slurm.show(job_id)
        except RunError as error:
            print(f"maehpc: {error}", file=sys.stderr, flush=True)
            if patience is not None:
                time.sleep(patience)
    return None


def main(arguments: list[str]) -> int:
    """Decides and acts.

    Args:
        arguments: the job's folder (of an array, its first member's) and srun's exit code.
    """
    job_id = slurm_job_id(os.environ)
    assert job_id is not None, "the batch script runs under Slurm"
    job = own_folder(Path(arguments[0]), array_member(os.environ))
    code = int(arguments[1])
    if job.cancelled:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(CANCELLED_WITHIN_S)  # the client that asked for the end is about to take the job away
        return code or 1
    mine = _asked(job_id)
    if mine is not None and not ours_to_decide(mine, restarts(os.environ)):
        print(f"maehpc: Slurm says {mine.state} of this job and decides on it", file=sys.stderr, flush=True)
        return code
    verdict, reason = decide(job, job_id, restarts(os.environ), code)
    if verdict == "done":
        return 0  # whatever befell the ranks afterwards: a preemption may end srun when all the work is done
    if verdict == "end":
        return code
    if verdict == "continue":
        require_room(job)
        return go_on(job, job_id, reason)
    print(f"maehpc: {job.label} failed: {reason}; see `maehpc logs`, then `maehpc resume`", file=sys.stderr, flush=True)
    newest = job.newest_attempt()
    if newest and job.outcome(newest) is None:
        job.write_outcome(newest, Outcome(outcome="failed", reason=reason))
    return code or 1


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except MaehpcError as error:
        print(f"maehpc: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
