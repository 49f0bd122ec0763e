"""What an evaluation measures: agreement with a slow one, context by context, and what must always hold."""

from pathlib import Path

import evaluation_pieces
import numpy as np
import pytest
import safetensors.torch
import torch
from evaluation_pieces import (
    LAYERS,
    Json,
    Pieces,
    batch_topk_config,
    evaluated,
    exact_crosscoder,
    loss_row,
    random_crosscoder,
    reconstruction_row,
)
from slow_evaluation import NATS, ROUNDING, all_acts, explained, nearly, slow_affine, slow_contexts, slow_loss, slow_replacement

from pipeline.crosscoder.checkpoint import load_crosscoder
from pipeline.evaluation import predictions
from pipeline.prediction_head import PredictionHead

pieces, trained_run, metrics = evaluation_pieces.pieces, evaluation_pieces.trained_run, evaluation_pieces.metrics


def test_cross_entropy_and_divergence_agree_with_one_context_at_a_time(pieces: Pieces, trained_run: Path, metrics: Json) -> None:
    contexts, trained = slow_contexts(pieces.tokens), load_crosscoder(trained_run)
    acts, fitted = all_acts(pieces, pieces.tokens), all_acts(pieces, pieces.training_tokens)
    loss, _, number = slow_loss(pieces, slow_replacement("clean", trained, acts, fitted), contexts)
    assert metrics["clean_cross_entropy"] == pytest.approx(loss, abs=NATS)
    assert metrics["held_out"]["predictions"] == number
    rows = {
        "first spliced": loss_row(metrics, LAYERS[0], "crosscoder"),
        "last zero": loss_row(metrics, LAYERS[1], "zero"),
        "first mean": loss_row(metrics, LAYERS[0], "mean"),
        "last mean": loss_row(metrics, LAYERS[1], "mean"),
        "first from last": loss_row(metrics, LAYERS[0], "other_layer", LAYERS[1]),
        "last from first, matched": loss_row(metrics, LAYERS[1], "other_layer_matched", LAYERS[0]),
        "first from last, affine": loss_row(metrics, LAYERS[0], "affine", LAYERS[1]),
        "split": loss_row(metrics, "split", "crosscoder"),
        "zeros split": loss_row(metrics, "split", "zero"),
    }
    for name, found in rows.items():
        changed, divergence, _ = slow_loss(pieces, slow_replacement(name, trained, acts, fitted), contexts)
        assert found["cross_entropy"] == pytest.approx(changed, abs=NATS), name
        assert found["difference"] == pytest.approx(changed - loss, abs=2 * NATS), name
        assert found["kl"] == pytest.approx(divergence, abs=2 * NATS), name
        assert abs(changed - loss) > 5 * 2 * NATS, "a replacement that changes nothing would prove nothing"


def test_the_mean_over_layers_is_of_each_layer_replaced_alone(metrics: Json) -> None:
    for by in ("crosscoder", "mean", "zero", "affine"):
        rows = [row for row in metrics["replaced"] if row["by"] == by and row["layer"] in LAYERS]
        found = loss_row(metrics, "mean_over_layers", by)
        for number in ("difference", "kl", "cross_entropy", "recovered_against_zero"):
            assert found[number] == pytest.approx(sum(row[number] for row in rows) / 2, rel=1e-12)


def test_where_positions_are_split_every_layers_replacement_counts(pieces: Pieces, trained_run: Path, metrics: Json) -> None:
    for by in ("crosscoder", "mean", "zero"):
        found, last = loss_row(metrics, "split", by), loss_row(metrics, LAYERS[-1], by)
        assert abs(found["cross_entropy"] - last["cross_entropy"]) > 1e-3
    assert loss_row(metrics, "split", "strongest_baseline")["difference"] < loss_row(metrics, "split", "mean")["difference"]


def test_recovered_is_the_share_of_the_ablation_that_the_splice_avoids(metrics: Json) -> None:
    clean = metrics["clean_cross_entropy"]
    for layer in [*LAYERS, "split"]:
        for ablation in ("zero", "mean"):
            ablated = loss_row(metrics, layer, ablation)["cross_entropy"]
            spliced = loss_row(metrics, layer, "crosscoder")
            expected = (ablated - spliced["cross_entropy"]) / (ablated - clean)
            assert spliced[f"recovered_against_{ablation}"] == pytest.approx(expected, rel=1e-12)
            assert loss_row(metrics, layer, ablation)[f"recovered_against_{ablation}"] == 0


