"""The names of blocks that the login node knows are those of the models themselves."""

import pytest
import torch
import transformers

from pipeline.blocks import block_names
from slurm.submission.block_names import BLOCKS, layer_fault


@pytest.mark.parametrize(("prefix", "model_type"), [(prefix, name) for prefix, types in BLOCKS.items() for name in types])
def test_a_model_type_names_its_blocks_as_the_library_does(prefix: str, model_type: str) -> None:
    transformers.utils.logging.set_verbosity_error()
    depth = {"attention_types": [[["global", "local"], 1]]} if model_type == "gpt_neo" else {}
    try:
        config = transformers.AutoConfig.for_model(model_type, num_hidden_layers=2, **depth)
    except ValueError:
        pytest.skip(f"this version of transformers does not know {model_type}")
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    names = block_names(model)
    assert names == [f"{prefix}.{number}" for number in range(len(names))]


@pytest.mark.parametrize(
    ("layer", "fault"),
    [
        ("transformer.h.5", None),
        ("h.2", "but the blocks of m (gpt2) are transformer.h.0 to transformer.h.5; did you mean transformer.h.2?"),
        ("model.layers.9", "but the blocks of m (gpt2) are transformer.h.0 to transformer.h.5"),
        ("transformer.h", "but the blocks of m (gpt2) are transformer.h.0 to transformer.h.5"),
        ("transformer.h.02", "but the blocks of m (gpt2) are transformer.h.0 to transformer.h.5"),
        ("transformer.h.6", "but m has blocks 0 to 5; use a smaller number"),
    ],
)
def test_a_name_that_no_block_has_is_refused_with_those_that_there_are(layer: str, fault: str | None) -> None:
    assert layer_fault(layer, "m", "gpt2", 6) == fault


def test_of_a_type_that_is_not_known_only_the_number_is_looked_at() -> None:
    assert layer_fault("anything.2", "m", "new", 6) is None
    assert layer_fault("anything", "m", None, None) is None
    assert layer_fault("anything.6", "m", "new", 6) is not None
