"""The errors a user meets: one sentence that names the file, the field and the fix."""

from __future__ import annotations


class MaehpcError(Exception):
    """Base of every error that is told in one sentence instead of a traceback."""

    exit_code = 1


class InputError(MaehpcError):
    """What was asked for is wrong (recipe, option, file); nothing has been written."""

    exit_code = 2


class RunError(MaehpcError):
    """The work failed while it ran (NaN loss, full disk, lost ownership); what was recorded stays whole."""

    exit_code = 1


class LostRanksError(RunError):
    """Other ranks of the same job are gone or did not come: they know why, this one does not."""

    exit_code = 70  # EX_SOFTWARE: nothing that this process could name


class Interrupted(MaehpcError):  # noqa: N818 - not an error: the work is whole and will be gone on with
    """The work was asked to stop and did, once everything that it had done was on the disk; it can be gone on with.

    Attributes:
        step: last finished step of training, which a checkpoint holds; None for other work.
        reason: why it was asked to stop.
    """

    exit_code = 75  # EX_TEMPFAIL: try again

    def __init__(self, work: str, reason: str, step: int | None = None) -> None:
        self.work, self.reason, self.step = work, reason, step
        saved = "everything finished is saved" if step is None else f"the state after step {step} is saved"
        super().__init__(f"{work} was interrupted ({reason}); {saved}, and the same command goes on from there")

    def __reduce__(self) -> tuple[type[Interrupted], tuple[str, str, int | None]]:
        return Interrupted, (self.work, self.reason, self.step)
