"""Whether the contexts that a language model reads begin with its tokenizer's beginning-of-text token."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from pipeline.config.schema import ADDED


def _no_number(value: object) -> object:
    # To Python 1 is one of the values true and false; a configuration is strict.
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


BeginningOfTextSetting = Annotated[Literal["auto", True, False], BeforeValidator(_no_number), Field(json_schema_extra=ADDED)]
"""`auto`, true or false; what `auto` means, the stage says. What is decided enters identities by the token's id, not by this setting."""


def is_wanted(setting: Literal["auto", True, False], *, is_added: bool | None) -> bool:
    """Whether contexts begin with the token; `is_added` says if the tokenizer's own call puts it there, None where that is not known."""
    return bool(is_added) if setting == "auto" else setting
