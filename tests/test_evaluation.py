"""What an evaluation measures: agreement with a slow one, context by context, and what must always hold."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import evaluation_pieces
import numpy as np
import pytest
import safetensors.torch
import torch
from evaluation_pieces import (
    CONTEXT_TOKENS,
    D_MODEL,
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
from rounding import forward_pass
from torch import Tensor

from pipeline.config.crosscoder import CrosscoderConfig, Relu
from pipeline.crosscoder.checkpoint import TrainedCrosscoder, load_crosscoder

pieces, trained_run, metrics = evaluation_pieces.pieces, evaluation_pieces.trained_run, evaluation_pieces.metrics

# The language model's float32 rounds differently in batches of other shapes, and on other processors; all that is summed afterwards is
# float64. Losses are of logits and their log-sum-exp, log(300) in size; squares change twice as much as what is squared, and both a
# share's numerator and its denominator change.
ROUNDING = forward_pass(context_tokens=CONTEXT_TOKENS)
NATS = ROUNDING * math.log(300)
SHARE = 4 * ROUNDING


# -- a slow evaluation: one context after the other, straight from the documents, with hooks of its own --------------------------


def slow_contexts(pieces: Pieces) -> list[tuple[list[int], list[int]]]:
    """(ids, document of each id) of every context, from the documents; a separator belongs to the document that it ends."""
    contexts, document = [], 0
    for shard in pieces.tokens.shards:
        ids, documents = [], []
        for _ in range(shard.num_documents):
            here = [*pieces.tokens.document(document).tolist(), 0]
            ids, documents, document = ids + here, documents + [document] * len(here), document + 1
        contexts += [(ids[s : s + CONTEXT_TOKENS], documents[s : s + CONTEXT_TOKENS]) for s in range(0, len(ids), CONTEXT_TOKENS)]
    return contexts


def slow_logits(pieces: Pieces, ids: list[int], replacements: dict[str, Tensor]) -> Tensor:
    """logits_SV of one context; each replacement [S-1, D] goes to positions 1 on of its layer."""

    def hook_for(values: Tensor) -> Callable[..., Any]:
        def hook(_module: Any, _inputs: Any, output: Any) -> Any:
            acts = (output[0] if isinstance(output, tuple) else output).clone()
            acts[0, 1:] = values
            return (acts, *output[1:]) if isinstance(output, tuple) else acts

        return hook

    model = pieces.language_model.model
    hooks = [model.get_submodule(layer).register_forward_hook(hook_for(values)) for layer, values in replacements.items()]
    with torch.inference_mode():
        logits: Tensor = model(input_ids=torch.tensor([ids])).logits[0]
    for hook in hooks:
        hook.remove()
    return logits


def slow_loss(
    pieces: Pieces, replace: Callable[[Tensor], dict[str, Tensor]], contexts: list[tuple[list[int], list[int]]]
) -> tuple[float, float, int]:
    """Cross-entropy and divergence in nats and the number of predictions, from acts_NLD of positions 1 on to replacements."""
    losses, divergences = [], []
    for ids, documents in contexts:
        acts_NLD = pieces.language_model.activations(torch.tensor([ids]), LAYERS)[0, 1:]
        clean, changed = (slow_logits(pieces, ids, chosen).double().log_softmax(-1).numpy() for chosen in ({}, replace(acts_NLD)))
        for position in range(1, len(ids) - 1):
            if documents[position] == documents[position + 1]:
                losses.append(-changed[position, ids[position + 1]])
                divergences.append(np.sum(np.exp(clean[position]) * (clean[position] - changed[position])))
    return float(np.mean(losses)), float(np.mean(divergences)), len(losses)


def all_acts(pieces: Pieces) -> np.ndarray:
    """Every position that counts, [N, L, D] float64, in order."""
    rows = [pieces.language_model.activations(torch.tensor([ids]), LAYERS)[0, 1:] for ids, _ in slow_contexts(pieces)]
    return torch.cat(rows).double().numpy()


def slow_replacement(name: str, trained: TrainedCrosscoder, acts: np.ndarray) -> Callable[[Tensor], dict[str, Tensor]]:
    mean_LD, spread_L = acts.mean(0), np.sqrt(((acts - acts.mean(0)) ** 2).sum((0, 2)))

    def replace(acts_NLD: Tensor) -> dict[str, Tensor]:
        decoded = trained.decode(trained.encode(acts_NLD))
        matched = torch.tensor(mean_LD[1] + (acts_NLD[:, 0].double().numpy() - mean_LD[0]) * spread_L[1] / spread_L[0]).float()
        return {
            "clean": {},
            "first spliced": {LAYERS[0]: decoded[:, 0]},
            "all spliced": {layer: decoded[:, index] for index, layer in enumerate(LAYERS)},
            "last zero": {LAYERS[1]: torch.zeros(D_MODEL)},
            "first mean": {LAYERS[0]: torch.tensor(mean_LD[0]).float()},
            "last mean": {LAYERS[1]: torch.tensor(mean_LD[1]).float()},
            "first from last": {LAYERS[0]: acts_NLD[:, 1]},
            "last from first, matched": {LAYERS[1]: matched},
        }[name]

    return replace


def test_cross_entropy_and_divergence_agree_with_one_context_at_a_time(pieces: Pieces, trained_run: Path, metrics: Json) -> None:
    contexts, trained, acts = slow_contexts(pieces), load_crosscoder(trained_run), all_acts(pieces)
    loss, _, number = slow_loss(pieces, slow_replacement("clean", trained, acts), contexts)
    assert metrics["clean_cross_entropy"] == pytest.approx(loss, abs=NATS)
    assert metrics["held_out"]["predictions"] == number
    rows = {
        "first spliced": loss_row(metrics, LAYERS[0], "crosscoder"),
        "all spliced": loss_row(metrics, "all", "crosscoder"),
        "last zero": loss_row(metrics, LAYERS[1], "zero"),
        "first mean": loss_row(metrics, LAYERS[0], "mean"),
        "last mean": loss_row(metrics, LAYERS[1], "mean"),
        "first from last": loss_row(metrics, LAYERS[0], "other_layer", LAYERS[1]),
        "last from first, matched": loss_row(metrics, LAYERS[1], "other_layer_matched", LAYERS[0]),
    }
    for name, found in rows.items():
        changed, divergence, _ = slow_loss(pieces, slow_replacement(name, trained, acts), contexts)
        assert found["cross_entropy"] == pytest.approx(changed, abs=NATS), name
        assert found["difference"] == pytest.approx(changed - loss, abs=2 * NATS), name
        assert found["kl"] == pytest.approx(divergence, abs=2 * NATS), name
        assert abs(changed - loss) > 5 * 2 * NATS, "a replacement that changes nothing would prove nothing"


def test_recovered_is_the_share_of_the_ablation_that_the_splice_avoids(metrics: Json) -> None:
    clean = metrics["clean_cross_entropy"]
    for layer in [*LAYERS, "all"]:
        for ablation in ("zero", "mean"):
            ablated = loss_row(metrics, layer, ablation)["cross_entropy"]
            spliced = loss_row(metrics, layer, "crosscoder")
            expected = (ablated - spliced["cross_entropy"]) / (ablated - clean)
            assert spliced[f"recovered_against_{ablation}"] == pytest.approx(expected, rel=1e-12)
            assert loss_row(metrics, layer, ablation)[f"recovered_against_{ablation}"] == 0


def explained(error: float, spread: float) -> Any:
    """The share of `spread` that leaves `error`, as near as float32 activations let it be known."""
    return pytest.approx(1 - error / spread, abs=SHARE * max(1.0, error / spread))


def test_reconstruction_agrees_with_a_loop_over_all_positions(pieces: Pieces, trained_run: Path, metrics: Json) -> None:
    acts, trained = all_acts(pieces), load_crosscoder(trained_run)
    features_NF = trained.encode(torch.from_numpy(acts).float())
    decoded = trained.decode(features_NF).double().numpy()
    mean, scale = acts.mean(0), trained.normalizer.scale_L.double().numpy()
    errors = ((acts - decoded) ** 2).sum((0, 2))
    spreads = ((acts - mean) ** 2).sum((0, 2))
    assert metrics["held_out"]["positions"] == len(acts)
    for index, layer in enumerate(LAYERS):
        found = reconstruction_row(metrics, layer, "crosscoder")
        assert found["explained_variance"] == explained(errors[index], spreads[index])
        assert reconstruction_row(metrics, layer, "mean")["explained_variance"] == pytest.approx(0, abs=1e-12)
    joint = explained(scale**2 @ errors, scale**2 @ spreads)
    assert reconstruction_row(metrics, "joint", "crosscoder")["explained_variance"] == joint
    taken = ((acts[:, 0] - acts[:, 1]) ** 2).sum()
    found = reconstruction_row(metrics, LAYERS[0], "other_layer", LAYERS[1])
    assert found["explained_variance"] == explained(taken, spreads[0])
    matched = mean[1] + (acts[:, 0] - mean[0]) * math.sqrt(spreads[1] / spreads[0])
    found = reconstruction_row(metrics, LAYERS[1], "other_layer_matched", LAYERS[0])
    assert found["explained_variance"] == explained(((acts[:, 1] - matched) ** 2).sum(), spreads[1])


def test_sparsity_agrees_with_a_loop_over_positions_and_groups(pieces: Pieces, tmp_path: Path) -> None:
    config = batch_topk_config(k=12)  # of 24 features: in some groups fewer than 12 a position are positive
    run = pieces.write_crosscoder(config, random_crosscoder(config), run="sparsity")
    trained, acts_NLD = load_crosscoder(run), torch.from_numpy(all_acts(pieces)).float()
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
    for layer in [*LAYERS, "all"]:
        loss = loss_row(found, layer, "crosscoder")
        assert loss["kl"] == pytest.approx(0, abs=2 * NATS)
        assert loss["difference"] == pytest.approx(0, abs=2 * NATS)
        assert loss["recovered_against_zero"] == pytest.approx(1, abs=2 * NATS / abs(loss_row(found, layer, "zero")["difference"]))
    assert found["sparsity"]["l0_as_trained"] is None


def nearly(row: Json, document: Json) -> Json:
    """The row with every number replaced by what is equal to it but for the rounding of float32."""
    near = dict(row)
    for key, value in row.items():
        if key.startswith("recovered_against_") and value is not None:
            damage = abs(loss_row(document, row["layer"], key.removeprefix("recovered_against_"))["difference"])
            near[key] = pytest.approx(value, abs=4 * NATS * (1 + abs(value)) / damage)
        elif key in ("cross_entropy", "difference", "kl"):
            near[key] = pytest.approx(value, abs=2 * NATS)
        elif isinstance(value, float):
            # A median is the middle of a bin a two-thousandth wide: rounding may move it into the next.
            near[key] = pytest.approx(
                value, rel=1e-3 if key == "median_error" else SHARE, abs=SHARE * max(1.0, row["fraction_unexplained"])
            )
    return near


def test_batches_do_not_change_the_metrics(pieces: Pieces, trained_run: Path, metrics: Json, tmp_path: Path) -> None:
    for batch_contexts in (1, 3, 100):
        found = evaluated(pieces, trained_run, tmp_path / str(batch_contexts), batch_contexts=batch_contexts)
        for table in ("reconstruction", "replaced"):
            for ours, theirs in zip(found[table], metrics[table], strict=True):
                assert ours == nearly(theirs, metrics)
        assert found["sparsity"] == metrics["sparsity"]
        assert found["held_out"] == metrics["held_out"]


def test_the_same_evaluation_gives_the_same_bytes(pieces: Pieces, trained_run: Path, tmp_path: Path) -> None:
    for run in ("one", "two"):
        evaluated(pieces, trained_run, tmp_path / run)
    for name in ("metrics.json", "features.safetensors", "feature_density.png", "explained_variance.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_all_layers_together_lose_what_the_last_one_loses(metrics: Json) -> None:
    for by in ("crosscoder", "mean", "zero"):
        together, last = loss_row(metrics, "all", by), loss_row(metrics, LAYERS[-1], by)
        assert together["cross_entropy"] == pytest.approx(last["cross_entropy"], abs=NATS)


def test_a_bfloat16_model_gives_nearly_the_same(pieces: Pieces, trained_run: Path, metrics: Json, tmp_path: Path) -> None:
    config = pieces.language_model_config().model_copy(update={"dtype": "bfloat16"})
    found = evaluated(pieces, trained_run, tmp_path, language_model=config)
    assert found["clean_cross_entropy"] == pytest.approx(metrics["clean_cross_entropy"], rel=0.02)
    ours, theirs = (reconstruction_row(document, "joint", "crosscoder") for document in (found, metrics))
    assert ours["explained_variance"] == pytest.approx(theirs["explained_variance"], abs=0.05)


# -- more and fewer layers --------------------------------------------------------------------------------------------------------


def test_other_layers_are_spliced_as_far_as_the_settings_say_and_reconstructed_in_all_pairs(pieces: Pieces, tmp_path: Path) -> None:
    layers = [f"transformer.h.{index}" for index in range(3)]
    config = CrosscoderConfig(num_features=24, activation_function=Relu())
    run = pieces.write_crosscoder(config, random_crosscoder(config, num_layers=3), run="three-layers", layers=layers)
    for distance, expected in ((1, 4), (2, 6)):
        found = evaluated(pieces, run, tmp_path / str(distance), other_layer_distance=distance)
        assert len([row for row in found["reconstruction"] if row["by"] == "other_layer"]) == 6
        spliced = [row for row in found["replaced"] if row["by"] == "other_layer_matched"]
        assert len(spliced) == expected
        assert all(abs(layers.index(row["layer"]) - layers.index(row["source"])) <= distance for row in spliced)


def test_a_crosscoder_of_one_layer_has_no_other_layer_to_beat(pieces: Pieces, tmp_path: Path) -> None:
    config = CrosscoderConfig(num_features=24, activation_function=Relu())
    run = pieces.write_crosscoder(config, random_crosscoder(config, num_layers=1), run="one-layer", layers=LAYERS[:1])
    found = evaluated(pieces, run, tmp_path)
    assert {row["by"] for row in found["replaced"]} == {"crosscoder", "mean", "zero"}
