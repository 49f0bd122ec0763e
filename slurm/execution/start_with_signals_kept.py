"""Starts a program with the signals to stop blocked: one that comes before the program can handle it waits for it.

    python -I -S start_with_signals_kept.py PROGRAM ARGUMENT...

Python ends at once on such a signal while it starts, and submitit would swallow some. What is blocked stays pending
through `exec`; the worker unblocks it once its own handlers are there.
"""

import os
import signal
import sys

if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2})
    os.execv(sys.argv[1], sys.argv[1:])
