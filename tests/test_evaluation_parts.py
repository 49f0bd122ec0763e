"""What an evaluation measures of more and fewer layers, of parts of a crosscoder, and of other crosscoders beside it."""

from pathlib import Path

import evaluation_pieces
import pytest
import torch
from evaluation_pieces import (
    D_MODEL,
    LAYERS,
    Pieces,
    evaluated,
    loss_row,
    random_crosscoder,
    reconstruction_row,
)
from slow_evaluation import all_acts, nearly, slow_affine, slow_contexts

from pipeline.config.crosscoder import CrosscoderConfig, Group, Relu
from pipeline.crosscoder.checkpoint import load_crosscoder
from pipeline.crosscoder.model import Crosscoder

pieces, trained_run, metrics = evaluation_pieces.pieces, evaluation_pieces.trained_run, evaluation_pieces.metrics


@pytest.fixture(scope="module")
def three_layers(pieces: Pieces) -> Path:
    config = CrosscoderConfig(num_features=24, activation_function=Relu())
    layers = [f"transformer.h.{index}" for index in range(3)]
    return pieces.write_crosscoder(config, random_crosscoder(config, num_layers=3), run="three-layers", layers=layers)


def test_at_each_layer_the_affine_map_another_layer_and_the_best_of_the_rest_are_spliced(
    pieces: Pieces, three_layers: Path, tmp_path: Path
) -> None:
    kinds = {"affine", "affine_all", "other_layer", "other_layer_matched", "pca", "pca_joint", "random_dictionary"}
    for most in (1, 3, 9):
        found = evaluated(pieces, three_layers, tmp_path / str(most), spliced_baselines=most)
        for layer in found["layers"]:
            assert {row["by"] for row in found["reconstruction"] if row["layer"] == layer} == kinds | {"crosscoder", "mean", "zero"}
            spliced = [row for row in found["replaced"] if row["layer"] == layer and row["by"] in kinds]
            fitted = {row["by"]: row["fitted"] for row in found["baselines"]["rows"] if row["layer"] == layer}
            assert len(spliced) == min(most, len(kinds))
            expected = ["affine", max(("other_layer", "other_layer_matched"), key=lambda by, of=fitted: of[by])]  # type: ignore[misc]
            expected += sorted(kinds - set(expected), key=lambda by, of=fitted: -of[by])  # type: ignore[misc]
            assert {row["by"] for row in spliced} == set(expected[:most])
        # One as it is, three layers each with the crosscoder, mean, zeros and the baselines, four with the positions split.
        assert found["baselines"]["forward_passes"] == 1 + 3 * (3 + min(most, len(kinds))) + 4


def test_a_layer_is_taken_from_the_one_that_explains_most_of_it(pieces: Pieces, three_layers: Path, tmp_path: Path) -> None:
    found = evaluated(pieces, three_layers, tmp_path)
    rows = [
        pieces.language_model.activations(torch.tensor([ids]), found["layers"])[0, 1:] for ids, _ in slow_contexts(pieces.training_tokens)
    ]
    fitted = torch.cat(rows).double().numpy()
    for to, layer in enumerate(found["layers"]):
        left = {}
        for source in {0, 1, 2} - {to}:
            mapped = slow_affine(fitted[:, to], fitted[:, source])(fitted[:, source])
            left[source] = ((fitted[:, to] - mapped) ** 2).sum() / ((fitted[:, to] - fitted[:, to].mean(0)) ** 2).sum()
        best = min(left, key=left.__getitem__)
        (row,) = [row for row in found["baselines"]["rows"] if (row["layer"], row["by"]) == (layer, "affine")]
        assert row["source"] == found["layers"][best]
        assert row["fitted"] == pytest.approx(1 - left[best], rel=1e-5)
        (of_all,) = [row for row in found["baselines"]["rows"] if (row["layer"], row["by"]) == (layer, "affine_all")]
        assert of_all["fitted"] > row["fitted"]


def test_a_crosscoder_of_one_layer_has_no_other_layer_and_no_split(pieces: Pieces, tmp_path: Path) -> None:
    config = CrosscoderConfig(num_features=24, activation_function=Relu())
    run = pieces.write_crosscoder(config, random_crosscoder(config, num_layers=1), run="one-layer", layers=LAYERS[:1])
    found = evaluated(pieces, run, tmp_path)
    assert {row["by"] for row in found["replaced"]} == {"crosscoder", "mean", "zero", "pca", "random_dictionary"}
    assert {row["layer"] for row in found["replaced"]} == {LAYERS[0], "mean_over_layers"}
    assert found["driving"]["layers_driving"] == 1
    assert found["driving"]["functional_coherence"] is None


