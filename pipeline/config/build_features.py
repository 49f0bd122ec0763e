"""Settings of the stage that looks at each feature of a trained crosscoder on held-out text."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from pipeline.config.held_out_text import HeldOutText
from pipeline.config.schema import Count, PositiveCount
from pipeline.config.stage import StageConfig


class FeaturesConfig(HeldOutText, StageConfig):
    RESULT_NAMES: ClassVar[tuple[str, ...]] = (
        "output",
        "data_id",
        "features",
        "positions",
        "outliers",
        "contexts",
        "bytes",
        "dead_eval_fraction",
        "dense_fraction",
        "peak_memory_gib",
    )
    stage: Literal["features"] = "features"
    top_contexts: PositiveCount = 20
    """So many of each feature's strongest firings are kept, each with a window of tokens around it."""
    quantiles: PositiveCount = 5
    """A random sample of each feature's firings is sorted by activation and divided into so many groups of one size."""
    contexts_per_quantile: PositiveCount = 4
    """Firings in one such group. The sample holds `quantiles` times as many; of a feature that fires less, all of its firings."""
    window_tokens: Annotated[PositiveCount, Field(le=1024)] = 32
    """Tokens of a window. Memory and parts on disk take 4 bytes for each token of each window kept."""
    window_after: Count = 8
    """So many of a window's tokens come after the firing; the window is cut where its context begins or ends."""
    neighbors: PositiveCount = 10
    """Nearest features by the cosine of the decoders, all layers as one vector."""
    promoted_tokens: PositiveCount = 10
    """Tokens that each layer's decoder promotes most through the unembedding, and as many that it suppresses most."""
    part_tokens: PositiveCount = 1_000_000
    """A run that is stopped goes on behind the last part of about so many tokens. Sums are added part by part."""

    @model_validator(mode="after")
    def _window_holds_the_firing(self) -> "FeaturesConfig":
        if self.window_after >= self.window_tokens:
            raise ValueError(
                f"window_after is {self.window_after}, but a window has {self.window_tokens} tokens, the firing among them; "
                f"use at most {self.window_tokens - 1}"
            )
        return self

    def inputs(self) -> dict[str, Path]:
        return {"crosscoder": self.crosscoder, "tokens": self.tokens}
