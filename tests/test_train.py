"""The trainer: what it trains on, what it finds, what it logs, and how it stops."""

import functools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.summary.writer import event_file_writer
from torch import Tensor
from toy_activations import BATCH_TOPK, LAYERS, RELU, VARIANTS, MemorySource, random_activations, train_config

from pipeline.activations.source import ActivationBatch, Provenance
from pipeline.config.errors import UserError
from pipeline.crosscoder import training_log
from pipeline.crosscoder.checkpoint import load_crosscoder
from pipeline.crosscoder.trainer import Trainer
from pipeline.run import Run, Stopped

CPU = torch.device("cpu")


def trainer(directory: Path, source: MemorySource, variant: str = "relu", **changes: Any) -> Trainer:
    return Trainer(train_config(variant, **changes), source, Run(directory, stage="train"), CPU)


def rows(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


# -- what it trains on ----------------------------------------------------------------------------------------------


class RecordingTrainer(Trainer):
    """Notes the epoch and the marker (the first number) of every row that a step trains on; stops after `stop_after` steps."""

    def __init__(self, *arguments: Any, trained: list[tuple[int, int]], stop_after: int | None) -> None:
        super().__init__(*arguments)
        self.trained, self.stop_after = trained, stop_after

    def train_step(self, raw_BLD: Tensor) -> None:
        epoch = self.state.plan.place_after(self.state.step).epoch
        self.trained += [(epoch, round(marker)) for marker in raw_BLD[:, 0, 0].tolist()]
        super().train_step(raw_BLD)
        if self.state.step == self.stop_after:
            self.run.request_stop("test")


def test_every_position_is_trained_on_exactly_once_an_epoch_across_a_stop(tmp_path: Path) -> None:
    acts_NLD = random_activations(101)
    acts_NLD[:, 0, 0] = torch.arange(101)
    config, trained = train_config(num_tokens=None, epochs=3, batch_positions=16), []
    with pytest.raises(Stopped):
        RecordingTrainer(config, MemorySource(acts_NLD), Run(tmp_path), CPU, trained=trained, stop_after=10).train()
    assert 0 < len(trained) < 303
    result = RecordingTrainer(config, MemorySource(acts_NLD), Run(tmp_path), CPU, trained=trained, stop_after=None).train()
    assert sorted(trained) == [(epoch, row) for epoch in range(3) for row in range(101)]
    orders = [[row for e, row in trained if e == epoch] for epoch in range(3)]
    assert orders[0] != orders[1]
    assert (result["tokens"], result["epochs"], result["steps"]) == (303, 3.0, 21)


def test_num_tokens_is_kept_to_the_position(tmp_path: Path) -> None:
    acts_NLD, trained = random_activations(101), []
    config = train_config(num_tokens=150, batch_positions=16)
    RecordingTrainer(config, MemorySource(acts_NLD), Run(tmp_path), CPU, trained=trained, stop_after=None).train()
    assert len(trained) == 150


def test_a_source_shorter_than_it_announced_is_an_error(tmp_path: Path) -> None:
    source = MemorySource(random_activations(100))
    source.num_positions = 130
    message = r"gave 4 positions at 96 of epoch 0, expected 32: the source is shorter than the 130 positions it announced"
    source.batches = lambda **place: MemorySource(source.acts_NLD).batches(**place)  # type: ignore[method-assign]
    with pytest.raises(UserError, match=message):
        trainer(tmp_path, source).train()


# -- what it finds --------------------------------------------------------------------------------------------------


def sparse_problem(num_positions: int, num_features: int, d_model: int) -> tuple[Tensor, Tensor]:
    """Unit directions over both layers, [F, L * D], and positions that are sums of about two of them each."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(num_features, 2 * d_model, generator=generator), dim=1)
    fires = torch.rand(num_positions, num_features, generator=generator) < 2 / num_features
    strengths = fires * (1 + torch.rand(num_positions, num_features, generator=generator))
    return directions, (strengths @ directions).view(num_positions, 2, d_model)


@pytest.mark.parametrize("variant", ["relu", "batch_topk"])
def test_a_known_dictionary_is_recovered(variant: str, tmp_path: Path) -> None:
    directions, acts_NLD = sparse_problem(8192, num_features=24, d_model=16)
    crosscoder = {"num_features": 32, "activation_function": {"relu": RELU, "batch_topk": BATCH_TOPK}[variant]}
    course = {"num_tokens": 120_000, "batch_positions": 256, "dead_window_tokens": 20_000, "log_every_steps": 100, "checkpoints": {}}
    result = trainer(tmp_path, MemorySource(acts_NLD), variant, crosscoder=crosscoder, **course).train()
    trained = load_crosscoder(tmp_path)
    found = (trained.crosscoder.W_dec_FLD / trained.normalizer.scale_L[:, None]).flatten(1)
    cosines = directions @ torch.nn.functional.normalize(found, dim=1).T
    assert cosines.max(dim=1).values.mean() > 0.97
    assert 1.5 < result["l0"] < 4.5
    assert result["explained_variance"] > 0.95
    # The inference form, on raw activations, fires and reconstructs nearly as training did.
    features_BF = trained.encode(acts_NLD)
    explained = 1 - (acts_NLD - trained.decode(features_BF)).square().sum() / (acts_NLD - acts_NLD.mean(0)).square().sum()
    assert explained > 0.93
    assert (features_BF > 0).sum(1).float().mean().item() == pytest.approx(result["l0"], rel=0.2)


def test_the_trainer_moves_features_that_only_the_auxiliary_loss_reaches(tmp_path: Path) -> None:
    moved = {}
    for kind in ("auxk", "none"):
        loss = {"auxk": {"k": 64} if kind == "auxk" else None}
        course = trainer(tmp_path / kind, MemorySource(random_activations(300)), "batch_topk", loss=loss)
        state = course.state
        with torch.no_grad():  # feature 5 is too weak to be among the highest of any batch
            state.crosscoder.W_dec_FLD[5] *= 1e-4
        before = state.crosscoder.W_enc_LDF[:, :, 5].clone(), state.crosscoder.W_dec_FLD[5].clone()
        course.train()
        assert state.tokens_since_fired_F[5] >= 200
        moved[kind] = [
            not torch.equal(before[0], state.crosscoder.W_enc_LDF[:, :, 5]),
            not torch.equal(before[1], state.crosscoder.W_dec_FLD[5]),
        ]
    assert moved == {"auxk": [True, True], "none": [False, False]}


def test_the_trainer_agrees_with_a_plain_loop_over_the_published_formulas(tmp_path: Path) -> None:
    """Forward pass by einsum, Adam and clipping written out; 10 steps, the last batch short."""
    acts_NLD = random_activations(300)
    optimizer = {
        "learning_rate": 0.01,
        "schedule": {"warmup_fraction": 0.4, "decay": "constant"},
        "clipping": {"kind": "absolute", "norm": 0.7},
        "beta2": 0.99,
    }
    course = trainer(tmp_path, MemorySource(acts_NLD), num_tokens=300, optimizer=optimizer, log_every_steps=1)
    state = course.state
    weights = [w.detach().clone().requires_grad_() for w in (state.crosscoder.W_enc_LDF, state.crosscoder.b_enc_F)]
    weights += [w.detach().clone().requires_grad_() for w in (state.crosscoder.W_dec_FLD, state.crosscoder.b_dec_LD)]
    first, second = [torch.zeros_like(w) for w in weights], [torch.zeros_like(w) for w in weights]
    losses, norms = [], []
    for t, batch in enumerate(MemorySource(acts_NLD).batches(batch_positions=32, epoch=0, cursor=0), start=1):
        W_enc, b_enc, W_dec, b_dec = weights
        x = (batch.acts_BLD - state.normalizer.mean_LD) * state.normalizer.scale_L[:, None]
        f = (torch.einsum("bld,ldf->bf", x, W_enc) + b_enc).clamp(min=0)
        error = x - torch.einsum("bf,fld->bld", f, W_dec) - b_dec
        penalty = (f * W_dec.square().sum(-1).sqrt().sum(-1)).sum(1).mean()
        loss = error.square().sum((1, 2)).mean() + 0.5 * penalty  # the penalty's warm-up, 5 % of 10 steps, rounds to none
        gradients = torch.autograd.grad(loss, weights)
        norm = torch.sqrt(sum(g.square().sum() for g in gradients))
        losses.append(loss.item())
        norms.append(norm.item())
        learning_rate = 0.01 * min(1.0, t / 4)
        with torch.no_grad():
            for w, g, m, v in zip(weights, gradients, first, second, strict=True):
                clipped = g * min(1.0, 0.7 / (norm.item() + 1e-6))
                m.mul_(0.9).add_(0.1 * clipped)
                v.mul_(0.99).add_(0.01 * clipped**2)
                w -= learning_rate * (m / (1 - 0.9**t)) / ((v / (1 - 0.99**t)).sqrt() + 1e-8)
    course.train()
    assert min(norms) > 0.7, "clipping must have something to do"
    assert [row["loss"] for row in rows(tmp_path)] == pytest.approx(losses, rel=1e-4)
    assert [row["gradient_norm"] for row in rows(tmp_path)] == pytest.approx(norms, rel=1e-4)
    torch.testing.assert_close(state.crosscoder.W_enc_LDF.detach(), weights[0].detach(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(state.crosscoder.W_dec_FLD.detach(), weights[2].detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("variant", ["relu", "batch_topk"])
def test_a_compiled_step_gives_the_same_losses(variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Traced and differentiated as for the default backend, without its minute of C++ compilation.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    for name, compiled in (("eager", False), ("compiled", True)):
        trainer(tmp_path / name, MemorySource(random_activations(300)), variant, compile=compiled).train()
    eager, compiled_rows = rows(tmp_path / "eager"), rows(tmp_path / "compiled")
    assert [row["loss"] for row in compiled_rows] == pytest.approx([row["loss"] for row in eager], rel=1e-3)
    assert compiled_rows[0]["loss_reconstruction"] == pytest.approx(eager[0]["loss_reconstruction"], rel=1e-5)


def test_bfloat16_products_train_as_well_as_float32(tmp_path: Path) -> None:
    losses = {}
    for precision in ("float32", "bfloat16"):
        losses[precision] = trainer(tmp_path / precision, MemorySource(random_activations(300)), precision=precision).train()["loss"]
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.03)
    assert load_crosscoder(tmp_path / "bfloat16").crosscoder.W_dec_FLD.dtype == torch.float32


# -- what it logs ---------------------------------------------------------------------------------------------------


def test_a_row_is_of_all_steps_since_the_last_and_agrees_with_the_steps_one_by_one(tmp_path: Path) -> None:
    acts_NLD = random_activations(300)
    for name, every in (("each", 1), ("four", 4)):
        trainer(tmp_path / name, MemorySource(acts_NLD), num_tokens=300, log_every_steps=every).train()
    each, four = rows(tmp_path / "each"), rows(tmp_path / "four")
    assert [row["step"] for row in four] == [4, 8, 10]
    sizes = [32] * 9 + [12]
    for row, (first, last) in zip(four, [(0, 4), (4, 8), (8, 10)], strict=True):
        total = sum(sizes[first:last])
        for key in ("loss", "loss_reconstruction", "loss_l1", "l0"):
            assert row[key] == pytest.approx(sum(e[key] * n for e, n in zip(each[first:last], sizes[first:last], strict=True)) / total)
        assert row["gradient_norm"] == pytest.approx(sum(e["gradient_norm"] for e in each[first:last]) / (last - first))
        assert row["loss"] == pytest.approx(row["loss_reconstruction"] + row["loss_l1"])
        assert row["tokens"] == sum(sizes[:last])


def test_the_first_explained_variance_agrees_with_its_definition(tmp_path: Path) -> None:
    acts_NLD = random_activations(300)
    course = trainer(tmp_path, MemorySource(acts_NLD), num_tokens=64, batch_positions=64, log_every_steps=1)
    (batch,) = list(MemorySource(acts_NLD[:]).batches(batch_positions=64, epoch=0, cursor=0))[:1]
    normalizer, crosscoder = course.state.normalizer, course.state.crosscoder
    with torch.no_grad():
        error_BLD = batch.acts_BLD - normalizer.denormalize(crosscoder.decode(crosscoder.encode(normalizer.normalize(batch.acts_BLD))))
    error_L, variance_L = error_BLD.square().sum((0, 2)), (batch.acts_BLD - acts_NLD.mean(0)).square().sum((0, 2))
    course.train()
    (row,) = rows(tmp_path)
    assert row["explained_variance_by_layer"] == pytest.approx((1 - error_L / variance_L).tolist(), abs=1e-5)
    scale_L = normalizer.scale_L.square()
    assert row["explained_variance"] == pytest.approx((1 - (error_L * scale_L).sum() / (variance_L * scale_L).sum()).item(), abs=1e-5)


def test_rows_hold_every_number_that_is_promised(tmp_path: Path) -> None:
    result = trainer(tmp_path, MemorySource(random_activations(300)), "batch_topk").train()
    for row in rows(tmp_path):
        numbers = {"loss", "loss_reconstruction", "loss_auxk", "gradient_clipped_share", "l0", "dead_features", "explained_variance"}
        numbers |= {"gradient_norm", "learning_rate", "coefficient_auxk", "k", "tokens_per_second", "data_wait_share", "threshold"}
        assert all(isinstance(row[name], int | float) for name in numbers)
        assert all(len(row[f"{name}_by_layer"]) == 2 for name in ("explained_variance", "encoder_norm", "decoder_norm"))
        assert 0 <= row["data_wait_share"] <= 1
        assert row["l0"] == 2.0
    last = rows(tmp_path)[-1]
    assert {key: result[key] for key in ("dead_features", "threshold")} == {key: last[key] for key in ("dead_features", "threshold")}
    assert all(isinstance(result[name], int | float) for name in ("loss", "loss_auxk", "l0", "explained_variance"))
    assert json.loads(json.dumps(result)) == result


def test_progress_counts_tokens_and_names_loss_l0_and_explained_variance(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer(tmp_path, MemorySource(random_activations(300))).train()
    beat = json.loads((tmp_path / "progress.json").read_text())
    assert (beat["phase"], beat["step"], beat["total"], beat["unit"]) == ("train", 1000, 1000, "tokens")
    assert all(word in beat["note"] for word in ("loss", "L0", "explained"))
    assert "100.0 %" in capsys.readouterr().out


def test_curves_of_a_start_come_after_those_of_a_start_within_the_same_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1_795_000_000.25]
    fake = SimpleNamespace(time=lambda: clock[0], sleep=lambda s: clock.append(clock.pop() + s), monotonic=time.monotonic)
    monkeypatch.setattr(training_log, "time", fake)
    monkeypatch.setattr(event_file_writer, "time", fake)
    (tmp_path / "tensorboard").mkdir()
    earlier = tmp_path / "tensorboard/events.out.tfevents.1795000000.zzz.99999.0"
    earlier.touch()  # of a host, or a process id, that comes late in the order of names
    trainer(tmp_path, MemorySource(random_activations(300))).train()
    first, second = sorted((tmp_path / "tensorboard").iterdir())
    assert first == earlier
    assert second.name.startswith("events.out.tfevents.1795000001.")


# -- how it stops ---------------------------------------------------------------------------------------------------


class PoisonedSource(MemorySource):
    """Gives a NaN in the batch that begins at `cursor` of epoch 0."""

    def __init__(self, acts_NLD: Tensor, poisoned: int) -> None:
        super().__init__(acts_NLD)
        self.poisoned = poisoned

    def batches(self, *, batch_positions: int, epoch: int, cursor: int) -> Iterator[ActivationBatch]:
        for batch in super().batches(batch_positions=batch_positions, epoch=epoch, cursor=cursor):
            if cursor == self.poisoned and epoch == 0:
                batch.acts_BLD[0, 0, 0] = torch.nan
            cursor += len(batch.acts_BLD)
            yield batch


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    course = trainer(tmp_path, PoisonedSource(random_activations(300), poisoned=192), log_every_steps=50)
    # Step 7 is found out at step 10, where the next checkpoint is due: it is not written.
    with pytest.raises(
        UserError, match=r"not finite at step 7 \(epoch 0, positions 192 to 224\); the last checkpoint, .*00000005, is kept"
    ):
        course.train()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["00000005"]
    assert all(torch.isfinite(p).all() for p in load_crosscoder(tmp_path).crosscoder.parameters())


def test_a_run_asked_to_stop_while_the_source_computes_saves_first(tmp_path: Path) -> None:
    source = MemorySource(random_activations(300))
    original = source.batches

    def interrupted(**place: int) -> Iterator[ActivationBatch]:
        for number, batch in enumerate(original(**place)):
            if number == 3:
                raise Stopped("while computing")
            yield batch

    source.batches = interrupted  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        trainer(tmp_path, source).train()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["00000003"]


def test_a_run_stopped_before_its_first_step_goes_on_as_if_it_had_not(tmp_path: Path) -> None:
    stopping = MemorySource(random_activations(300))

    def never(**place: int) -> Iterator[ActivationBatch]:
        raise Stopped("at once")
        yield

    stopping.batches = never  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        trainer(tmp_path / "stopped", stopping).train()
    results = [trainer(tmp_path / name, MemorySource(random_activations(300))).train() for name in ("stopped", "whole")]
    assert results[0]["loss"] == results[1]["loss"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": {"learning_rate": 0.25}}, r"other settings: optimizer\.learning_rate was 0\.005, now it is 0\.25"),
        ({"crosscoder": {**VARIANTS["relu"]["crosscoder"], "num_features": 17}}, r"crosscoder\.num_features was 16, now it is 17"),
        ({"num_tokens": 2000}, r"num_tokens was 1000, now it is 2000"),
    ],
)
def test_other_settings_do_not_go_on_from_a_checkpoint(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    trainer(tmp_path, MemorySource(random_activations(300))).train()
    with pytest.raises(UserError, match=message):
        trainer(tmp_path, MemorySource(random_activations(300)), **changes)


def test_the_random_state_follows_from_the_seed_and_goes_on_from_the_checkpoint(tmp_path: Path) -> None:
    draws = {}
    for name, disturbance in (("one", 1), ("two", 2)):
        torch.manual_seed(disturbance)
        trainer(tmp_path / name, MemorySource(random_activations(300))).train()
        draws[f"{name}, at the end"] = torch.rand(3).tolist()
        torch.manual_seed(disturbance)
        trainer(tmp_path / name, MemorySource(random_activations(300)))
        draws[f"{name}, resumed"] = torch.rand(3).tolist()
    assert len({tuple(drawn) for drawn in draws.values()}) == 1, draws


def test_other_activations_do_not_go_on_from_a_checkpoint(tmp_path: Path) -> None:
    trainer(tmp_path, MemorySource(random_activations(300))).train()
    with pytest.raises(UserError, match="trained on activations ffffffffffff, now they are eeeeeeeeeeee"):
        trainer(tmp_path, MemorySource(random_activations(300), data_id="e" * 64))


def test_settings_that_change_no_byte_may_change_between_starts(tmp_path: Path) -> None:
    first = trainer(tmp_path, MemorySource(random_activations(300))).train()
    again = trainer(tmp_path, MemorySource(random_activations(300)), checkpoints={"keep": 1}, name="other").train()
    assert again["loss"] == first["loss"]


def test_the_record_names_what_the_crosscoder_was_trained_on(tmp_path: Path) -> None:
    trainer(tmp_path, MemorySource(random_activations(300))).train()
    trained = load_crosscoder(tmp_path)
    assert (trained.layers, trained.d_model, trained.num_features, trained.tokens_trained) == (LAYERS, 6, 16, 1000)
    assert (trained.activations_id, trained.batch_positions) == ("f" * 64, 32)
    assert trained.provenance == Provenance("m" * 64, "d" * 64, "t" * 64, 16, [0])
