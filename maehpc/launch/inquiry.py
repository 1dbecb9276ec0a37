"""What jobs' folders say of their submissions, and what Slurm, asked once for all of them, says of those."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from maehpc.errors import InputError
from maehpc.launch import slurm
from maehpc.launch.record import COMMENT, Accepted, Intent, JobFolder, JobRecord, Submission
from maehpc.launch.slurm import SlurmError
from maehpc.launch.slurm_formats import SlurmJob
from maehpc.launch.states import translate
from maehpc.launch.submission import ARRAY_TOKEN, began_as

_LAST = ("done", "failed", "refused")
"""Outcomes after which nobody needs Slurm's word, where it has forgotten the job."""


@dataclass
class Known:
    """What a job's folder says of its submissions.

    Attributes:
        job: its folder.
        record: what was asked for; None where it cannot be read.
        submissions: oldest first.
        damage: why the folder cannot be read; None where it can.
    """

    job: JobFolder
    record: JobRecord | None = None
    submissions: list[Submission] = field(default_factory=list)
    damage: str | None = None

    @property
    def scheduler(self) -> str:
        """slurm, local or debug."""
        accepted = [submission.accepted for submission in self.submissions if submission.accepted is not None]
        if accepted:
            return accepted[-1].scheduler
        return "slurm" if self.record is None else str(self.record.profile.get("kind", "slurm"))

    @property
    def began(self) -> bool:
        """Whether there was an attempt."""
        return self.job.newest_attempt() > 0

    @property
    def last_word(self) -> str | None:
        """How the newest attempt says that it ended."""
        try:
            outcome = self.job.outcome(self.job.newest_attempt())
        except InputError:  # told when the row is made
            return None
        return None if outcome is None else outcome.outcome

    def id_from(self, found: str, token: str) -> str:
        """This job's id, where the scheduler has `found` (of an array: the whole one's) under a submission's token."""
        array = self.record.array if self.record is not None and token.startswith(ARRAY_TOKEN) else None
        return found if array is None else f"{found}_{array.index}"


def _with_unrecorded(job: JobFolder, submissions: list[Submission]) -> list[Submission]:
    """The submissions, where the newest start tells of one whose client did not live to record the answer."""
    newest = submissions[-1] if submissions else Submission(0, job.path, Intent(token=""), None)
    if newest.accepted is not None:
        return submissions
    job_id = began_as(job, submissions)
    if job_id is None:
        return submissions
    accepted = Accepted(job_id=job_id, scheduler="slurm", logs=str(job.logs))
    return [*submissions[:-1], replace(newest, accepted=accepted)]


def look(job: JobFolder) -> Known:
    """Reads a job's record and its submissions; what is wrong with them is kept as its `damage`."""
    known = Known(job)
    try:
        known.record = job.record()
        known.submissions = _with_unrecorded(job, job.submissions())
    except InputError as error:  # told in this job's row: the others must still be seen
        known.damage = str(error)
    return known


class Scheduler:
    """What Slurm says of a set of jobs: asked once, then looked up.

    Args:
        known: the jobs of interest.
    """

    def __init__(self, known: Sequence[Known]) -> None:
        self.silence: str | None = None
        self._jobs: dict[str, SlurmJob] = {}
        mine = [one for one in known if one.scheduler == "slurm" and one.submissions]
        if not mine:
            return
        try:
            self._ask(mine)
        except SlurmError as error:
            self.silence = str(error)
            self._jobs = {}

    @property
    def answers(self) -> bool:
        """Whether Slurm could be asked."""
        return self.silence is None

    def settle(self, known: Known) -> tuple[Submission | None, SlurmJob | None]:
        """The submission that counts (the newest that was accepted), and what Slurm says of it."""
        if not known.submissions:
            return None, None
        newest = known.submissions[-1]
        if newest.accepted is None and self.answers and known.scheduler == "slurm":
            found = self._by_comment(newest.intent.comment)
            if found is not None:
                accepted = Accepted(
                    job_id=known.id_from(found, newest.intent.token), scheduler="slurm", logs=str(known.job.logs)
                )
                newest = replace(newest, accepted=accepted)
        if newest.accepted is None:
            newest = next((one for one in reversed(known.submissions) if one.accepted is not None), newest)
        return newest, self._find(newest)

    def _ask(self, known: list[Known]) -> None:
        self._add(slurm.queue(ended=True))
        settled = [(self.settle(one)[0], one) for one in known]
        ids = {newest.accepted.job_id: one for newest, one in settled if newest is not None and newest.accepted}
        missing = [job_id for job_id, one in ids.items() if job_id not in self._jobs and one.last_word not in _LAST]
        if missing:  # another person's, or forgotten
            self._add(slurm.known(missing))
            missing = [job_id for job_id in missing if job_id not in self._jobs]
        if missing:
            self._jobs |= slurm.accounting(missing) or {}
        # What the newest attempt left may be older than the newest start; and of an end the exit code is wanted.
        self._add(
            slurm.with_details(
                [
                    job
                    for job_id, one in ids.items()
                    if (job := self._jobs.get(job_id)) is not None
                    and job.source == "squeue"
                    and (
                        translate(job.state).ended
                        or one.last_word is not None
                        or (job.state == "PENDING" and one.began)
                    )
                ]
            )
        )

    def _add(self, jobs: Sequence[SlurmJob]) -> None:
        self._jobs |= {job.job_id: job for job in jobs}

    def _find(self, submission: Submission) -> SlurmJob | None:
        """The job of a submission; None where Slurm doesn't know it.

        Ids begin again when a cluster is set up anew, so the comment, or else the name, must be ours too.
        """
        if submission.accepted is None:
            return None
        job = self._jobs.get(submission.accepted.job_id)
        if job is None:
            return None
        if job.comment.startswith(COMMENT):
            return job if job.comment == submission.intent.comment else None
        return job if job.name.startswith("maehpc") else None

    def _by_comment(self, comment: str) -> str | None:
        """Id of the job (of an array: of the array) that carries a comment."""
        return next((job.job_id.partition("_")[0] for job in self._jobs.values() if job.comment == comment), None)
