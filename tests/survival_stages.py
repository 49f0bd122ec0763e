"""The five stages in small, each long enough to be interrupted six times and never twice at the same place."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
import yaml
from tiny_models import tiny_gpt2, tiny_tokenizer

from pipeline import records
from pipeline.crosscoder.training_log import TIME_FIELDS
from pipeline.tokens import SHARD_FORMAT, Documents, TokenSet, TokenShardWriter, Vocabulary, seal
from slurm.record.run_directory import RunDirectory, read_lines

TEXTS_A_FILE = 3000
SHARD_IDS, NUM_SHARDS = 1 << 25, 240
"""The set to be counted: 64 MiB on disk, under many names, so that a stage which reads 2 GB/s takes seconds."""


class SmallStage(NamedTuple):
    """A stage's configuration, and what of its run has to come out the same."""

    name: str
    config: dict[str, Any]
    outcome: Callable[[RunDirectory], dict[str, Any]]


def write_inputs(root: Path) -> None:
    """Text, a tokenizer, a language model with random weights, and a large token set to be counted."""
    tiny_tokenizer(root / "tokenizer")
    tiny_gpt2(root / "model")
    generator = np.random.default_rng(0)
    words = ["def", "return", "x", "*", "+", "(", ")", ":", "\n    ", *(f"name{i}" for i in range(50))]
    (root / "text").mkdir()
    for number in range(2):
        texts = (" ".join(generator.choice(words, 400)) for _ in range(TEXTS_A_FILE))
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (root / "text" / f"part{number}.jsonl").write_text(lines)
    for split in ("train", "validation"):
        _write_large_set(root / "large" / split, NUM_SHARDS if split == "train" else 1)


def _write_large_set(directory: Path, num_shards: int) -> None:
    vocabulary = Vocabulary(300, 0, "")
    lengths = np.full(SHARD_IDS // 1024, 1023, np.int64)
    ids = np.random.default_rng(1).integers(1, 300, SHARD_IDS).astype(vocabulary.dtype)
    ids[1023::1024] = vocabulary.separator
    with TokenShardWriter(directory, "part-000", vocabulary) as writer:
        writer.append(Documents(ids, lengths, 299))
        made = {"part-000": writer.commit({}, {})}
    first = made["part-000"]
    facts = {**vocabulary.facts(), **{key: first[key] for key in ("tokens", "documents", "max_id")}}
    for number in range(1, num_shards):
        stem = f"part-{number:03d}"
        hashes = {}
        for ending in ("bin", "ends"):
            os.link(directory / f"part-000.{ending}", directory / f"{stem}.{ending}")
            hashes[f"{stem}.{ending}"] = first["files"][f"part-000.{ending}"]["xxh3_128"]
        made[stem] = records.commit_shard(directory, stem, SHARD_FORMAT, list(hashes), facts, {}, hashes)
    seal(directory, made, vocabulary, {})
    assert TokenSet.open(directory).num_tokens == num_shards * int(lengths.sum())


def small_stages(root: Path, made: Path, outputs: Path, crosscoder: str) -> list[SmallStage]:
    """The stages, reading the inputs in `root` and the data sets in `made`, and writing theirs to `outputs`."""
    model = {"model": str(root / "model"), "device": "cpu", "check_tokenizer": False}
    tokenize = {
        "sources": [str(root / "text")],
        "output": str(outputs / "tokens"),
        "tokenizer": {"name": str(root / "tokenizer")},
        "validation_fraction": 0.2,
        "encoder": "tokenizers",
        "processes": 1,
        "part_bytes": 200_000,
        "chunk_bytes": 20_000,
    }
    cache = {
        "tokens": str(made / "tokens" / "train"),
        "output": str(outputs / "activations"),
        "language_model": model,
        "layers": ["transformer.h.0", "transformer.h.2"],
        "context_tokens": 32,
        "contexts_per_generation": 64,
        "model_batch_contexts": 1,
        "max_tokens": 60_000,
    }
    train = {
        "activations": {"kind": "disk", "path": str(made / "activations")},
        "crosscoder": {"num_features": 256, "activation_function": {"kind": "batch_topk", "k": 8}},
        "loss": {"auxk": {}},
        "epochs": 1,
        "batch_positions": 24,
        "dead_window_tokens": 20_000,
        "log_every_steps": 10,
        "device": "cpu",
        "checkpoints": {"every_tokens": 1_200},
    }
    evaluate = {
        "crosscoder": crosscoder,
        "tokens": str(made / "tokens" / "validation"),
        "language_model": model,
        "context_tokens": 32,
        "max_tokens": 3_000,
        "batch_contexts": 1,
    }
    return [
        SmallStage("tokenize", tokenize, _data_set_of("tokens")),
        SmallStage("count", {"tokens": str(root / "large")}, _counts),
        SmallStage("cache", cache, _data_set_of("activations")),
        SmallStage("train", train, _training),
        SmallStage("evaluate", evaluate, _evaluation),
    ]


def write_config(directory: Path, stage: SmallStage, name: str, resources: dict[str, Any]) -> Path:
    path = directory / f"{name}-{stage.name}.yaml"
    path.write_text(yaml.safe_dump({"stage": stage.name, "name": name, **stage.config, "resources": resources}))
    return path


# -- what has to come out the same ----------------------------------------------------------------------------------


def _data_set_of(output: str) -> Callable[[RunDirectory], dict[str, Any]]:
    """Of each file of the set its bytes, of manifests the data id; records are compared by the data id, which covers them."""

    def outcome(run: RunDirectory) -> dict[str, Any]:
        directory = Path(run.config_values()["output"])
        assert directory.name == output
        return _contents(directory)

    return outcome


def _contents(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in sorted(directory.rglob("*")):
        if path.name == records.MANIFEST:
            found[str(path.relative_to(directory))] = records.read_json(path)["data_id"]
        elif path.is_file() and path.suffix != ".json":
            found[str(path.relative_to(directory))] = xxhash.xxh3_128_hexdigest(path.read_bytes())
    return found


def _counts(run: RunDirectory) -> dict[str, Any]:
    return dict(records.read_json(run.path / "counts.json"))


def _training(run: RunDirectory) -> dict[str, Any]:
    """The last checkpoint's bytes, its records included, and every row of metrics without what tells the time."""
    last = max((run.path / "checkpoints").iterdir())
    checkpoint = {path.name: xxhash.xxh3_128_hexdigest(path.read_bytes()) for path in sorted(last.iterdir())}
    rows = [{key: value for key, value in row.items() if key not in TIME_FIELDS} for row in read_lines(run.path / "metrics.jsonl")]
    return {"step": last.name, "checkpoint": checkpoint, "rows": rows}


def _evaluation(run: RunDirectory) -> dict[str, Any]:
    features = xxhash.xxh3_128_hexdigest((run.path / "features.safetensors").read_bytes())
    return {"metrics": records.read_json(run.path / "metrics.json"), "features": features}
