"""Jobs in the background of this machine: `python -m maehpc.launch.local FOLDER TOKEN` is a job's controller.

submitit's controller starts the ranks, keeps their logs, forwards SIGTERM and tells them when their time is nearly up.
Ours adds what jobs need that belong together: it waits for earlier jobs and for its turn, ends all ranks when one has
died, and starts them again while they come further. The controller's process id is the job's id. It has a session of
its own, so that it outlives the client and its terminal.
"""

from __future__ import annotations

import fcntl
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from submitit.local.local import LOCAL_REQUEUE_RETURN_CODE, Controller

from maehpc import files
from maehpc.errors import InputError, MaehpcError, RunError
from maehpc.launch.profile import LocalProfile
from maehpc.launch.record import JobFolder, JobRecord
from maehpc.launch.submission import succeeded

MODULE = "maehpc.launch.local"
GRACE_S = 10.0
"""Seconds that ranks have to end by themselves after another has died."""
_LOOK_S = 0.5
_SLOTS = ".slots"


class JobController(Controller):
    """submitit's controller with a job's manners."""

    def __init__(self, job: JobFolder) -> None:
        self.stopped = False
        self.job = job
        super().__init__(job.logs)

    def _forward_signal(self, signum: Any, *args: Any) -> None:
        if signum == signal.SIGTERM:
            self.stopped = True
        super()._forward_signal(signum)

    def wait(self, freq: int = 24) -> Sequence[int | None]:
        """Waits until all ranks have ended, one has died and the others had their grace, or the time is up."""
        began = time.monotonic()
        told = False
        died: float | None = None
        while True:
            codes = [task.poll() for task in self.tasks]
            now = time.monotonic()
            if all(code is not None for code in codes) or now - began >= self.timeout_s:
                return codes
            if died is None and any(code not in (None, 0, LOCAL_REQUEUE_RETURN_CODE) for code in codes):
                died = now
            if died is not None and now - died >= GRACE_S:
                return codes
            if not told and now - began >= self.timeout_s - self.signal_delay_s:
                told = True
                self._forward_signal(signal.SIGUSR2)
            time.sleep(1 / freq)

    def run(self, max_retry: int = 0) -> None:
        """Starts the ranks until they are done, fail, or come no further.

        Raises:
            RunError: they failed; the job's records and logs tell why.
        """
        from maehpc.launch.after import continues_locally

        codes: Sequence[int | None] = ()
        while not self.stopped:
            try:
                self.start_tasks()
                codes = self.wait()
            finally:
                self.kill_tasks()
            again = LOCAL_REQUEUE_RETURN_CODE in codes
            died = any(code != 0 for code in codes) and self.job.outcome(self.job.newest_attempt()) is None
            if not (again or (died and continues_locally(self.job))):
                break
        if any(code != 0 for code in codes):
            raise RunError(f"ranks of {self.job.label} ended with {' '.join(map(str, codes))}")

    def sleep(self) -> None:
        """Lets some time pass.

        Raises:
            RunError: the job was asked to end before it began.
        """
        time.sleep(_LOOK_S)
        if self.stopped:
            raise RunError(f"{self.job.label} was asked to end before its ranks began")

    def wait_for_earlier(self, record: JobRecord) -> None:
        """Waits until the jobs that must have succeeded have.

        Raises:
            RunError: one of them has ended otherwise.
        """
        for path in record.after:
            earlier = JobFolder(Path(path))
            self.tell(f"waits for {earlier.label}")
            while not succeeded(earlier):
                if not any(controller_of(submission.intent.token) for submission in earlier.submissions()):
                    if succeeded(earlier):
                        break
                    raise RunError(f"{self.job.label} does not begin: {earlier.label} has not succeeded")
                self.sleep()

    @contextmanager
    def turn(self, results: Path, parallel: int) -> Iterator[None]:
        """Holds one of the results folder's places for running jobs for the length of the block."""
        folder = files.make_folder(results / _SLOTS)
        told = False
        with ExitStack() as held:
            while True:
                for number in range(parallel):
                    path = folder / f"{number:04d}"
                    with ExitStack() as tried, files.writing(path):
                        handle = tried.enter_context(path.open("a"))
                        try:
                            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        except BlockingIOError:
                            continue
                        held.push(tried.pop_all())
                        break
                else:
                    if not told:
                        told = True
                        self.tell("waits for its turn")
                    self.sleep()
                    continue
                break
            yield

    def tell(self, what: str) -> None:
        """Says in the controller's log what the job does."""
        print(f"maehpc: {self.job.label} {what}", flush=True)


