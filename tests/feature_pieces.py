"""A feature store of three features, and a snapshot of them in training, written as the stages write them, for tests of readers."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline import records
from pipeline.crosscoder import checkpoint_files
from pipeline.crosscoder.checkpoint_files import Part
from pipeline.features import store

LAYERS = ["h.0", "h.1"]
DENSITIES = [0.25, 0.5, 0.0]
"""By feature; the last is dead."""


def feature_row(feature: int, token: str) -> dict[str, Any]:
    share = 0.5 + 0.1 * feature
    return {
        "feature": feature, "firings": int(8 * DENSITIES[feature]), "density": DENSITIES[feature], "mean_activation": 1.0,
        "max_activation": 2.0, "is_dead_eval": DENSITIES[feature] == 0, "is_dense": DENSITIES[feature] > 0.1,
        "decoder_norms": [2 * share, 2 - 2 * share], "relative_norms": [share, 1 - share], "layer_cosines": [0.5],
        "survives_alone": [0.75, 0.5], "drop_by_layer": [0.5, 0.25], "neighbors": [(feature + 1) % 3], "neighbor_cosines": [0.125],
        "promoted": [[f"up{feature}"], []], "promoted_logits": [[1.5], []], "suppressed": [[f"down{feature}"], []],
        "suppressed_logits": [[-1.5], []], "top_tokens": [token] if DENSITIES[feature] else [],
    }  # fmt: skip


def context_row(feature: int, quantile: int | None, token: str) -> dict[str, Any]:
    return {
        "feature": feature, "quantile": quantile, "rank": 0, "document": 3, "context": 1, "position": 5, "peak": 1, "activation": 2.0,
        "token_ids": [7, 8, 9], "tokens": ["a b", token, "\n"], "activations": [0.0, 2.0, 0.5],
    }  # fmt: skip


def write_store(directory: Path, tokens: list[str] | None = None) -> Path:
    """`tokens`: on which each feature fires."""
    texts = tokens or ["zero", " one", "two"]
    directory.mkdir(parents=True)
    features = [feature_row(feature, text) for feature, text in enumerate(texts)]
    contexts = [context_row(feature, quantile, text) for feature, text in enumerate(texts) if DENSITIES[feature] for quantile in (None, 0)]
    pq.write_table(pa.Table.from_pylist(features, store.FEATURE_SCHEMA), directory / "features.parquet", row_group_size=2)
    with pq.ParquetWriter(directory / "contexts.parquet", store.CONTEXT_SCHEMA) as writer:
        for group in range(2):
            rows = [row for row in contexts if row["feature"] // 2 == group]
            writer.write_table(pa.Table.from_pylist(rows, store.CONTEXT_SCHEMA))
    names = ["features.parquet", "contexts.parquet"]
    record = records.commit_shard(directory, store.STEM, store.SHARD_FORMAT, names, {"features": 3, "contexts": len(contexts)}, {})
    store.seal(directory, record, {"features": 3, "positions": 8, "layers": LAYERS, "features_a_group": 2})
    return directory


def write_snapshot(directory: Path) -> None:
    """The features' part of a snapshot of step 6 in `history/00000006` of a run of train."""
    tensors = {"firings": torch.tensor([150, 300, 0]), "activation_sum": torch.tensor([150.0, 600.0, 0.0], dtype=torch.float64)}
    tensors |= {"tokens_since_fired": torch.tensor([0, 0, 600]), "decoder_norms": torch.ones(3, 2)}
    facts: dict[str, Any] = {"step": 6, "tokens": 600, "window_tokens": 600, "layers": LAYERS, "dead_window_tokens": 60}
    facts |= {"measured_on": "the step's batch", "measured_positions": 100}
    facts |= {f"{name}_by_layer": [0.5, 0.5] for name in ("norm_ratio", "best_scalar", "explained_variance")}
    checkpoint_files.write(directory.parent, int(directory.name), {"features": Part(tensors, facts)})
