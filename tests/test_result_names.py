"""Each stage's configuration lists the names of its results, so that a sweep's metric is known to exist before any task trains."""

import fnmatch
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_gpt2

from pipeline import demo
from pipeline.config import load
from pipeline.config.site_file import Site
from pipeline.exchange.export_crosscoder import export
from pipeline.run import Run
from pipeline.stages import (
    build_features,
    cache_activations,
    count_tokens,
    evaluate_crosscoder,
    generate_text,
    import_crosscoder,
    tokenize_text,
    train_crosscoder,
)
from slurm.record.comparison import flatten

PROGRAMS = {
    "tokenize": tokenize_text,
    "count": count_tokens,
    "cache": cache_activations,
    "train": train_crosscoder,
    "evaluate": evaluate_crosscoder,
    "features": build_features,
    "generate": generate_text,
    "import": import_crosscoder,
}
ONLY_ON_A_GPU = {"peak_memory_gib"}
ONLY_OF_SEVERAL_MODELS = {"clean_cross_entropy_by_model.*", "cross_entropy_difference_by_model.*", "model_diffing.*"}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """The names in the result of each stage, which ran after one another on a tiny model."""
    root = tmp_path_factory.mktemp("stages")
    documents = [{"text": f"def f{number}(x):\n    return x + {number}\n" * 20} for number in range(40)]
    (root / "text.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    model = {"model": str(tiny_gpt2(root / "model", vocab_size=4096)), "device": "cpu"}
    for file in Path(demo.__path__[0]).glob("model/tokenizer*.json"):
        shutil.copy(file, root / "model")
    tokens = {"tokens": str(root / "tokens/train"), "language_model": model, "context_tokens": 16}
    values: dict[str, dict[str, Any]] = {
        "tokenize": {
            "sources": [str(root / "text.jsonl")],
            "output": str(root / "tokens"),
            "tokenizer": {"name": "demo"},
            "validation_fraction": 0.5,
            "processes": 1,
        },
        "count": {"tokens": str(root / "tokens")},
        "cache": {**tokens, "output": str(root / "activations"), "layers": ["transformer.h.0"], "max_tokens": 400},
        "train": {
            "activations": {"kind": "disk", "path": str(root / "activations")},
            "crosscoder": {"num_features": 32, "activation_function": {"kind": "batch_topk", "k": 4}},
            "loss": {},
            "overfit": True,
            "num_tokens": 300,
            "batch_positions": 100,
            "held_out": {"tokens": str(root / "tokens/validation"), "language_model": model, "positions": 64},
        },
        "evaluate": {**tokens, "tokens": str(root / "tokens/validation"), "crosscoder": str(root / "train"), "max_tokens": 200},
        "features": {**tokens, "tokens": str(root / "tokens/validation"), "crosscoder": str(root / "train"), "max_tokens": 200},
        "generate": {
            "crosscoder": str(root / "train"),
            "language_model": model,
            "prompts": ["def f1(x):"],
            "sampling": {"max_new_tokens": 2},
            "steering": {"features": [1], "strengths": [1.0, 2.0]},
        },
        "import": {
            "path": str(root / "exported"),
            "layout": "safetensors",
            "activations": {"kind": "disk", "path": str(root / "activations")},
        },
    }
    names = {}
    for stage, program in PROGRAMS.items():
        if stage == "import":
            export(root / "train", root / "exported", to="safetensors")
        config = load.from_values({"stage": stage, "name": "x", **values[stage]}, where=stage, site=Site())
        found = flatten(program.run(config, Run(root / stage, stage=stage)))  # type: ignore[attr-defined]
        names[stage] = {name for name, value in found.items() if not isinstance(value, list)}
    return names


@pytest.mark.parametrize("stage", list(load.STAGES))
def test_a_stage_lists_all_its_results_and_no_other(stage: str, results: dict[str, set[str]]) -> None:
    listed = load.config_class(stage).RESULT_NAMES
    unlisted = {name for name in results[stage] if not any(fnmatch.fnmatchcase(name, pattern) for pattern in listed)}
    absent = {pattern for pattern in listed if not fnmatch.filter(results[stage], pattern)}
    assert unlisted == set()
    assert absent <= ONLY_ON_A_GPU | ONLY_OF_SEVERAL_MODELS
