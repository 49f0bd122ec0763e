"""Which language models are read: one, or several under names of their own, all over the same tokens."""

from typing import Annotated

from pydantic import Field, model_validator

from pipeline.config.language_model import LanguageModelConfig
from pipeline.config.schema import ADDED, Config
from pipeline.config.sites import MODEL_KEY

ModelKey = Annotated[str, Field(pattern=f"^{MODEL_KEY.pattern}$")]
SHARED = ("dtype", "device")
"""What activations that stand in one tensor have in common."""


class ReadsModels(Config):
    """One language model, or several."""

    language_model: LanguageModelConfig | None = None
    """The language model that is read, where there is one."""
    language_models: Annotated[dict[ModelKey, LanguageModelConfig], Field(json_schema_extra=ADDED)] = {}
    """Several in its place, by a name of each: `{base: {model: ...}, chat: {model: ...}}`. All read the same token ids; a site begins with
    its model's name and a slash, `chat/transformer.h.2`. They have one width, dtype and device, and the tokenizer in common."""

    @property
    def models(self) -> dict[str, LanguageModelConfig]:
        """By name, in their order; a single model is called `""`, and where none is given there is none."""
        return self.language_models or ({} if self.language_model is None else {"": self.language_model})

    @model_validator(mode="after")
    def _one_or_several(self) -> "ReadsModels":
        if self.language_model is not None and self.language_models:
            raise ValueError("language_model and language_models are both given; leave one of them out")
        for key in SHARED:
            found = {name: getattr(model, key) for name, model in self.language_models.items()}
            if len(set(found.values())) > 1:
                raise ValueError(f"{key} of language_models is {_listed(found)}, expected the same for all of them")
        return self


class NeedsModels(ReadsModels):
    """The same where there has to be one."""

    @model_validator(mode="after")
    def _one_at_least(self) -> "NeedsModels":
        if not self.models:
            raise ValueError("language_model is missing: name the model that is read, or several in language_models")
        return self


def field_of(name: str) -> str:
    """The setting in which the model called `name` stands."""
    return f"language_models.{name}" if name else "language_model"


def _listed(found: dict[str, str]) -> str:
    return ", ".join(f"{value} for {name}" for name, value in found.items())
