"""An iterator that is run ahead in a background thread."""

import queue
import threading
from collections.abc import Generator, Iterable
from typing import TypeVar

T = TypeVar("T")

_POLL_SECONDS = 0.05


class _End:
    """Marks the end of what the thread gives, with the error that ended it if there was one."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def prefetched(items: Iterable[T], depth: int) -> Generator[T, None, None]:
    """The items, of which up to `depth` are made ahead in a thread; an error there is raised here, in its place.

    Closing this generator, or dropping it, ends the thread; the thread never holds up the end of the process.
    """
    made: queue.Queue[T | _End] = queue.Queue(maxsize=depth)
    stop = threading.Event()
    thread = threading.Thread(target=_run, args=(items, made, stop), name="prefetch", daemon=True)
    thread.start()
    try:
        while not isinstance(item := made.get(), _End):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        stop.set()
        thread.join()


def _run(items: Iterable[T], made: "queue.Queue[T | _End]", stop: threading.Event) -> None:
    error: BaseException | None = None
    try:
        for item in items:
            if not _put(item, made, stop):
                break
    except BaseException as raised:
        error = raised
    _put(_End(error), made, stop)


def _put(item: "T | _End", made: "queue.Queue[T | _End]", stop: threading.Event) -> bool:
    """Whether the item was handed over before the consumer went away."""
    while not stop.is_set():
        try:
            made.put(item, timeout=_POLL_SECONDS)
        except queue.Full:
            continue
        return True
    return False
