"""The application that holds the commands, and what all of them refuse."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperCommand, TyperOption


class Command(TyperCommand):
    """A command that refuses an option of one value, or a key=value, that is given twice: one of the two would be lost."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        _, _, given = self.make_parser(ctx).parse_args(args=list(args))
        options = Counter(param.opts[0] for param in given if isinstance(param, TyperOption) and not (param.multiple or param.is_flag))
        rest = super().parse_args(ctx, args)
        words = [word for value in ctx.params.values() if isinstance(value, Sequence) and not isinstance(value, str) for word in value]
        keys = Counter(word.partition("=")[0] for word in words if isinstance(word, str) and "=" in word)
        if twice := [name for name, times in (options + keys).items() if times > 1]:
            are, take = ("is", "takes") if len(twice) == 1 else ("are", "take")
            ctx.fail(f"{' and '.join(twice)} {are} given more than once, but {take} one value")
        return rest


class App(typer.Typer):
    """The application, all of whose commands are `Command`s."""

    def command(self, name: str | None = None, *, cls: type[TyperCommand] | None = Command, **settings: Any) -> Any:
        return super().command(name, cls=cls, **settings)
