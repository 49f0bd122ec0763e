"""The one error that a user of the pipeline can cause."""

import errno
import os


class UserError(ValueError):
    """Something the user can mend. The message says what was found, what was expected and what to do.

    The command line prints the message alone, without a traceback, and exits with 1.
    """


def sentence_of(error: OSError) -> str | None:
    """What to do about an error of the system that a person can mend (a full disk, a missing permission); None for any other."""
    place = f"{error.filename}: " if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        reason = os.strerror(error.errno).lower()
        return f"{place}{reason}; free some space and start the same command again, what is finished is kept"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{place}{os.strerror(error.errno).lower()}; choose a place that you may read and write, or have it made yours"
    return None
