"""The stage features: agreement with slow dense formulas, parts and resuming, the same bytes, what it refuses."""

import io
import itertools
from pathlib import Path
from typing import Any

import evaluation_pieces
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from evaluation_pieces import CONTEXT_TOKENS, LAYERS, Pieces, batch_topk_config, random_crosscoder
from torch import Tensor

from pipeline import records
from pipeline.config.build_features import FeaturesConfig
from pipeline.config.errors import UserError
from pipeline.contexts import Contexts
from pipeline.crosscoder.checkpoint import load_crosscoder
from pipeline.features import firings, store
from pipeline.run import Run, Stopped
from pipeline.stages import build_features

pieces = evaluation_pieces.pieces
NUM_KEPT, WINDOW, AFTER = 3, 6, 2
TEXTS = {0: "<|endoftext|>"}
"""What transformers makes of a directory without a tokenizer: a vocabulary of one."""


@pytest.fixture(scope="module")
def trained_run(pieces: Pieces) -> Path:
    """Some features never fire: their thresholds are out of reach."""
    config = batch_topk_config()
    crosscoder = random_crosscoder(config)
    with torch.no_grad():
        crosscoder.b_enc_F[3] = -1e6
        crosscoder.b_enc_F[4] = 1e3
    return pieces.write_crosscoder(config, crosscoder, run="features-run")


def config(pieces: Pieces, crosscoder: Path, **changes: Any) -> FeaturesConfig:
    settings: dict[str, Any] = {"name": "test", "crosscoder": crosscoder, "tokens": pieces.tokens.directory}
    settings |= {"language_model": pieces.language_model_config(), "context_tokens": CONTEXT_TOKENS, "batch_contexts": 2}
    settings |= {"top_contexts": NUM_KEPT, "quantiles": 2, "contexts_per_quantile": 2, "window_tokens": WINDOW, "window_after": AFTER}
    return FeaturesConfig(**(settings | {"outlier_norm_ratio": None, "neighbors": 4, "promoted_tokens": 5} | changes))


def build(pieces: Pieces, crosscoder: Path, directory: Path, **changes: Any) -> Path:
    build_features.run(config(pieces, crosscoder, **changes), Run(directory, output=io.StringIO()))
    return directory / "features"