def test_reconstruction_agrees_with_a_loop_over_all_positions(pieces: Pieces, trained_run: Path, metrics: Json) -> None:
    acts, trained = all_acts(pieces, pieces.tokens), load_crosscoder(trained_run)
    features_NF = trained.encode(torch.from_numpy(acts).float())
    decoded = trained.decode(features_NF).double().numpy()
    errors = ((acts - decoded) ** 2).sum((0, 2))
    spreads = ((acts - acts.mean(0)) ** 2).sum((0, 2))
    assert metrics["held_out"]["positions"] == len(acts)
    assert metrics["held_out"]["outliers"] == 0
    for index, layer in enumerate(LAYERS):
        found = reconstruction_row(metrics, layer, "crosscoder")
        assert found["explained_variance"] == explained(errors[index], spreads[index])
        assert found["explained_variance_with_outliers"] == pytest.approx(found["explained_variance"], rel=1e-9)
        assert reconstruction_row(metrics, layer, "mean")["explained_variance"] == pytest.approx(0, abs=1e-12)
        zeros = explained((acts[:, index] ** 2).sum(), spreads[index])
        assert reconstruction_row(metrics, layer, "zero")["explained_variance"] == zeros
    joint = explained((errors / spreads).sum(), 2)
    assert reconstruction_row(metrics, "joint", "crosscoder")["explained_variance"] == joint


def test_baselines_are_fitted_on_the_training_text_and_measured_on_the_held_out_one(pieces: Pieces, metrics: Json) -> None:
    acts, fitted = all_acts(pieces, pieces.tokens), all_acts(pieces, pieces.training_tokens)
    spreads, mean_LD = ((acts - acts.mean(0)) ** 2).sum((0, 2)), fitted.mean(0)
    gain = np.sqrt(((fitted[:, 1] - mean_LD[1]) ** 2).sum() / ((fitted[:, 0] - mean_LD[0]) ** 2).sum())
    _, _, directions = np.linalg.svd(fitted[:, 0] - mean_LD[0], full_matrices=False)
    onto = directions[: metrics["baselines"]["pca_rank"]["pca"]]
    expected = {
        (LAYERS[0], "other_layer", LAYERS[1]): acts[:, 1],
        (LAYERS[1], "other_layer_matched", LAYERS[0]): mean_LD[1] + (acts[:, 0] - mean_LD[0]) * gain,
        (LAYERS[1], "affine", LAYERS[0]): slow_affine(fitted[:, 1], fitted[:, 0])(acts[:, 0]),
        (LAYERS[0], "pca", None): mean_LD[0] + (acts[:, 0] - mean_LD[0]) @ onto.T @ onto,
    }
    assert metrics["baselines"]["fit_positions"] == len(fitted)
    assert metrics["baselines"]["fitted_on"] == "training_tokens"
    for (layer, by, source), approximation in expected.items():
        index = LAYERS.index(layer)
        found = reconstruction_row(metrics, layer, by, source)["explained_variance"]
        # The affine map amplifies rounding as far as its ridge, 1e-6 of the mean variance, lets it.
        near = explained(((acts[:, index] - approximation) ** 2).sum(), spreads[index])
        assert found == (pytest.approx(near.expected, abs=1e-3) if by == "affine" else near)


def test_sparsity_agrees_with_a_loop_over_positions_and_groups(pieces: Pieces, tmp_path: Path) -> None:
    config = batch_topk_config(k=12)  # of 24 features: in some groups fewer than 12 a position are positive
    run = pieces.write_crosscoder(config, random_crosscoder(config), run="sparsity")
    trained, acts_NLD = load_crosscoder(run), torch.from_numpy(all_acts(pieces, pieces.tokens)).float()
    fired_NF = trained.encode(acts_NLD) > 0
    crosscoder, threshold = trained.crosscoder, trained.crosscoder.state_dict()["activation_function.threshold"]
    pre_NF = crosscoder.pre_activations(trained.normalizer.normalize(acts_NLD), crosscoder.W_enc_LDF) * crosscoder.decoder_norms()
    assert (pre_NF - threshold).abs().min() > ROUNDING * pre_NF.abs().max(), "rounding must not decide what fires"
    groups = [trained.encode(acts_NLD[start : start + 16], as_trained=True) > 0 for start in range(0, len(acts_NLD), 16)]
    assert len(groups[-1]) < 16
    assert min(int(group.sum()) for group in groups[:-1]) < 12 * 16 == max(int(group.sum()) for group in groups)
    found = evaluated(pieces, run, tmp_path)["sparsity"]
    counts_F = fired_NF.sum(0)
    assert found["l0"] == pytest.approx(int(fired_NF.sum()) / len(acts_NLD), rel=1e-12)
    assert found["l0_as_trained"] == pytest.approx(sum(int(group.sum()) for group in groups) / len(acts_NLD), rel=1e-12)
    assert found["l0_as_trained"] != found["l0"]
    assert found["dead_eval"] == int((counts_F == 0).sum())
    assert found["dense"] == int((counts_F > 0.1 * len(acts_NLD)).sum())
    assert (found["dead"], found["dead_fraction"], found["dead_window_tokens"]) == (2, 2 / 24, 100)
    saved = safetensors.torch.load_file(tmp_path / "features.safetensors")
    assert torch.equal(saved["firing_counts"], counts_F)
    assert torch.equal(saved["tokens_since_fired"], trained.tokens_since_fired_F)