def controller_of(token: str) -> int | None:
    """Process id of the living controller of a submission on this host."""
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if token in words and MODULE in words:
            with suppress(psutil.NoSuchProcess):  # it has ended since
                if process.status() != psutil.STATUS_ZOMBIE:
                    return int(process.pid)
    return None


def command(job: Path, token: str) -> list[str]:
    """The controller's command line."""
    return [sys.executable, "-u", "-m", MODULE, str(job), token]


def environment(record: JobRecord, profile: LocalProfile) -> dict[str, str]:
    """What the controller and the ranks are told; submitit's controller reads its settings here."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SUBMITIT_", "SLURM_"))}
    paths = [
        record.code,
        *(path for path in os.environ.get("PYTHONPATH", "").split(":") if path not in ("", record.code)),
    ]
    settings = {
        "PYTHONPATH": ":".join(paths),
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "2000"),
        "SUBMITIT_EXECUTOR": "local",
        "SUBMITIT_LOCAL_NTASKS": str(record.tasks_per_node),
        "SUBMITIT_LOCAL_TIMEOUT_S": str(60 * record.time_min),
        "SUBMITIT_LOCAL_SIGNAL_DELAY_S": str(profile.signal_lead_s),
        "SUBMITIT_LOCAL_NODEID": "0",
        "SUBMITIT_LOCAL_JOB_NUM_NODES": "1",
        "SUBMITIT_LOCAL_WITH_SHELL": "",
        "SUBMITIT_STDERR_TO_STDOUT": "",
    }
    if profile.gpus is not None:
        settings["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(profile.gpus)))
    return inherited | settings


def shell_text(job: Path, record: JobRecord, dependency: str | None) -> str:
    """What a job does on this machine, as a shell would be told; it is shown, and not run."""
    code = shlex.quote(record.code)
    workers = record.workers_per_node
    processes = f"a pool of {workers} workers" if workers else f"{record.tasks_per_node} ranks"
    return "\n".join(
        [
            "#!/bin/bash",
            f"# in the background of this machine: {processes}, {record.time_min} min",
            *([f"# waits for {dependency}"] if dependency else []),
            f"cd {shlex.quote(record.directory or record.results)}",
            f"export PYTHONPATH={code} PYTHONSAFEPATH=1",
            f"{shlex.join(command(job, 'TOKEN'))} >> {shlex.quote(str(job / 'logs' / 'controller.log'))} 2>&1 &",
            "",
        ]
    )


def start(job: JobFolder, record: JobRecord, profile: LocalProfile, token: str) -> str:
    """Starts a job's controller, which outlives this process.

    Args:
        job: its folder.
        record: what was asked for.
        profile: how.
        token: of this submission.

    Returns:
        The job's id.

    Raises:
        InputError: no process can be started.
        RunError: the logs cannot be written.
    """
    words = [sys.executable, "-u", "-m", "maehpc.launch.worker", str(job.path)]
    files.make_folder(job.logs)
    path = job.logs / "controller.log"
    directory = record.directory or record.results
    with files.writing(path):
        log = path.open("ab")
    with log:
        try:
            process = subprocess.Popen(
                command(job.path, token),
                env=environment(record, profile) | {"SUBMITIT_LOCAL_COMMAND": shlex.join(words)},
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        except OSError as error:
            raise InputError(
                f"{job.label}: no process can be started in {directory} ({error.strerror or error}); make that folder "
                f"again, or submit the job anew from another"
            ) from error
    return str(process.pid)


def main(arguments: list[str]) -> int:
    """Runs a job's controller.

    Args:
        arguments: the job's folder, and the submission's token, by which others find this process.
    """
    job = JobFolder(Path(arguments[0]))
    record = job.record()
    profile = LocalProfile.model_validate(record.profile)
    controller = JobController(job)
    try:
        controller.wait_for_earlier(record)
        with controller.turn(Path(record.results), profile.parallel):
            controller.run()
    except MaehpcError as error:
        print(f"maehpc: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
