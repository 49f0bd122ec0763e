"""Settings of the stage that lets a language model write with a trained crosscoder spliced into it."""

import math
import re
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from pipeline.config.language_models import NeedsModels
from pipeline.config.schema import OPERATIONAL, RUN, Config, Count, DataPath, Fraction, PositiveCount
from pipeline.config.sites import SiteText
from pipeline.config.stage import StageConfig

EncodeFrom = Literal["clean", "spliced"]
Mode = Literal["add", "scale", "clamp", "ablate"]


class Sampling(Config):
    """How the next token is chosen."""

    max_new_tokens: PositiveCount = 64
    """Tokens of a continuation; it ends sooner with the language model's end of text."""
    temperature: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 0.0
    """0 takes the most probable token. Otherwise logits are divided by it, and a token is drawn by `seed`."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Only the most probable tokens that together have this probability are drawn from."""

    @model_validator(mode="after")
    def _draws(self) -> "Sampling":
        if self.temperature == 0.0 and self.top_p < 1.0:
            raise ValueError(f"top_p is {self.top_p}, but with temperature 0 nothing is drawn; set a temperature, for example 1.0")
        return self


def _positions(text: str) -> str:
    if not re.fullmatch(r"all|last|[0-9]+:", text):
        raise ValueError(f"positions is {text!r}, expected all, last, or the first position with a colon, as in 12:")
    return text


class Steering(Config):
    """Which features are edited, how and where."""

    features: Annotated[list[Count], Field(min_length=1)]
    """All of them are edited together."""
    strengths: list[Annotated[float, Field(allow_inf_nan=False, ge=-1e30, le=1e30)]] = []
    """A continuation for each. In the unit of activations, but for `scale`; `crosscoder features` shows how strongly a feature fires."""
    mode: Mode = "add"
    """What becomes of an activation f with strength s. add: f + s; scale: s f; clamp: s; ablate: 0, which needs no strength."""
    layers: list[SiteText] | None = None
    """Where the edit is written; null: at every layer that the crosscoder writes. A feature changes nothing at a layer that it
    doesn't write."""
    positions: Annotated[str, AfterValidator(_positions)] = "all"
    """Where: all positions but 0; from the `last` of the prompt on; or from a position on, as in `12:`. Beginning-of-text counts."""
    keep_error: bool = True
    """What the crosscoder does not reconstruct stays: the edit is added to the activation. False: to its reconstruction."""

    @model_validator(mode="after")
    def _strengths_fit(self) -> "Steering":
        if repeated := [feature for number, feature in enumerate(self.features) if feature in self.features[:number]]:
            raise ValueError(f"features names {repeated[0]} twice; name each once")
        if self.mode == "ablate" and self.strengths:
            raise ValueError("mode ablate sets activations to 0 and takes no strengths; leave them out, or choose clamp")
        if self.mode != "ablate" and not self.strengths:
            raise ValueError(f"strengths is empty, but mode {self.mode} needs one or more")
        return self

    def first_position(self, prompt_tokens: int) -> int:
        """The first position that is edited after a prompt of that length; position 0 never is."""
        first = {"all": 1, "last": prompt_tokens - 1}.get(self.positions)
        return max(1, int(self.positions[:-1]) if first is None else first)


class Breakdown(Config):
    """From when on a text counts as broken, against the model's own continuation of the same prompt with the same draws."""

    cross_entropy_rise: Annotated[float, Field(gt=0.0)] = 1.5
    """Its cross-entropy under the clean model is higher by more than so many nats a token."""
    repeated_rise: Fraction = 0.3
    """Its share of n-grams of tokens that stood in it before is higher by more than this."""
    ngram: PositiveCount = 4
    """Tokens of such an n-gram."""

    def reason(self, cross_entropy: float, repeated_share: float, *, own_cross_entropy: float, own_repeated_share: float) -> str | None:
        """Why a text counts as broken, `cross-entropy` or `repeats`; None: it does not. NaN breaks it."""
        if not cross_entropy - own_cross_entropy <= self.cross_entropy_rise or math.isnan(cross_entropy):
            return "cross-entropy"
        return "repeats" if repeated_share - own_repeated_share > self.repeated_rise else None


class GenerateConfig(NeedsModels, StageConfig):
    RESULT_NAMES: ClassVar[tuple[str, ...]] = (
        "output",
        "data_id",
        "prompts",
        "continuations",
        "clean.*",
        "reconstruction.*",
        "peak_memory_gib",
    )
    stage: Literal["generate"] = "generate"
    crosscoder: Annotated[DataPath, Field(json_schema_extra=RUN)]
    """A run of `train`, the folder of all runs of one name (the newest finished one is taken; `train/demo` names it), or one checkpoint."""
    written_by: str = ""
    """Of several `language_models`, the name of the one that writes, whose layers are changed. The others read the same text unchanged."""
    prompts: list[str] = []
    """Texts to go on from. Each begins with beginning-of-text where contexts of the training did."""
    prompts_file: Annotated[DataPath | None, Field(json_schema_extra=OPERATIONAL)] = None
    """More of them: a line each, or the `text` of each line of a `.jsonl` file."""
    sampling: Sampling = Sampling()
    layers: list[SiteText] | None = None
    """The layers that are replaced by their reconstruction, at every position but 0; null: all that the crosscoder writes."""
    reconstruct: bool = True
    """Whether there is such a continuation at all."""
    encode_from: EncodeFrom = "clean"
    """What features are read from. `clean`: a second pass over the same text, in which nothing is changed. `spliced`: at each layer that
    is changed, what the changed pass gave there and at the layers before it, each before its own change, and the clean pass for those
    to come."""
    steering: Steering | None = None
    """Null: nothing is steered."""
    breakdown: Breakdown = Breakdown()

    @model_validator(mode="after")
    def _has_prompts(self) -> "GenerateConfig":
        if self.written_by not in self.models:
            found = f"written_by is {self.written_by!r}" if self.written_by else "written_by is missing"
            names = [name for name in self.models if name]
            raise ValueError(f"{found}, " + (f"expected one of {', '.join(names)}" if names else "but there is one language_model alone"))
        if not self.prompts and self.prompts_file is None:
            raise ValueError("there is no prompt; list some in prompts, or name a file in prompts_file")
        if self.layers == []:
            raise ValueError("layers is empty; name a layer, or leave it away for all that the crosscoder writes")
        return self

    def inputs(self) -> dict[str, Path]:
        files = {} if self.prompts_file is None else {"prompts_file": self.prompts_file}
        return {"crosscoder": self.crosscoder, **files}
