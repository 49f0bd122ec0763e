"""A trained crosscoder with its evaluation and feature store, as their stages leave them, for tests of the report."""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer.testing
from feature_pieces import LAYERS, context_row, feature_row, write_store

from pipeline import records
from pipeline.config import yaml_file
from pipeline.features import store
from slurm.commands.command_line import build_app
from slurm.record import run_directory
from slurm.record.run_directory import RunDirectory, append_line
from slurm.reporting import page

NOW = 1_795_424_000.0
CONFIG = {
    "stage": "train", "name": "demo", "activations": {"kind": "disk", "path": "/data/activations/demo"},
    "crosscoder": {"num_features": 3, "activation_function": {"kind": "relu"}},
}  # fmt: skip
COSTS = {
    "h.0": {"crosscoder": 0.25, "affine": 0.125, "other_layer": 0.5, "mean": 4.0, "zero": 8.0},
    "h.1": {"crosscoder": 0.125, "affine": 0.25, "other_layer": 0.5, "mean": 4.0, "zero": 8.0},
}
HEADLINE = {
    "l0": 1.5, "explained_variance": 0.75, "explained_variance_of_baseline": 0.5, "dead_fraction": 0.0, "dead_eval_fraction": 1 / 3,
    "dense_fraction": 2 / 3, "cross_entropy_difference": 0.1875, "cross_entropy_difference_of_baseline": 0.1875,
}  # fmt: skip
VERDICT = ["h.0: WORSE than the strongest baseline by nats: the crosscoder", "  costs 0.2500.", "h.1: BETTER than it."]


