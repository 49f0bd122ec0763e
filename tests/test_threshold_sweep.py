"""The sweep over a trained crosscoder's thresholds: its points against slower formulas, its factors and crossings by hand."""

from pathlib import Path

import evaluation_pieces
import pytest
import torch
from evaluation_pieces import (
    LAYERS,
    Json,
    Pieces,
    evaluated,
    exact_crosscoder,
    reconstruction_row,
)
from slow_evaluation import ROUNDING, all_acts, explained

from pipeline.config.crosscoder import CrosscoderConfig, Group, Topk
from pipeline.crosscoder.checkpoint import load_crosscoder
from pipeline.crosscoder.model import Crosscoder
from pipeline.evaluation.measurements import Compared
from pipeline.evaluation.threshold_sweep import MULTIPLES, SweepPoint, crossing, threshold_factors

pieces, trained_run, metrics = evaluation_pieces.pieces, evaluation_pieces.trained_run, evaluation_pieces.metrics


def test_every_point_agrees_with_its_formula_written_out(pieces: Pieces, trained_run: Path, metrics: Json) -> None:
    trained, acts_NLD = load_crosscoder(trained_run), torch.from_numpy(all_acts(pieces, pieces.tokens))
    crosscoder, normalizer = trained.crosscoder, trained.normalizer
    mean_LD, scale_L1 = normalizer.mean_LD.double(), normalizer.scale_L.double()[:, None]
    normalized_NC = ((acts_NLD - mean_LD) * scale_L1).flatten(1)
    pre_NF = normalized_NC @ crosscoder.W_enc_LDF.double().flatten(0, 1) + crosscoder.b_enc_F.double()
    rank_NF = pre_NF * crosscoder.W_dec_FLD.double().norm(dim=-1).sum(1)
    threshold = crosscoder.state_dict()["activation_function.threshold"].double()
    spread_L = (acts_NLD - acts_NLD.mean(0)).square().sum((0, 2))
    num_checked = 0
    for point in metrics["threshold_sweep"]:
        smallest = point["threshold_factor"] * threshold
        near = int(((rank_NF - smallest).abs() <= ROUNDING * rank_NF.abs().max()).sum())
        features_NF = torch.where(rank_NF > smallest, pre_NF, 0.0)
        assert point["l0"] == pytest.approx(int((features_NF > 0).sum()) / len(acts_NLD), abs=near / len(acts_NLD))
        x_NC = features_NF @ crosscoder.W_dec_FLD.double().flatten(1) + crosscoder.b_dec_LD.double().flatten()
        error_L = (acts_NLD - (x_NC.view_as(acts_NLD) / scale_L1 + mean_LD)).square().sum((0, 2))
        if near == 0:  # else rounding decides what fires
            num_checked += 1
            for place, layer in enumerate(LAYERS):
                assert point["explained_variance"][layer] == explained(error_L[place].item(), spread_L[place].item())
    assert num_checked >= 3


def test_at_factor_one_it_is_the_crosscoder_as_it_was_trained(metrics: Json) -> None:
    (own,) = [point for point in metrics["threshold_sweep"] if point["threshold_factor"] == 1]
    assert own["l0"] == metrics["sparsity"]["l0"]
    for layer in LAYERS:
        row = reconstruction_row(metrics, layer, "crosscoder")
        assert own["explained_variance"][layer] == pytest.approx(row["explained_variance"], abs=1e-9)
    l0s = [point["l0"] for point in metrics["threshold_sweep"]]
    assert l0s == sorted(l0s)


def test_factors_give_the_multiples_of_the_l0_on_their_sample(pieces: Pieces, trained_run: Path) -> None:
    trained, sample_NLD = load_crosscoder(trained_run), torch.from_numpy(all_acts(pieces, pieces.training_tokens)).float()
    value_NF, threshold_F = trained.crosscoder.values_and_thresholds(trained.normalizer.normalize(sample_NLD))
    counts = [int((value_NF / threshold_F > factor).sum()) for factor in threshold_factors(trained, sample_NLD)]
    wanted = [round(multiple * counts[0]) for multiple in MULTIPLES]
    possible = int((value_NF > 0).sum())
    assert wanted[-1] > possible > wanted[2], "some multiples must be in reach, and some not"
    assert counts[1:] == [*(count for count in wanted if count < possible), possible]
    assert len(counts) > 3


def test_without_thresholds_there_is_one_point(pieces: Pieces, tmp_path: Path) -> None:
    found = evaluated(pieces, pieces.write_crosscoder(*exact_crosscoder(), run="exact"), tmp_path)
    assert [point["threshold_factor"] for point in found["threshold_sweep"]] == [1.0]


def test_crossings_by_hand() -> None:
    points = [SweepPoint(1 / l0, l0, {"a": a, "b": None}) for l0, a in ((10.0, 0.5), (20.0, 0.7), (40.0, 0.8), (80.0, 0.6))]
    met = crossing(points, "a", 0.75)
    assert met is not None
    assert (met.l0, met.best_l0, met.best, met.highest_l0) == (pytest.approx(30), 40, 0.8, 80)
    assert crossing(points, "a", 0.8) == (None, 40, 0.8, 80)
    assert crossing(points, "a", 0.4) == (10, 40, 0.8, 80)
    assert crossing(points, "b", 0.4) is None


FIRST, LAST = [LAYERS[0]], [LAYERS[1]]


@pytest.mark.parametrize(
    ("groups", "kind"),
    [
        ([], "a crosscoder"),
        ([(FIRST, FIRST), (LAST, LAST)], "sparse autoencoders a layer"),
        ([(FIRST, LAST)], "a transcoder"),
        ([(LAYERS, LAYERS), (LAST, LAST)], "a crosscoder in groups"),
    ],
)
def test_a_compared_run_is_called_what_it_is(pieces: Pieces, groups: list[tuple[list[str], list[str]]], kind: str) -> None:
    made = [Group(features=6, reads=reads, writes=writes) for reads, writes in groups]
    config = CrosscoderConfig(num_features=6 * max(1, len(groups)), groups=made, activation_function=Topk(k=2))
    run = pieces.write_crosscoder(config, Crosscoder(config, layers=LAYERS, d_model=16, seed=0), run=kind.replace(" ", "-"))
    assert Compared("x", load_crosscoder(run)).kind == kind
