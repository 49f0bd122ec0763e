"""What a config.json says of the kind of its model, without torch: an encoder, which sees the future, or an encoder with a decoder.

The job tries the model itself (see `pipeline.model_trial`); this table spares the way there for kinds that are well known. A type
that is not in it says nothing.
"""

from collections.abc import Mapping
from typing import Any

ENCODERS = frozenset(
    (
        *("albert", "convbert", "deberta", "deberta-v2", "distilbert", "esm", "eurobert", "flaubert", "fnet", "funnel", "ibert"),
        *("layoutlm", "longformer", "luke", "mobilebert", "modernbert", "mpnet", "mra", "nomic_bert", "nystromformer", "squeezebert"),
        *("tapas", "yoso"),
    )
)
"""Values of model_type of which transformers has no model that predicts the next token."""
ENCODERS_UNLESS_DECODER = frozenset(
    (
        *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert"),
        *("roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod"),
    )
)
"""Values of model_type whose attention looks ahead unless `is_decoder` is true."""
ENCODER_DECODERS = frozenset(
    (
        *("encoder-decoder", "fsmt", "led", "longt5", "m2m_100", "mt5", "nllb-moe", "pegasus_x", "seamless_m4t", "seamless_m4t_v2"),
        *("switch_transformers", "t5", "t5gemma", "t5gemma2", "umt5"),
    )
)
"""Values of model_type with an encoder and a decoder, of which transformers has no decoder alone."""


def fault(config: Mapping[str, Any]) -> str | None:
    """A phrase if the model that a config.json describes is no causal language model; None if nothing there says so."""
    kind = config.get("model_type")
    if not isinstance(kind, str):
        return None
    if kind in ENCODERS or (kind in ENCODERS_UNLESS_DECODER and config.get("is_decoder") is not True):
        return f"model_type is {kind!r}, an encoder, which sees the future; use a causal language model"
    if kind in ENCODER_DECODERS:
        return f"model_type is {kind!r}, an encoder with a decoder, no causal language model; use one that predicts the next token"
    return None
