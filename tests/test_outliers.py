"""Positions of huge norm: which they are, what they hold, and that they decide nothing."""

import io
from pathlib import Path

import evaluation_pieces
import pytest
import torch
from evaluation_pieces import (
    CONTEXT_TOKENS,
    LAYERS,
    Json,
    Pieces,
    batch_topk_config,
    evaluated,
    loss_row,
    random_crosscoder,
    reconstruction_row,
)
from slow_evaluation import NATS, SHARE
from torch import Tensor

from pipeline import records
from pipeline.activations.outliers import OutlierLimits
from pipeline.contexts import Contexts
from pipeline.crosscoder.checkpoint import load_crosscoder
from pipeline.crosscoder.metrics import LayerMoments
from pipeline.evaluation.held_out import HeldOut
from pipeline.evaluation.outliers import HeldOutMoments, outlier_limits
from pipeline.language_model import LanguageModel
from pipeline.run import Run
from pipeline.stages import evaluate_crosscoder

SINK = 118
"""An id whose embedding is 300 times as large in a model of these tests; it stands twice in the held-out text."""


class PiecesWithSinks(Pieces):
    """A model whose residual stream is huge wherever one id stands, as those of real models are at a few positions."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        model = self.language_model.model
        head = model.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)  # it was the embeddings
        with torch.no_grad():
            model.get_input_embeddings().weight[SINK] *= 300
        model.config.tie_word_embeddings = False
        model.save_pretrained(self.model_directory)
        self.language_model = LanguageModel.load(self.language_model_config())


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> PiecesWithSinks:
    return PiecesWithSinks(tmp_path_factory.mktemp("sinks"))


@pytest.fixture(scope="module")
def run(pieces: PiecesWithSinks) -> Path:
    config = batch_topk_config()
    return pieces.write_crosscoder(config, random_crosscoder(config))


metrics = evaluation_pieces.metrics
trained_run = run


def positions(pieces: Pieces) -> tuple[Tensor, Tensor]:
    """acts_NLD of every position from 1 on, and where the sink stands among them."""
    contexts = Contexts(pieces.tokens, CONTEXT_TOKENS)
    held_out = HeldOut(contexts, torch.arange(len(contexts)).numpy(), batch_contexts=4, device=torch.device("cpu"))
    rows, sinks = [], []
    for batch in held_out.batches():
        rows.append(pieces.language_model.activations(batch.tokens_BS, LAYERS)[batch.replaced_BS])
        sinks.append(batch.tokens_BS[batch.replaced_BS] == SINK)
    return torch.cat(rows).double(), torch.cat(sinks)


def explained(acts_NLD: Tensor, values_NLD: Tensor) -> list[float]:
    errors_L = (acts_NLD - values_NLD).square().sum((0, 2))
    return (1 - errors_L / (acts_NLD - acts_NLD.mean(0)).square().sum((0, 2))).tolist()


def test_limits_are_a_multiple_of_the_median_norm(pieces: PiecesWithSinks, run: Path, tmp_path: Path) -> None:
    contexts = Contexts(pieces.tokens, CONTEXT_TOKENS)
    leading = HeldOut(contexts, torch.arange(len(contexts)).numpy(), batch_contexts=3, device=torch.device("cpu"))
    trained = load_crosscoder(run)
    quiet = Run(tmp_path, output=io.StringIO())
    limits = outlier_limits(trained, pieces.language_model, leading, 10.0, quiet)
    acts_NLD, sink_N = positions(pieces)
    norms_NL = acts_NLD.norm(dim=-1).sort(0).values
    assert limits.norms_L is not None
    assert limits.norms_L.tolist() == pytest.approx((10 * norms_NL[(len(norms_NL) - 1) // 2]).tolist(), rel=1e-3)
    assert limits.source == "held_out"
    assert sink_N.any()
    assert limits.are_outliers(acts_NLD.float()).equal(sink_N)
    assert outlier_limits(trained, pieces.language_model, leading, None, quiet) == OutlierLimits(None, "off")
    assert not OutlierLimits(None, "off").are_outliers(acts_NLD.float()).any()


def test_a_position_is_an_outlier_if_it_is_one_in_any_layer() -> None:
    acts_NLD = torch.tensor([[[3.0, 4.0], [0.0, 1.0]], [[0.0, 5.1], [0.0, 0.0]], [[0.0, 0.0], [2.0, 0.5]]])
    limits = OutlierLimits(torch.tensor([5.0, 2.0], dtype=torch.float64), "training")
    assert limits.are_outliers(acts_NLD).tolist() == [False, True, True]


def test_figures_are_of_the_other_positions_and_say_what_outliers_hold(pieces: PiecesWithSinks, run: Path, metrics: Json) -> None:
    acts_NLD, sink_N = positions(pieces)
    trained = load_crosscoder(run)
    decoded_NLD = trained.decode(trained.encode(acts_NLD.float())).double()
    without, with_them = explained(acts_NLD[~sink_N], decoded_NLD[~sink_N]), explained(acts_NLD, decoded_NLD)
    assert metrics["held_out"]["outliers"] == int(sink_N.sum()) > 0
    assert metrics["held_out"]["positions"] == int((~sink_N).sum())
    assert metrics["held_out"]["limits_from"] == "held_out"
    for index, layer in enumerate(LAYERS):
        row = reconstruction_row(metrics, layer, "crosscoder")
        assert row["explained_variance"] == pytest.approx(without[index], abs=SHARE * max(1.0, 1 - without[index]))
        assert row["explained_variance_with_outliers"] == pytest.approx(with_them[index], abs=SHARE * max(1.0, 1 - with_them[index]))
        assert abs(with_them[index] - without[index]) > 0.05, "else the two could be confused"
        held = metrics["held_out"]["by_layer"][index]
        squares_N = acts_NLD[:, index].square().sum(-1)
        assert held["share_of_squared_norm"] == pytest.approx(float(squares_N[sink_N].sum() / squares_N.sum()), rel=SHARE)
        distances_N = (acts_NLD - acts_NLD.mean(0))[:, index].square().sum(-1)
        assert held["share_of_variance"] == pytest.approx(float(distances_N[sink_N].sum() / distances_N.sum()), rel=SHARE)
        assert held["share_of_variance"] > 0.9
    mean_row = reconstruction_row(metrics, LAYERS[0], "mean")
    assert mean_row["explained_variance"] == pytest.approx(0, abs=1e-12)
    assert mean_row["explained_variance_with_outliers"] < 0
    features_NF = trained.encode(acts_NLD[~sink_N].float())
    assert metrics["sparsity"]["l0"] == pytest.approx(float((features_NF > 0).sum() / len(features_NF)), rel=1e-3)


def test_outliers_stay_as_they_are_and_no_prediction_at_them_counts(pieces: PiecesWithSinks, metrics: Json) -> None:
    contexts = Contexts(pieces.tokens, CONTEXT_TOKENS)
    held_out = HeldOut(contexts, torch.arange(len(contexts)).numpy(), batch_contexts=1, device=torch.device("cpu"))
    losses = []
    for batch in held_out.batches():
        changed_BS = batch.replaced_BS & (batch.tokens_BS != SINK)
        replace = {LAYERS[0]: lambda acts_BSD, where_BS=changed_BS: acts_BSD.masked_fill(where_BS[..., None], 0.0)}
        log_p_BSV = pieces.language_model.logits(batch.tokens_BS, replace).double().log_softmax(-1)
        counted_BS = batch.counted_BS & changed_BS
        losses.append(-log_p_BSV[counted_BS].gather(1, batch.targets_BS[counted_BS][:, None]))
    assert metrics["held_out"]["predictions"] == len(torch.cat(losses))
    assert loss_row(metrics, LAYERS[0], "zero")["cross_entropy"] == pytest.approx(float(torch.cat(losses).mean()), abs=NATS)


def test_baselines_are_fitted_without_outliers(metrics: Json, pieces: PiecesWithSinks) -> None:
    contexts = Contexts(pieces.training_tokens, CONTEXT_TOKENS)
    held_out = HeldOut(contexts, torch.arange(len(contexts)).numpy(), batch_contexts=8, device=torch.device("cpu"))
    counts = [(int(batch.replaced_BS.sum()), int((batch.tokens_BS[batch.replaced_BS] == SINK).sum())) for batch in held_out.batches()]
    assert sum(sinks for _, sinks in counts) > 0
    assert metrics["baselines"]["fit_positions"] == sum(number - sinks for number, sinks in counts)


def test_limits_of_the_training_come_first(pieces: PiecesWithSinks, tmp_path: Path) -> None:
    config = batch_topk_config()
    carrying = pieces.write_crosscoder(config, random_crosscoder(config), run="with-limits", outlier_norms=[1e9, 1e9])
    found = evaluated(pieces, carrying, tmp_path)
    assert found["held_out"]["outliers"] == 0
    assert found["held_out"]["limits_from"] == "training"
    assert [row["norm_limit"] for row in found["held_out"]["by_layer"]] == [1e9, 1e9]


def test_tokens_that_training_left_out_are_in_no_figure(pieces: PiecesWithSinks, tmp_path: Path) -> None:
    config = batch_topk_config()
    carrying = pieces.write_crosscoder(config, random_crosscoder(config), run="with-tokens", exclude_token_ids=[SINK])
    found = evaluated(pieces, carrying, tmp_path)
    acts_NLD, sink_N = positions(pieces)
    assert found["held_out"]["excluded_positions"] == int(sink_N.sum()) > 0
    assert found["held_out"]["positions"] == len(acts_NLD) - int(sink_N.sum())
    assert found["held_out"]["outliers"] == 0


def test_without_a_ratio_no_position_is_left_out(pieces: PiecesWithSinks, run: Path, tmp_path: Path) -> None:
    found = evaluated(pieces, run, tmp_path, outlier_norm_ratio=None)
    acts_NLD, _ = positions(pieces)
    assert found["held_out"]["positions"] == len(acts_NLD)
    assert found["held_out"]["by_layer"][0]["norm_limit"] is None
    row = reconstruction_row(found, LAYERS[0], "crosscoder")
    assert row["explained_variance"] == pytest.approx(row["explained_variance_with_outliers"], rel=1e-9)


def test_few_positions_that_hold_much_of_the_variance_are_warned_of(pieces: PiecesWithSinks, run: Path, tmp_path: Path) -> None:
    said = {}
    for ratio in (None, 10.0):
        output = io.StringIO()
        directory = tmp_path / str(ratio)
        evaluate_crosscoder.run(pieces.config(run, outlier_norm_ratio=ratio), Run(directory, output=output))
        said[ratio] = " ".join(output.getvalue().split())
        share = records.read_json(directory / "metrics.json")["held_out"]["by_layer"][0]["share_of_few"]
        warning = f"{LAYERS[0]}: beware, 0.1 % of the positions hold {100 * share:.0f} % of the variance"
        assert (warning in said[ratio]) == (ratio is None)


def test_moments_of_inliers_and_outliers_add_up_by_hand() -> None:
    # One layer of width 1: 1, 3 and an outlier 20, the mean of all 8: (49 + 25 + 144) and 400 of 410 of the squares.
    parts = []
    for values in ([1.0, 3.0], [20.0]):
        moments = LayerMoments(1, 1, torch.device("cpu"))
        moments.add(torch.tensor(values).view(-1, 1, 1))
        parts.append(moments)
    found = HeldOutMoments(parts[0], parts[0].with_those_of(parts[1]), parts[1])
    (row,) = found.by_layer(["h"], OutlierLimits(torch.tensor([15.0]), "training"), [0.5])
    assert row.norm_limit == 15
    assert row.share_of_squared_norm == pytest.approx(400 / 410)
    assert row.share_of_variance == pytest.approx(144 / 218)
    assert row.share_of_few == 0.5