def site_without_charts(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The root of runs in `directory`; pages are written without the library of their charts, which takes seconds to come by."""
    (directory / "site.yaml").write_text(f"runs: {directory / 'runs'}\n")
    monkeypatch.setenv("CROSSCODER_SITE", str(directory / "site.yaml"))
    monkeypatch.setattr(page, "chart_library", lambda: "")
    return directory / "runs"


def report(*arguments: str) -> str:
    result = typer.testing.CliRunner().invoke(build_app(), ["report", *arguments])
    if result.exception is not None:
        raise result.exception
    return result.stdout


def embedded(html: str, name: str) -> Any:
    """The JSON of a script of the page."""
    found = re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', html, re.S)
    assert found is not None, name
    return json.loads(found[1])


def make_run(
    runs: Path, stage: str, config: dict[str, Any], result: dict[str, Any] | None = None, *, submitted: float = NOW
) -> RunDirectory:
    run = run_directory.create(runs, stage, config.get("name", "demo"))
    (run.path / "config.yaml").write_text(yaml_file.write(config))
    records.write_json(run.path / "code.json", {"hash": "c" * 64, "commit": "d" * 40, "edited": False, "files": {"a.py": "1"}})
    records.write_json(run.path / "environment.json", {"python_version": "3.11.7", "torch": "2.13.0", "packages": {}})
    records.write_json(
        run.path / "inputs.json", {"crosscoder": {"path": config["crosscoder"]}} if stage not in ("train", "import", "sweep") else {}
    )
    job = {"stage": stage, "name": "demo", "executor": "debug", "cluster": "dev", "submitted": submitted, "submitted_by": "ana@login"}
    run.write_job(job | {"command": ["crosscoder", "submit", "x.yaml"], "num_tasks": 1, "after": [], "jobs": [], "changes": []})
    ended = {"status": "finished", "started": submitted, "ended": submitted + 1, "error": None, "result": result or {}}
    records.write_json(run.path / "result.json", ended)
    return run


def trained(runs: Path, config: dict[str, Any] | None = None) -> RunDirectory:
    """A run of train with three rows of metrics."""
    run = make_run(runs, "train", config or CONFIG, {"explained_variance": 0.7, "l0": 2.0})
    for number in range(3):
        row = {"step": number, "tokens": 1000 * number, "loss": 3.0 - number, "loss_reconstruction": 2.0 - number / 2, "l0": 2.0}
        append_line(run.path / "metrics.jsonl", row | {"explained_variance": 0.5, "explained_variance_by_layer": [0.4, 0.6]})
    return run


def evaluated(runs: Path, crosscoder: Path, headline: dict[str, Any] | None = None) -> RunDirectory:
    run = make_run(runs, "evaluate", {"stage": "evaluate", "name": "demo", "crosscoder": str(crosscoder)}, HEADLINE | (headline or {}))
    stands = [(layer, by, difference) for layer, costs in COSTS.items() for by, difference in costs.items()]
    source = {"affine": "h.9", "other_layer": "h.9"}
    replaced = [
        {"layer": layer, "by": by, "source": source.get(by), "difference": difference, "kl": 0.5, "recovered_against_zero": 0.9}
        for layer, by, difference in stands
    ]
    reconstruction = [
        {"layer": layer, "by": by, "source": source.get(by), "explained_variance": 0.5, "median_error": 0.25} for layer, by, _ in stands
    ]
    metrics = {"format": "crosscoder-metrics/2", "layers": LAYERS, "num_features": 3, "tokens_trained": 2000, "verdict": VERDICT}
    metrics |= {"held_out": {"positions": 8}, "replaced": replaced, "reconstruction": reconstruction}
    records.write_json(run.path / "metrics.json", metrics)
    return run


def stored(runs: Path, crosscoder: Path, tokens: list[str] | None = None) -> RunDirectory:
    run = make_run(runs, "features", {"stage": "features", "name": "demo", "crosscoder": str(crosscoder)})
    write_store(run.path / "features", tokens)
    return run


def generated(runs: Path, crosscoder: Path, text: str, num_prompts: int = 1) -> RunDirectory:
    """A run of generate: of each prompt the model's own text and one with feature 1 turned up, which is `text` and broken."""
    run = make_run(runs, "generate", {"stage": "generate", "name": "demo", "crosscoder": str(crosscoder)})
    costs = {"kl_per_token": 0.5, "cross_entropy": 1.25, "repeated_share": 0.125}
    kinds = [("clean", None, " own", None), ("steered", 8.0, text, "repeats")]
    rows = [
        {"prompt": number, "prompt_text": f"after {number}: {text}", "kind": kind, "strength": strength, "text": one, "breaks": breaks}
        | costs
        for number in range(num_prompts) for kind, strength, one, breaks in kinds
    ]  # fmt: skip
    directory = run.path / "generations"
    directory.mkdir()
    (directory / "generations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    record = records.commit_shard(directory, "generations", "generations-shard/1", ["generations.jsonl"], {}, {})
    summary = [
        {"kind": kind, "strength": strength, "texts": num_prompts, "broken": num_prompts if breaks else 0} | costs
        for kind, strength, _, breaks in kinds
    ]
    settings = {"breakdown": {"ngram": 4, "cross_entropy_rise": 2.0, "repeated_rise": 0.25}, "steering": {"features": [1]}}
    records.write_manifest(directory, "generations/1", {"generations": record}, {"summary": summary, "settings": settings})
    return run


def write_large_store(directory: Path, num_features: int, *, with_contexts: int) -> None:
    """As full as the default settings make one; the first features, those of the strongest activations, have contexts."""
    words = [f"{ending}{number:03}" for number in range(250) for ending in (" word", "tion", " self.", "\t\t")]
    features = [
        feature_row(0, "x") | {
            "feature": feature, "max_activation": 123.456 - feature / 1e3, "density": 0.0123456 + feature / 1e8, "firings": 9,
            "neighbors": [(feature + step) % num_features for step in range(10)], "neighbor_cosines": [0.123456] * 10,
            "survives_alone": [0.123456, 0.654321], "relative_norms": [0.345678, 0.654322],
            "promoted": [words[(7 * feature) % 900 :][:10], words[(3 * feature) % 900 :][:10]], "promoted_logits": [[1.23456] * 10] * 2,
            "suppressed": [words[(5 * feature) % 900 :][:10]] * 2, "suppressed_logits": [[-1.23456] * 10] * 2,
            "top_tokens": words[(11 * feature) % 900 :][:12],
        }
        for feature in range(num_features)
    ]  # fmt: skip
    contexts = [
        context_row(feature, None if rank < 20 else (rank - 20) // 4, "x") | {
            "rank": rank % 20, "peak": 23, "token_ids": list(range(32)), "tokens": words[feature : feature + 32],
            "activations": [1.2345] * 32,
        }
        for feature in range(with_contexts) for rank in range(40)
    ]  # fmt: skip
    directory.mkdir(parents=True)
    group = store.FEATURES_A_GROUP
    pq.write_table(pa.Table.from_pylist(features, store.FEATURE_SCHEMA), directory / "features.parquet", row_group_size=group)
    with pq.ParquetWriter(directory / "contexts.parquet", store.CONTEXT_SCHEMA) as writer:
        for first in range(0, num_features, group):
            rows = contexts[40 * first : 40 * (first + group)]
            writer.write_table(pa.Table.from_pylist(rows, store.CONTEXT_SCHEMA))
    names = ["features.parquet", "contexts.parquet"]
    record = records.commit_shard(directory, store.STEM, store.SHARD_FORMAT, names, {"features": num_features}, {})
    store.seal(directory, record, {"features": num_features, "positions": 100_000, "layers": LAYERS, "features_a_group": group})
