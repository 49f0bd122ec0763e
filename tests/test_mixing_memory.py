"""What a dry run says of the memory that mixing takes, worked by hand."""

from pathlib import Path
from typing import Any

from tiny_models import tiny_gpt2
from toy_activations import train_config

from pipeline import records
from slurm.submission.mixing_memory import mixing_memory


def stream(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    values = {"kind": "stream", "tokens": str(tmp_path / "tokens"), "layers": ["transformer.h.0", "transformer.h.1"]}
    values |= {"language_model": {"model": str(tiny_gpt2(tmp_path / "model")), "dtype": "bfloat16"}}
    return values | {"context_tokens": 1024, "contexts_per_generation": 1024} | changes


def test_a_stream_holds_its_generations(tmp_path: Path) -> None:
    # 4 x 1,024 x 1,023 positions of 2 layers x width 16 x 2 bytes + 24 are 368.7 MB.
    said = mixing_memory(train_config(activations=stream(tmp_path)))
    assert said == "the buffer takes up to 0.37 GB on the model's device (activations.shuffle_generations: 4)"
    few = mixing_memory(train_config(activations=stream(tmp_path, max_tokens=1_000_000, shuffle_generations=16)))
    assert few == "the buffer takes up to 0.09 GB on the model's device (activations.shuffle_generations: 16)"


def test_from_disk_two_pools_are_in_memory(tmp_path: Path) -> None:
    assert mixing_memory(train_config(activations={"kind": "disk", "path": tmp_path})) is None
    facts = {"layers": ["a", "b"], "d_model": 768, "dtype": "bfloat16", "num_positions": 10**9}
    records.write_manifest(tmp_path, "activation-set/1", {}, facts)
    # 2 x 131,072 x (2 x 768 x 2 + 24) bytes
    said = mixing_memory(train_config(activations={"kind": "disk", "path": tmp_path}))
    assert said == "mixing takes 0.81 GB of the CPU's memory (activations.shuffle_positions: 131,072)"