@pytest.fixture(scope="module")
def built(pieces: Pieces, trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(pieces, trained_run, tmp_path_factory.mktemp("features"))


def rows(directory: Path, table: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(directory / f"{table}.parquet").to_pylist()
    return found


class Dense:
    """All activations at once: contexts padded to one length, [N, S, F]; what doesn't count is 0."""

    def __init__(self, pieces: Pieces, crosscoder: Path) -> None:
        self.trained = load_crosscoder(crosscoder)
        self.contexts = Contexts(pieces.tokens, CONTEXT_TOKENS)
        self.batch = self.contexts.read(np.arange(len(self.contexts)))
        self.acts_NSLD = pieces.language_model.activations(torch.from_numpy(self.batch.tokens_BS), LAYERS)
        self.counted_NS = torch.arange(CONTEXT_TOKENS) < torch.from_numpy(self.batch.lengths_B)[:, None]
        self.counted_NS[:, 0] = False
        self.features_NSF = self.encode(self.acts_NSLD)

    def encode(self, acts_NSLD: Tensor) -> Tensor:
        features_MF = self.trained.encode(acts_NSLD.flatten(0, 1))
        return features_MF.view(*acts_NSLD.shape[:2], -1) * self.counted_NS[..., None]

    def only(self, layer: int) -> Tensor:
        """Features where every other layer is at its mean."""
        masked_NSLD = self.trained.normalizer.mean_LD.expand_as(self.acts_NSLD).clone()
        masked_NSLD[:, :, layer] = self.acts_NSLD[:, :, layer]
        return self.encode(masked_NSLD)


@pytest.fixture(scope="module")
def dense(pieces: Pieces, trained_run: Path) -> Dense:
    return Dense(pieces, trained_run)


def test_density_activation_and_survival_agree_with_encoding_everything(built: Path, dense: Dense) -> None:
    fires_NSF, positions = dense.features_NSF > 0, int(dense.counted_NS.sum())
    alone_FL = torch.stack([((dense.only(layer) > 0) & fires_NSF).sum((0, 1)) for layer in range(2)], 1)
    found = rows(built, "features")
    assert records.read_manifest(built, store.SET_FORMAT)["positions"] == positions
    for feature, row in enumerate(found):
        count = int(fires_NSF[..., feature].sum())
        values = dense.features_NSF[..., feature]
        assert (row["feature"], row["firings"]) == (feature, count)
        assert row["density"] == count / positions
        assert row["max_activation"] == pytest.approx(float(values.max()), rel=1e-5)
        assert row["mean_activation"] == pytest.approx(float(values.sum()) / max(count, 1), rel=1e-5)
        assert row["survives_alone"] == pytest.approx((alone_FL[feature] / max(count, 1)).tolist(), rel=1e-6)
        assert (row["is_dead_eval"], row["is_dense"]) == (count == 0, count > 0.1 * positions)
    assert found[3]["is_dead_eval"]
    assert found[4]["is_dense"]
    assert found[4]["density"] == 1.0


def test_decoder_columns_agree_with_one_pair_at_a_time(built: Path, dense: Dense) -> None:
    W_dec_FLD = dense.trained.crosscoder.W_dec_FLD
    norms_FL = W_dec_FLD.square().sum(-1).sqrt()
    for feature, row in enumerate(rows(built, "features")):
        assert row["decoder_norms"] == pytest.approx(norms_FL[feature].tolist(), rel=1e-5)
        assert row["relative_norms"] == pytest.approx((norms_FL[feature] / norms_FL[feature].sum()).tolist(), rel=1e-5)
        pairs = [torch.cosine_similarity(a, b, dim=0).item() for a, b in itertools.combinations(W_dec_FLD[feature], 2)]
        assert row["layer_cosines"] == pytest.approx(pairs, abs=1e-5)
        cosines = [torch.cosine_similarity(W_dec_FLD[feature].flatten(), other.flatten(), dim=0).item() for other in W_dec_FLD]
        nearest = sorted((other for other in range(len(cosines)) if other != feature), key=lambda other: -cosines[other])[:4]
        assert row["neighbors"] == nearest
        assert row["neighbor_cosines"] == pytest.approx([cosines[other] for other in nearest], abs=1e-5)


def test_the_strongest_contexts_are_those_of_all_activations(built: Path, dense: Dense) -> None:
    found = [row for row in rows(built, "contexts") if row["quantile"] is None]
    for feature in range(dense.trained.num_features):
        values = dense.features_NSF[..., feature]
        best = sorted(((-float(values[n, s]), n, s) for n, s in (values > 0).nonzero().tolist()))[:NUM_KEPT]
        mine = [row for row in found if row["feature"] == feature]
        assert [row["rank"] for row in mine] == list(range(len(best)))
        assert [row["activation"] for row in mine] == pytest.approx([-value for value, _, _ in best], rel=1e-5)
        for row in mine:
            assert float(values[row["context"], row["position"]]) == pytest.approx(row["activation"], rel=1e-5)


def test_a_window_holds_the_tokens_and_activations_around_its_firing(built: Path, dense: Dense) -> None:
    for row in rows(built, "contexts"):
        context, position = row["context"], row["position"]
        first, last = max(0, position - (WINDOW - 1 - AFTER)), min(int(dense.batch.lengths_B[context]), position + AFTER + 1)
        assert row["token_ids"] == dense.batch.tokens_BS[context, first:last].tolist()
        assert row["tokens"] == [TEXTS.get(token, f"<{token}>") for token in row["token_ids"]]
        expected = dense.features_NSF[context, first:last, row["feature"]].tolist()
        assert row["activations"] == pytest.approx(expected, rel=1e-5, abs=1e-7)
        assert row["peak"] == position - first
        assert row["document"] == dense.batch.documents_BS[context, position]


def test_a_sample_has_groups_of_one_size_that_rise_and_no_firing_twice(built: Path, dense: Dense) -> None:
    found = [row for row in rows(built, "contexts") if row["quantile"] is not None]
    for feature in range(dense.trained.num_features):
        mine = [row for row in found if row["feature"] == feature]
        count = int((dense.features_NSF[..., feature] > 0).sum())
        assert len({(row["context"], row["position"]) for row in mine}) == len(mine) == min(count, 4)
        assert [row["activation"] for row in mine] == sorted(row["activation"] for row in mine)
        if len(mine) == 4:
            assert [row["quantile"] for row in mine] == [0, 0, 1, 1]


def test_the_logit_lens_agrees_with_the_norm_and_unembedding_written_out(built: Path, pieces: Pieces, dense: Dense) -> None:
    model = pieces.language_model.model
    weight_D, W_U = model.transformer.ln_f.weight, model.lm_head.weight
    for feature in (0, 5, 11):
        row = rows(built, "features")[feature]
        for layer in range(2):
            direction_D = dense.trained.crosscoder.W_dec_FLD[feature, layer]
            centered_D = direction_D - direction_D.mean()
            logits_V = W_U @ (weight_D * centered_D / centered_D.square().mean().sqrt())
            order = logits_V.argsort(descending=True).tolist()
            assert row["promoted"][layer] == [TEXTS.get(token, f"<{token}>") for token in order[:5]]
            assert row["suppressed"][layer] == [TEXTS.get(token, f"<{token}>") for token in order[::-1][:5]]
            assert row["promoted_logits"][layer] == pytest.approx(logits_V[order[:5]].tolist(), rel=1e-3)


# -- the same whatever happens on the way --------------------------------------------------------------------------------------------


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir()) if path.name != "recipe.json"}


