"""The feature store on disk: two parquet tables, their record and a manifest, `feature-store/1`.

    features.parquet        a row a feature, in their order
        feature int32                           firings int64: positions on which it fires
        density float64                         its firings over all positions
        mean_activation, max_activation         float32, over its firings; 0 of one that never fires
        is_dead_eval, is_dense bool             never fires here; fires on over 10 % of the positions
        decoder_norms [L] float32               of each layer, in the crosscoder's units
        relative_norms [L] float32              each over their sum
        layer_cosines [P] float32               between the decoders of layers (0, 1), (0, 2), ..., (1, 2), ...
        survives_alone [L] float32              share of its firings that are left when only this layer is encoded, the others at the
                                                mean of the training activations
        drop_by_layer [L] float32               share of its summed activation that goes when this layer is at that mean
        neighbors [K] int32, neighbor_cosines [K] float32      nearest features by decoder, nearest first
        promoted, suppressed [L][T] string      tokens by the logit lens on each layer's decoder, the strongest first; a layer that the
        promoted_logits, suppressed_logits      feature doesn't write has none
        top_tokens [] string                    the token on which each of its strongest firings is, without repeats
    contexts.parquet        a row a firing kept, by feature
        feature int32                           quantile int8: null of the strongest firings; of a sample, its group, 0 the weakest
        rank int16                              of the strongest, 0 first; in a sample, from the weakest on
        document int64, context int64           numbers in the token set; position int16 in the context, peak int16 in the window
        activation float32                      at the firing
        token_ids [] int32, tokens [] string    of the window; activations [] float32: the feature's, at each of its tokens
    features.json           the record of both, with their sizes and hashes
    manifest.json           data id, crosscoder, layers, positions, tokens of a window, features in a row group of either table

One feature of `features.parquet` reads, in part: {"feature": 7, "density": 0.0012, "relative_norms": [0.61, 0.39], "top_tokens":
[" def"]}. Row groups are of `FEATURES_A_GROUP` features, so that a reader touches only those it shows. The same inputs give the same
bytes with the same version of pyarrow.

Shapes: F features, L layers, P pairs of layers, K kept of each, W tokens of a window, N rows.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from pipeline import records
from pipeline.config.build_features import FeaturesConfig
from pipeline.contexts import Contexts
from pipeline.crosscoder.checkpoint import TrainedCrosscoder
from pipeline.crosscoder.metrics import DENSE_FRACTION
from pipeline.crosscoder.weights import layer_norms
from pipeline.evaluation.held_out import Indices
from pipeline.features import decoders
from pipeline.features.best_firings import NONE, BestFirings, places_of
from pipeline.features.firings import Firings
from pipeline.features.logit_lens import LogitLens

SET_FORMAT, SHARD_FORMAT, STEM = "feature-store/1", "feature-store-shard/1", "features"
FEATURES_A_GROUP = 256
_FLOATS, _WORDS = pa.list_(pa.float32()), pa.list_(pa.string())

CONTEXT_SCHEMA = pa.schema(
    [
        ("feature", pa.int32()), ("quantile", pa.int8()), ("rank", pa.int16()), ("document", pa.int64()), ("context", pa.int64()),
        ("position", pa.int32()), ("peak", pa.int16()), ("activation", pa.float32()), ("token_ids", pa.list_(pa.int32())),
        ("tokens", _WORDS), ("activations", _FLOATS),
    ]
)  # fmt: skip
FEATURE_SCHEMA = pa.schema(
    [
        ("feature", pa.int32()), ("firings", pa.int64()), ("density", pa.float64()), ("mean_activation", pa.float32()),
        ("max_activation", pa.float32()), ("is_dead_eval", pa.bool_()), ("is_dense", pa.bool_()), ("decoder_norms", _FLOATS),
        ("relative_norms", _FLOATS), ("layer_cosines", _FLOATS), ("survives_alone", _FLOATS), ("drop_by_layer", _FLOATS),
        ("neighbors", pa.list_(pa.int32())), ("neighbor_cosines", _FLOATS), ("promoted", pa.list_(_WORDS)),
        ("promoted_logits", pa.list_(_FLOATS)), ("suppressed", pa.list_(_WORDS)), ("suppressed_logits", pa.list_(_FLOATS)),
        ("top_tokens", _WORDS),
    ]
)  # fmt: skip


class Reading(NamedTuple):
    """The text that was read."""

    contexts: Contexts
    chosen: Indices
    """Numbers in the token set of the contexts, in the order in which they were read."""
    texts: Sequence[str]
    """Of each token."""


def write(
    directory: Path, firings: Firings, trained: TrainedCrosscoder, lens_L: Sequence[LogitLens], reading: Reading, settings: FeaturesConfig
) -> records.Record:
    """Writes both tables, then their record; gives it."""
    num_contexts = 0
    top_tokens: list[list[str]] = []
    with records.atomic_file(directory / "contexts.parquet") as file, pq.ParquetWriter(file, CONTEXT_SCHEMA, compression="zstd") as writer:
        for start in range(0, trained.num_features, FEATURES_A_GROUP):
            group = range(start, min(start + FEATURES_A_GROUP, trained.num_features))
            rows = context_rows(firings, group, reading, settings.quantiles)
            top_tokens += _peaks(rows, group)
            num_contexts += len(rows)
            writer.write_table(pa.Table.from_pylist(rows, CONTEXT_SCHEMA))
    table = pa.table(feature_columns(firings, trained, lens_L, reading.texts, settings) | {"top_tokens": top_tokens}, FEATURE_SCHEMA)
    with records.atomic_file(directory / "features.parquet") as file:
        pq.write_table(table, file, compression="zstd", row_group_size=FEATURES_A_GROUP)
    facts = {"features": trained.num_features, "contexts": num_contexts}
    return records.commit_shard(directory, STEM, SHARD_FORMAT, ["features.parquet", "contexts.parquet"], facts, {})


def feature_columns(
    firings: Firings, trained: TrainedCrosscoder, lens_L: Sequence[LogitLens], texts: Sequence[str], settings: FeaturesConfig
) -> dict[str, Any]:
    """All columns of `features.parquet` but `top_tokens`."""
    driving, W_dec_FLD = firings.driving, trained.crosscoder.W_dec_FLD
    density_F = driving.firings_F.double() / max(firings.num_positions, 1)
    near = decoders.neighbors(W_dec_FLD, settings.neighbors)
    return {
        "feature": list(range(trained.num_features)),
        "firings": driving.firings_F.tolist(),
        "density": density_F.tolist(),
        "mean_activation": (driving.sum_activation_F / driving.firings_F.clamp(min=1)).float().tolist(),
        "max_activation": driving.max_activation_F.tolist(),
        "is_dead_eval": (driving.firings_F == 0).tolist(),
        "is_dense": (density_F > DENSE_FRACTION).tolist(),
        "decoder_norms": layer_norms(W_dec_FLD).tolist(),
        "relative_norms": decoders.relative_norms(W_dec_FLD).tolist(),
        "layer_cosines": decoders.layer_cosines(W_dec_FLD).tolist(),
        "survives_alone": driving.survives_alone_FL.tolist(),
        "drop_by_layer": driving.drop_by_layer_FL.tolist(),
        "neighbors": near.features_FK.tolist(),
        "neighbor_cosines": near.cosines_FK.tolist(),
        **_lens_columns(W_dec_FLD, lens_L, texts, settings.promoted_tokens),
    }


def _lens_columns(W_dec_FLD: Tensor, lens_L: Sequence[LogitLens], texts: Sequence[str], count: int) -> dict[str, list[list[Any]]]:
    columns: dict[str, list[list[Any]]] = {
        name: [[] for _ in W_dec_FLD] for name in ("promoted", "promoted_logits", "suppressed", "suppressed_logits")
    }
    has_lens = all(lens.unembedding_VD is not None for lens in lens_L)
    for layer, lens in enumerate(lens_L if has_lens else []):
        found = lens.tokens(W_dec_FLD[:, layer], count)
        writes_F = (layer_norms(W_dec_FLD)[:, layer] > 0).tolist()
        for name, values_FK in zip(columns, found, strict=True):
            for rows, values, writes in zip(columns[name], values_FK.tolist(), writes_F, strict=True):
                rows.append([] if not writes else values if name.endswith("_logits") else [texts[token] for token in values])
    return columns


def context_rows(firings: Firings, group: range, reading: Reading, quantiles: int) -> list[dict[str, Any]]:
    """The rows of `contexts.parquet` of some features."""
    span = slice(group.start, group.stop)
    top, sample = _rows_of(firings.top, span), _rows_of(firings.sample, span)
    for rows in sample:
        rows.sort(key=lambda row: (row["activation"], row["place"]))
        for rank, row in enumerate(rows):
            row["rank"], row["quantile"] = rank, rank * quantiles // len(rows)
    found = [{"feature": feature, **row} for feature, one, other in zip(group, top, sample, strict=True) for row in [*one, *other]]
    _add_tokens(found, reading, firings.top.offsets_W.tolist())
    return found


def _rows_of(best: BestFirings, span: slice) -> list[list[dict[str, Any]]]:
    """Of each feature its firings in falling order of their keys."""
    keys_FK, windows_FKW = best.keys_FK[span].cpu(), best.windows_FKW[span].cpu().numpy()
    places_FK, firing = places_of(keys_FK), int((best.offsets_W == 0).nonzero()[0])
    kept_F = (keys_FK != NONE).sum(1)
    return [
        [
            {"quantile": None, "rank": rank, "place": int(places_FK[row, rank]), "window": windows_FKW[row, rank],
             "activation": float(windows_FKW[row, rank, firing])}
            for rank in range(int(kept_F[row]))
        ]
        for row in range(len(keys_FK))
    ]  # fmt: skip


def _add_tokens(rows: list[dict[str, Any]], reading: Reading, offsets_W: list[int]) -> None:
    """Puts document, position and the tokens of the window in place of place and window."""
    if not rows:
        return
    places_N = np.array([row.pop("place") for row in rows], np.int64)
    order_N, positions_N = np.divmod(places_N, reading.contexts.context_tokens)
    read_U, row_N = np.unique(order_N, return_inverse=True)
    batch = reading.contexts.read(reading.chosen[read_U])
    for row, order, position, number in zip(rows, order_N.tolist(), positions_N.tolist(), row_N.tolist(), strict=True):
        first, last = max(0, position + offsets_W[0]), min(int(batch.lengths_B[number]), position + offsets_W[-1] + 1)
        token_ids = batch.tokens_BS[number, first:last].tolist()
        skipped = first - (position + offsets_W[0])
        row["document"] = int(batch.documents_BS[number, position])
        row["context"], row["position"], row["peak"] = int(reading.chosen[order]), position, position - first
        row["token_ids"], row["tokens"] = token_ids, [reading.texts[token] for token in token_ids]
        row["activations"] = row.pop("window")[skipped : skipped + len(token_ids)].tolist()


def _peaks(rows: list[dict[str, Any]], group: range) -> list[list[str]]:
    """The tokens on which the strongest firings of each feature are."""
    found: dict[int, dict[str, None]] = {feature: {} for feature in group}
    for row in rows:
        if row["quantile"] is None:
            found[row["feature"]][row["tokens"][row["peak"]]] = None
    return [list(tokens) for tokens in found.values()]


def seal(directory: Path, record: records.Record, facts: records.Record) -> records.Record:
    """Writes the manifest, and gives it."""
    return records.write_manifest(directory, SET_FORMAT, {STEM: record}, facts)
