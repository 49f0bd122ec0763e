"""Single keys as they are pressed, without waiting for Enter; nothing where input is no terminal."""

import contextlib
import os
import select
import sys
import termios
import time
import tty
from types import TracebackType
from typing import Any


class Keyboard:
    """The terminal's keys, while it is entered; leaving puts the terminal back as it was."""

    def __init__(self) -> None:
        self._file: int | None = None
        self._before: list[Any] = []

    def __enter__(self) -> "Keyboard":
        with contextlib.suppress(termios.error, ValueError, OSError):
            file = sys.stdin.fileno()
            self._before = termios.tcgetattr(file)
            tty.setcbreak(file)  # Ctrl-C still interrupts
            self._file = file
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._file is not None:
            termios.tcsetattr(self._file, termios.TCSADRAIN, self._before)

    def next(self, timeout_s: float) -> str:
        """The next key; empty if none is pressed within `timeout_s`."""
        if self._file is None:
            time.sleep(timeout_s)
            return ""
        ready, _, _ = select.select([self._file], [], [], timeout_s)
        if not ready:
            return ""
        pressed = os.read(self._file, 1024).decode(errors="replace")
        if not pressed:  # the terminal is gone
            raise KeyboardInterrupt
        return pressed[0] if len(pressed) == 1 else ""  # an arrow key comes as several
