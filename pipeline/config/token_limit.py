"""What is said where `max_tokens` allows more than there is: all there is is taken, and nobody is left to think otherwise."""

from typing import Any


def short_of(max_tokens: int | None, there: int) -> dict[str, int]:
    """A stage's result of it: `short_of_max_tokens`, by how many `there` falls short; nothing where it does not."""
    return {"short_of_max_tokens": max_tokens - there} if max_tokens is not None and there < max_tokens else {}


def notices(max_tokens: int | None, there: int, *, where: Any, unit: str, is_estimate: bool = False) -> list[str]:
    """The sentence that tells it, or none. `unit` is what is counted: positions, or tokens."""
    if not short_of(max_tokens, there):
        return []
    return [f"max_tokens is {max_tokens:,}, but {where} has {'about ' if is_estimate else ''}{there:,} {unit}: all of them are taken"]
