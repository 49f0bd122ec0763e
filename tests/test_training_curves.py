"""What TensorBoard shows of a training: gradients, medians, histograms, and a description of every curve."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toy_activations import LAYERS, MemorySource, random_activations, train_config

from pipeline.crosscoder.trainer import Trainer
from pipeline.crosscoder.training_curves import CURVES, place_of
from pipeline.run import Run

ACTS_NLD = random_activations(100)


def trainer(directory: Path, variant: str = "relu", **changes: Any) -> Trainer:
    return Trainer(train_config(variant, **changes), MemorySource(ACTS_NLD), Run(directory, stage="train"), torch.device("cpu"))


def rows(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("parts", [None, 7])
def test_the_last_step_of_a_row_agrees_with_a_plain_loop(parts: int | None, tmp_path: Path) -> None:
    course = trainer(tmp_path, num_tokens=64, batch_positions=64, log_every_steps=1, micro_batch_positions=parts)
    state = course.state
    (batch,) = list(MemorySource(ACTS_NLD).batches(batch_positions=64, epoch=0, cursor=0))[:1]
    W_enc, W_dec = (w.detach().clone().requires_grad_() for w in (state.crosscoder.W_enc_LDF, state.crosscoder.W_dec_FLD))
    x = (batch.acts_BLD - state.normalizer.mean_LD) * state.normalizer.scale_L[:, None]
    f = torch.einsum("bld,ldf->bf", x, W_enc).clamp(min=0)
    x_hat = torch.einsum("bf,fld->bld", f, W_dec)
    loss = (x - x_hat).square().sum((1, 2)).mean() + 0.5 * (f * W_dec.square().sum(-1).sqrt().sum(-1)).sum(1).mean()
    gradient_enc, gradient_dec = torch.autograd.grad(loss, (W_enc, W_dec))
    course.train()
    (row,) = rows(tmp_path)
    assert row["encoder_gradient_norm_by_layer"] == pytest.approx(gradient_enc.square().sum((1, 2)).sqrt().tolist(), rel=1e-4)
    assert row["decoder_gradient_norm_by_layer"] == pytest.approx(gradient_dec.square().sum((0, 2)).sqrt().tolist(), rel=1e-4)
    lower_middle = 31  # of 64 values in order
    norms = batch.acts_BLD.square().sum(-1).sqrt().sort(0).values[lower_middle]
    errors = (batch.acts_BLD - state.normalizer.denormalize(x_hat.detach())).square().sum(-1).sqrt().sort(0).values[lower_middle]
    assert row["median_norm_by_layer"] == pytest.approx(norms.tolist(), rel=1e-5)
    assert row["median_error_norm_by_layer"] == pytest.approx(errors.tolist(), rel=1e-4)
    assert row["median_error_by_layer"] == pytest.approx((errors / norms).tolist(), rel=1e-4)


def test_a_layer_that_no_feature_writes_has_no_median_error(tmp_path: Path) -> None:
    groups = [{"features": 16, "reads": LAYERS, "writes": LAYERS[:1]}]
    crosscoder = {"num_features": 16, "activation_function": {"kind": "relu"}, "groups": groups}
    trainer(tmp_path, crosscoder=crosscoder, num_tokens=64).train()
    (row,) = rows(tmp_path)
    assert row["median_error_by_layer"][0] > 0
    assert row["median_error_by_layer"][1] is row["median_error_norm_by_layer"][1] is None
    assert row["decoder_gradient_norm_by_layer"][1] == 0.0


def test_every_curve_has_a_description_and_losses_come_first_and_counters_last(tmp_path: Path) -> None:
    trainer(tmp_path, "batch_topk").train()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    tags = events.Tags()["scalars"] + events.Tags()["histograms"]
    assert all(events.SummaryMetadata(tag).summary_description for tag in tags)
    groups = sorted({tag.split("/")[0] for tag in tags})
    assert (groups[0], groups[-1]) == ("1_loss", "8_counters")
    assert {"1_loss/total", "1_loss/auxk", "2_reconstruction/median_error/block.0", "8_counters/tokens"} <= set(tags)
    assert [place_of(name.replace("*", "l1"))[0] for group in CURVES for name in CURVES[group]] == [
        group for group in CURVES for _ in CURVES[group]
    ]


def test_a_number_without_a_description_is_an_error() -> None:
    with pytest.raises(KeyError, match="novel_number has no description"):
        place_of("novel_number")


def test_histograms_come_as_often_as_asked_for_and_at_the_end(tmp_path: Path) -> None:
    trainer(tmp_path, num_tokens=None, epochs=5, batch_positions=10, log_every_steps=4, histogram_every_steps=10).train()
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"histograms": 0})
    events.Reload()
    names = ("4_weights/encoder_norm", "4_weights/decoder_norm", "5_gradients/encoder_gradient_norm", "5_gradients/decoder_gradient_norm")
    for tag in (f"{name}_histogram/{layer}" for name in names for layer in LAYERS):
        assert [(event.step, event.histogram_value.num) for event in events.Histograms(tag)] == [
            (step, 16) for step in (12, 20, 32, 40, 50)
        ]


def test_l0_over_the_window_and_over_the_epoch_agrees_with_the_steps_one_by_one(tmp_path: Path) -> None:
    course = {"num_tokens": None, "epochs": 2, "batch_positions": 16}  # 7 steps an epoch, the last of 4 positions
    for name, every in (("each", 1), ("three", 3)):
        trainer(tmp_path / name, **course, log_every_steps=every, l0_window_steps=5).train()
    sizes = ([16] * 6 + [4]) * 2
    firings = [row["l0"] * size for row, size in zip(rows(tmp_path / "each"), sizes, strict=True)]
    for row in rows(tmp_path / "each") + rows(tmp_path / "three"):
        last = row["step"]
        for name, first in (("recent_l0", max(0, last - 5)), ("epoch_l0", 0 if last <= 7 else 7)):
            assert row[name] == pytest.approx(sum(firings[first:last]) / sum(sizes[first:last]), rel=1e-12)