# -- parts of a crosscoder, and other crosscoders ----------------------------------------------------------------------------------


def test_a_layer_that_no_feature_writes_is_read_and_not_measured(pieces: Pieces, tmp_path: Path) -> None:
    config = CrosscoderConfig(
        num_features=24, activation_function=Relu(), groups=[Group(features=24, reads=[LAYERS[0]], writes=[LAYERS[1]])]
    )
    crosscoder = Crosscoder(config, layers=LAYERS, d_model=D_MODEL, seed=0)
    found = evaluated(pieces, pieces.write_crosscoder(config, crosscoder, run="transcoder"), tmp_path)
    assert {row["layer"] for row in found["reconstruction"]} == {LAYERS[1], "joint", "mean_over_layers"}
    assert {row["layer"] for row in found["replaced"]} == {LAYERS[1], "mean_over_layers"}
    assert reconstruction_row(found, LAYERS[1], "affine", LAYERS[0])["explained_variance"] > 0
    assert [row["drop"] for row in found["driving"]["by_layer"]] == [pytest.approx(found["driving"]["by_layer"][0]["drop"]), 0]
    assert found["driving"]["layers_driving"] == pytest.approx(1)


def test_the_dense_path_alone_has_a_row_of_its_own(pieces: Pieces, tmp_path: Path) -> None:
    config = CrosscoderConfig(num_features=24, activation_function=Relu(), dense_rank=3)
    crosscoder = random_crosscoder(config)
    assert crosscoder.dense is not None
    with torch.no_grad():
        crosscoder.dense.write_RC.copy_(crosscoder.dense.read_CR.T * 4)
    run = pieces.write_crosscoder(config, crosscoder, run="dense")
    found, trained, acts = evaluated(pieces, run, tmp_path), load_crosscoder(run), all_acts(pieces, pieces.tokens)
    raw_NLD = torch.from_numpy(acts).float()
    errors = ((acts - trained.decode(torch.zeros(len(acts), 24), raw_NLD).double().numpy()) ** 2).sum((0, 2))
    spreads = ((acts - acts.mean(0)) ** 2).sum((0, 2))
    for index, layer in enumerate(LAYERS):
        row = reconstruction_row(found, layer, "dense_path")
        assert row["explained_variance"] == pytest.approx(1 - errors[index] / spreads[index], rel=1e-5, abs=1e-6)
        assert row["explained_variance"] != reconstruction_row(found, layer, "crosscoder")["explained_variance"]
    assert not [row for row in found["replaced"] if row["by"] == "dense_path"]


def test_a_compared_crosscoder_has_the_rows_that_its_own_evaluation_gives(pieces: Pieces, trained_run: Path, tmp_path: Path) -> None:
    config = CrosscoderConfig(num_features=40, activation_function=Relu())
    layers = {"last": [LAYERS[1]], "beyond": [LAYERS[0], "transformer.h.1"], "both": LAYERS}
    runs = {}
    for name, names in layers.items():
        runs[name] = pieces.write_crosscoder(config, random_crosscoder(config, len(names)), run=f"{name}/id", layers=names)
    found = evaluated(pieces, trained_run, tmp_path / "all", compare_with=list(runs.values()))
    for name, names in layers.items():
        alone = evaluated(pieces, runs[name], tmp_path / name)
        for layer in set(names) & set(LAYERS):
            named = {"by": "compared", "source": name}
            row, expected = reconstruction_row(found, layer, "compared", name), reconstruction_row(alone, layer, "crosscoder")
            assert row == nearly(expected, alone) | named
            row, expected = loss_row(found, layer, "compared", name), loss_row(alone, layer, "crosscoder")
            assert row == nearly(expected, alone) | named
        (entry,) = [entry for entry in found["compared"] if entry["source"] == name]
        assert entry["l0"] == alone["sparsity"]["l0"]
    assert loss_row(found, "mean_over_layers", "compared", "both")
    assert not [row for row in found["replaced"] if (row["layer"], row["source"]) == ("mean_over_layers", "last")]