def test_two_runs_give_the_same_bytes(built: Path, pieces: Pieces, trained_run: Path, tmp_path: Path) -> None:
    again = contents(build(pieces, trained_run, tmp_path))
    assert set(again) == {"contexts.parquet", "features.json", "features.parquet", "manifest.json"}
    assert again == contents(built)
    assert records.verify(built) == []


def test_parts_give_what_one_part_gives(built: Path, pieces: Pieces, trained_run: Path, tmp_path: Path) -> None:
    parts = build(pieces, trained_run, tmp_path, part_tokens=2 * CONTEXT_TOKENS)
    assert rows(parts, "contexts") == rows(built, "contexts")
    for one, other in zip(rows(parts, "features"), rows(built, "features"), strict=True):
        for column in ("mean_activation", "drop_by_layer"):  # sums in another order
            assert one.pop(column) == pytest.approx(other.pop(column), rel=1e-6)
        assert one == other


def test_few_rows_at_a_time_give_what_whole_contexts_give(
    built: Path, pieces: Pieces, trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(firings, "NUMBERS_AT_A_TIME", 1)
    narrow = build(pieces, trained_run, tmp_path)
    keys = ("feature", "quantile", "rank", "context", "position", "token_ids")
    for one, other in zip(rows(narrow, "contexts"), rows(built, "contexts"), strict=True):
        assert [one[key] for key in keys] == [other[key] for key in keys]
        assert one["activations"] == pytest.approx(other["activations"], rel=1e-5, abs=1e-7)
    assert [row["firings"] for row in rows(narrow, "features")] == [row["firings"] for row in rows(built, "features")]


class StoppedAt(Run):
    """Is asked to stop at the n-th look."""

    looks = 0

    def __init__(self, directory: Path, at: int) -> None:
        super().__init__(directory, output=io.StringIO())
        self._at = at

    def check_stop(self) -> None:
        self.looks += 1
        if self.looks == self._at:
            self.request_stop("test")
        super().check_stop()


def test_a_run_that_was_stopped_goes_on_behind_its_parts_and_ends_with_the_same_bytes(
    pieces: Pieces, trained_run: Path, tmp_path: Path
) -> None:
    settings = config(pieces, trained_run, part_tokens=2 * CONTEXT_TOKENS, check_hashes=False)
    whole = build(pieces, trained_run, tmp_path / "whole", part_tokens=2 * CONTEXT_TOKENS, check_hashes=False)
    with pytest.raises(Stopped):
        build_features.run(settings, StoppedAt(tmp_path / "stopped", 4))
    parts = tmp_path / "stopped/features/parts"
    kept = {path: path.stat().st_mtime_ns for path in parts.glob("*.json")}
    assert len(kept) == 3
    with pytest.raises(Stopped):
        build_features.run(settings, StoppedAt(tmp_path / "stopped", 2))
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    build_features.run(settings, Run(tmp_path / "stopped", output=io.StringIO()))
    assert not parts.exists()
    assert contents(tmp_path / "stopped/features") == contents(whole)


def test_a_window_without_room_for_the_firing_is_refused() -> None:
    with pytest.raises(ValueError, match="window_after is 8, but a window has 8 tokens"):
        FeaturesConfig(name="x", crosscoder="c", tokens="t", language_model={"model": "m"}, window_tokens=8)  # type: ignore[arg-type]


def test_tokens_of_another_tokenizer_are_refused(pieces: Pieces, trained_run: Path, tmp_path: Path) -> None:
    other = evaluation_pieces.held_out_tokens(tmp_path / "tokens", tokenizer_hash="another")
    with pytest.raises(UserError, match="was made by the tokenizer another"):
        build(pieces, trained_run, tmp_path / "run", tokens=other.directory)