# -- invariants -----------------------------------------------------------------------------------------------------------------


def test_a_crosscoder_that_gives_back_its_input_loses_nothing(pieces: Pieces, tmp_path: Path) -> None:
    found = evaluated(pieces, pieces.write_crosscoder(*exact_crosscoder(), run="exact"), tmp_path)
    for layer in [*LAYERS, "joint", "mean_over_layers"]:
        reconstruction = reconstruction_row(found, layer, "crosscoder")
        assert reconstruction["explained_variance"] == pytest.approx(1, abs=1e-9)
        assert reconstruction["best_scalar"] == pytest.approx(1, abs=ROUNDING)
    for layer in [*LAYERS, "split", "mean_over_layers"]:
        loss = loss_row(found, layer, "crosscoder")
        assert loss["kl"] == pytest.approx(0, abs=2 * NATS)
        assert loss["difference"] == pytest.approx(0, abs=2 * NATS)
        assert loss["recovered_against_zero"] == pytest.approx(1, abs=2 * NATS / abs(loss_row(found, layer, "zero")["difference"]))
    assert found["sparsity"]["l0_as_trained"] is None


def test_batches_do_not_change_the_metrics(pieces: Pieces, trained_run: Path, metrics: Json, tmp_path: Path) -> None:
    for batch_contexts in (1, 3, 100):
        found = evaluated(pieces, trained_run, tmp_path / str(batch_contexts), batch_contexts=batch_contexts)
        for table in ("reconstruction", "replaced"):
            for ours, theirs in zip(found[table], metrics[table], strict=True):
                assert ours == nearly(theirs, metrics)
        assert found["sparsity"] == metrics["sparsity"]
        for key in ("contexts", "tokens", "positions", "predictions", "outliers"):
            assert found["held_out"][key] == metrics["held_out"][key]


def test_the_same_evaluation_gives_the_same_bytes(pieces: Pieces, trained_run: Path, tmp_path: Path) -> None:
    for run in ("one", "two"):
        evaluated(pieces, trained_run, tmp_path / run)
    for name in ("metrics.json", "features.safetensors", "feature_density.png", "explained_variance.png", "nats.png", "tables.txt"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_a_bfloat16_model_gives_nearly_the_same(pieces: Pieces, trained_run: Path, metrics: Json, tmp_path: Path) -> None:
    config = pieces.language_model_config().model_copy(update={"dtype": "bfloat16"})
    found = evaluated(pieces, trained_run, tmp_path, language_model=config)
    assert found["clean_cross_entropy"] == pytest.approx(metrics["clean_cross_entropy"], rel=0.02)
    ours, theirs = (reconstruction_row(document, "joint", "crosscoder") for document in (found, metrics))
    assert ours["explained_variance"] == pytest.approx(theirs["explained_variance"], abs=0.05)


def test_hidden_states_that_would_not_fit_are_taken_in_a_few_at_a_time(
    pieces: Pieces, trained_run: Path, metrics: Json, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predictions, "HIDDEN_NUMBERS", 1)
    found = evaluated(pieces, trained_run, tmp_path)
    assert found["replaced"] == metrics["replaced"]
    assert found["clean_cross_entropy"] == metrics["clean_cross_entropy"]


def test_a_head_that_can_not_be_taken_apart_gives_the_same_in_float32_and_is_said(
    pieces: Pieces, trained_run: Path, metrics: Json, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PredictionHead, "of", classmethod(lambda cls, _model: cls(None, lambda logits: logits)))
    found = evaluated(pieces, trained_run, tmp_path)
    assert (found["float32_head"], metrics["float32_head"]) == (False, True)
    for ours, theirs in zip(found["replaced"], metrics["replaced"], strict=True):
        assert ours == nearly(theirs, metrics)
