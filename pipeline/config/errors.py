"""The one error that a user of the pipeline can cause."""

import errno
import os
import pwd
from pathlib import Path


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
        reason = os.strerror(error.errno).lower()
        if (owner := _other_owner(error.filename)) is None:
            return f"{place}{reason}; choose a place that you may read and write, or have it made yours"
        return (
            f"{place}{reason}, it is of {owner}; people share a directory through a group (chgrp -R GROUP DIR; chmod -R g+rwX DIR; "
            "find DIR -type d -exec chmod g+s {} +; umask 002 in the shell of each), else choose a place of your own"
        )
    if error.errno == errno.EEXIST and (broken := broken_link(Path(error.filename))) is not None:
        return f"{broken}; make what it leads to, or choose another place"
    return None


def broken_link(path: Path) -> str | None:
    """A phrase for a link that leads to nothing, where a directory can't be made; None for all else."""
    return f"{path} is a link to {os.readlink(path)}, where nothing is" if path.is_symlink() and not path.exists() else None


def _other_owner(filename: object) -> str | None:
    """Whose the file is, or the nearest directory above it that can be looked at; None if it is this user's, or root's."""
    if not isinstance(filename, str | os.PathLike):
        return None
    path = Path(filename).absolute()
    for place in (path, *path.parents):
        try:
            uid = place.lstat().st_uid
        except OSError:
            continue
        if uid in (0, os.geteuid()):
            return None
        try:
            return pwd.getpwuid(uid).pw_name
        except KeyError:
            return f"uid {uid}"
    return None
