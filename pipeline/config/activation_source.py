"""Where a trainer's activations come from: shards on disk, or straight from the language model."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from pipeline.config.beginning_of_text import BeginningOfTextSetting
from pipeline.config.language_models import NeedsModels
from pipeline.config.schema import ADDED, ADDED_AS_NULL, OPERATIONAL, Config, Count, DataPath, PositiveCount
from pipeline.config.sites import SiteName, SiteText


def _distinct(values: list[str] | list[int]) -> list[str] | list[int]:
    if len(set(values)) != len(values):
        raise ValueError("an entry stands twice; name each once")
    return values


class Harvest(NeedsModels):
    """What is read from the language model, and in which order; the same settings give the same rows on disk and streamed.

    Contexts are taken in one permutation of all contexts of the token set; `contexts_per_generation` of them form a
    generation, whose kept positions are permuted together. A generation is a shard on disk; a stream's buffer holds several.
    """

    tokens: Annotated[DataPath, Field(json_schema_extra=OPERATIONAL)]
    """Directory of the token set."""
    layers: Annotated[list[SiteText], Field(min_length=1), AfterValidator(_distinct)]
    """Sites that are read, in the order of the crosscoder's layers. The module path of a block (`transformer.h.7`) is the residual
    stream after it; with `.mlp_output` or `.attention_output` behind it, what that part of the block adds to the stream. Of several
    models, each site begins with its model's name: `chat/transformer.h.7`."""
    context_tokens: Annotated[PositiveCount, Field(le=65_536)] = 1024
    """Length of a context, in tokens; a beginning-of-text token is one of them."""
    beginning_of_text: BeginningOfTextSetting = "auto"
    """Whether every context begins with the tokenizer's beginning-of-text token, as Gemma and Llama need it; `auto`: if the
    tokenizer's own call puts it before a text. It is position 0 and no token of the text, so it is always left out."""
    drop_positions: Annotated[list[Count], AfterValidator(_distinct)] = [0]
    """Positions of every context that are left out; the norm at position 0 is many times the others'."""
    outlier_norm_ratio: Annotated[Annotated[float, Field(gt=1.0)] | None, Field(json_schema_extra=ADDED_AS_NULL)] = 10.0
    """Positions whose norm is over so many times the layer's median, in any of the layers, are left out at all of them: a few such
    *sinks* can hold most of the sum of |x|^2. The median is of the order's leading contexts, 65,536 tokens. Null: none is left out."""
    exclude_token_ids: Annotated[list[Count], AfterValidator(_distinct), Field(json_schema_extra=ADDED)] = []
    """Token ids whose positions are left out; a separator between documents is the model's end-of-text id."""
    contexts_per_generation: PositiveCount = 1024
    """Contexts whose positions are shuffled together. Its activations are held in memory on the model's device:
    1,024 contexts of 1,024 tokens are 3.2 GB at two layers of width 768 in bfloat16."""
    model_batch_contexts: PositiveCount = 32
    """Contexts in one forward pass. Part of the identity: another batch shape may round differently."""
    max_tokens: PositiveCount | None = None
    """Positions taken at most; dropped ones are not counted, those left out for their norm or token are. None takes all there are."""
    seed: Count = 0
    """Of the order of contexts and positions."""
    check_hashes: Annotated[bool, Field(json_schema_extra=OPERATIONAL)] = True
    """Rehash the token set first, about a second for 2 GB; false checks sizes, counts and the range of ids only."""

    @model_validator(mode="after")
    def _sites_are_of_the_models(self) -> "Harvest":
        names = list(self.models)
        for index, layer in enumerate(self.layers):
            model = SiteName.parse(layer).model
            if model not in names:
                found = f"layers[{index}] is {layer}, which is of {f'the model {model}' if model else 'no model'}"
                known = f"language_models are {', '.join(names)}" if self.language_models else "there is one language_model, without a name"
                raise ValueError(f"{found}, but {known}; name one of them, as in {f'{names[0]}/' if names[0] else ''}transformer.h.2")
        for name in names:
            if all(SiteName.parse(layer).model != name for layer in self.layers):
                raise ValueError(f"language_models.{name} has no site in layers; add one, {name}/..., or leave the model out")
        return self


class Shuffle(Config):
    """How rows of several generations are mixed, in an order of its own for each epoch; the same settings give the same batches
    from disk and streamed."""

    shuffle_generations: Annotated[PositiveCount, Field(le=512)] = 16
    """Generations (shards) that are read side by side, so that a batch holds few positions of each context."""
    shuffle_positions: PositiveCount = 131_072
    """Positions permuted together, in blocks of at most 2,048 that lie one behind the other in their shard. From disk, twice
    so many are in the CPU's memory: 0.8 GB at two layers of width 768 in bfloat16."""


class DiskActivations(Shuffle):
    """An activation set that `crosscoder run cache.yaml` made."""

    kind: Literal["disk"] = "disk"
    path: Annotated[DataPath, Field(json_schema_extra=OPERATIONAL)]
    """Directory of the activation set."""
    check_hashes: Annotated[bool, Field(json_schema_extra=OPERATIONAL)] = True
    """Rehash each shard before its first row is used, once a start, `shuffle_generations` of them ahead in the
    background; false checks sizes only."""
    prefetch_batches: Annotated[PositiveCount, Field(json_schema_extra=OPERATIONAL)] = 4
    """Batches read ahead in the background."""

    def inputs(self) -> dict[str, Path]:
        """The data sets read, by field."""
        return {"activations": self.path}


class StreamedActivations(Harvest, Shuffle):
    """Activations computed as they are trained on, through a buffer on the device; nothing touches the disk."""

    kind: Literal["stream"] = "stream"
    shuffle_generations: Annotated[PositiveCount, Field(le=512)] = 4
    """Generations that the buffer holds, mixed with each other, so that a batch holds few positions of each context. Four of 1,024
    contexts of 1,024 tokens are 13 GB at two layers of width 768 in bfloat16."""
    statistics_contexts: PositiveCount = 4096
    """Leading contexts of the order, at most, from which the mean and scale of each layer are estimated: contexts double
    from 64 on until two halves of them agree within 1 % of the scale."""

    def inputs(self) -> dict[str, Path]:
        """The data sets read, by field."""
        return {"tokens": self.tokens}


ActivationSourceConfig = Annotated[DiskActivations | StreamedActivations, Field(discriminator="kind")]
"""The group `activations` of a training configuration; `kind` is `disk` or `stream`."""
