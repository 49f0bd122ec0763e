"""Calls a function as another user, in a process forked from this one: what it needs must be imported before."""

import os
import pickle
import pwd
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import pytest

needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can be two users at once: run it as root, as CI does")


def as_user(uid: int, function: Callable[[], Any], *, group: int | None = None, groups: Sequence[int] = (), umask: int = 0o022) -> Any:
    """What `function` returns to the user `uid`, of `group` (default: of the same number) and `groups`; or the error it raised, raised."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            os.setgroups(list(groups))
            os.setgid(uid if group is None else group)
            os.setuid(uid)
            os.umask(umask)
            answer: tuple[bool, Any] = (True, function())
        except BaseException as error:  # whatever it is, the parent tells
            answer = (False, error if isinstance(error, OSError | ValueError) else RuntimeError(traceback.format_exc()))
        with os.fdopen(writer, "wb") as file:
            pickle.dump(answer, file)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        text = file.read()
    os.waitpid(child, 0)
    succeeded, value = pickle.loads(text)
    if not succeeded:
        raise value
    return value


def nobody() -> int:
    """The uid of the user who owns nothing."""
    return pwd.getpwnam("nobody").pw_uid
