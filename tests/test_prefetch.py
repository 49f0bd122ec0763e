"""Reading ahead in a thread changes nothing but the waiting."""

import threading

import pytest

from pipeline.activations.prefetch import prefetched
from pipeline.config.errors import UserError


def prefetch_threads():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def test_all_items_come_in_order():
    assert list(prefetched(range(100), 3)) == list(range(100))
    assert list(prefetched([], 3)) == []
    assert not prefetch_threads()


def test_at_most_so_many_items_are_made_ahead():
    made = []
    reached = threading.Event()

    def items():
        for number in range(10):
            made.append(number)
            if number == 3:
                reached.set()
            yield number

    ahead = prefetched(items(), 2)
    assert next(ahead) == 0
    assert reached.wait(10)  # 0 is consumed, 1 and 2 wait in the queue, 3 waits in the thread's hand
    assert made == [0, 1, 2, 3]
    assert list(ahead) == list(range(1, 10))


def test_an_error_in_the_thread_is_raised_in_its_place():
    def items():
        yield 1
        raise UserError("the third shard is damaged")

    ahead = prefetched(items(), 5)
    assert next(ahead) == 1
    with pytest.raises(UserError, match="the third shard is damaged"):
        next(ahead)
    assert not prefetch_threads()


def test_a_consumer_that_goes_away_ends_the_thread():
    def forever():
        while True:
            yield 1

    ahead = prefetched(forever(), 2)
    next(ahead)
    assert len(prefetch_threads()) == 1
    ahead.close()
    assert not prefetch_threads()
    dropped = prefetched(forever(), 2)
    next(dropped)
    del dropped
    assert not prefetch_threads()


def test_closing_lets_the_items_close_what_they_opened():
    closed = threading.Event()

    def items():
        try:
            while True:
                yield 1
        finally:
            closed.set()

    ahead = prefetched(items(), 2)
    next(ahead)
    ahead.close()
    assert closed.wait(10)
