"""Which language model is run, in which number format, and where."""

from typing import Annotated, Literal

from pydantic import Field

from pipeline.config.schema import OPERATIONAL, Config, Count, PretrainedName

CONTEXT_FIELDS = (
    *("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"),
    *("max_target_positions", "seq_length", "context_length"),
)
"""Keys of a model's config.json that limit its contexts, by family; the least of those that stand there counts. The window of a
sliding attention is no limit, and a model without any of these has none."""


class LanguageModelConfig(Config):
    """A Hugging Face causal language model. What it computes enters identities through the hash of its weights and config."""

    model: PretrainedName
    """Directory, or name on the Hugging Face hub; `demo` is the model shipped in this package."""
    revision: Annotated[str | None, Field(json_schema_extra=OPERATIONAL)] = None
    """Branch, tag or commit on the hub; None takes the default branch. The run is bound to the commit that this is when it is frozen."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of weights and computation, and so of its activations."""
    device: Annotated[Literal["auto", "cpu", "cuda"], Field(json_schema_extra=OPERATIONAL)] = "auto"
    """`auto` takes a GPU when there is one."""
    random_weights: bool = False
    """Take only the architecture from `model` and draw the weights: for measuring speed without the weights."""
    random_weights_seed: Count = 0
    """Of the weights drawn; without meaning unless `random_weights`."""
    check_tokenizer: Annotated[bool, Field(json_schema_extra=OPERATIONAL)] = True
    """Refuse token sets that another tokenizer made than the one beside the weights, if there is one; set it to false for
    a tokenizer that is the same but for its file."""
