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
