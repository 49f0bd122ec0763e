"""The stage `import`: what it makes is taken by the stages that take a trained crosscoder, and settings that can't be are refused."""

import io
from pathlib import Path
from typing import Any

import evaluation_pieces
import pytest
import torch
from evaluation_pieces import LAYERS, Json, Pieces, evaluated, exact_crosscoder, reconstruction_row
from safetensors.torch import load_file, save_file

from pipeline.config import load
from pipeline.config.errors import UserError
from pipeline.config.import_crosscoder import ImportConfig
from pipeline.config.site_file import Site
from pipeline.crosscoder.checkpoint import load_crosscoder
from pipeline.exchange.export_crosscoder import export
from pipeline.run import Run
from pipeline.stages import import_crosscoder

pieces = evaluation_pieces.pieces


@pytest.fixture(scope="module")
def exported(pieces: Pieces) -> Path:
    """A crosscoder that gives its input back, in SAELens's files."""
    output = pieces.directory / "exported"
    export(pieces.write_crosscoder(*exact_crosscoder(), run="exact"), output, to="sae_lens")
    return output


def imported(pieces: Pieces, path: Path, directory: Path, layout: str = "sae_lens", **changes: Any) -> tuple[Json, str]:
    """The result of the stage, and what it said."""
    model = {"model": str(pieces.model_directory), "device": "cpu"}
    activations = {"kind": "stream", "tokens": str(pieces.training_tokens.directory), "language_model": model, "layers": LAYERS}
    activations |= {"context_tokens": 12, "contexts_per_generation": 8, "model_batch_contexts": 4, **changes.pop("activations", {})}
    values = {"stage": "import", "name": "x", "path": str(path), "layout": layout, "activations": activations, **changes}
    config = load.from_values(values, where="test", site=Site())
    assert isinstance(config, ImportConfig)
    output = io.StringIO()
    return import_crosscoder.run(config, Run(directory, stage="import", output=output)), output.getvalue()


def test_an_imported_crosscoder_is_evaluated_as_the_one_that_was_exported(pieces: Pieces, exported: Path, tmp_path: Path) -> None:
    result, said = imported(pieces, exported, tmp_path / "imported", positions=64)
    assert result["explained_variance"] == pytest.approx(1.0, abs=1e-9)
    assert (result["num_features"], result["positions"]) == (64, 64)
    assert "beware" not in said
    found = evaluated(pieces, tmp_path / "imported", tmp_path / "evaluation")
    expected = evaluated(pieces, pieces.directory / "exact", tmp_path / "expected")
    assert found["sparsity"]["l0"] == expected["sparsity"]["l0"]
    assert found["sparsity"]["dead"] == 0
    for layer in LAYERS:
        assert reconstruction_row(found, layer, "crosscoder")["explained_variance"] == pytest.approx(1.0, abs=1e-9)
    trained = load_crosscoder(tmp_path / "imported")
    assert trained.provenance.tokens_id == "", "what it was trained on is not known"
    assert trained.normalizer.mean_LD.abs().sum() > 0, "what stands in place of a layer that is masked"
    raw_BLD = torch.randn(50, 2, 16)
    assert torch.equal(trained.normalizer.normalize(raw_BLD), raw_BLD)


def test_weights_that_do_not_fit_are_told_by_what_they_explain(pieces: Pieces, exported: Path, tmp_path: Path) -> None:
    result, _ = imported(pieces, exported, tmp_path / "scaled", activation_scale=[0.001, 1000.0])
    assert result["explained_variance"] == pytest.approx(1.0, abs=1e-6), "a scale changes units alone where all is linear"
    result, said = imported(pieces, broken(exported, tmp_path), tmp_path / "little")
    assert result["explained_variance"] < 0.5
    assert "beware, that is little: were its layers named in another order" in said


def broken(exported: Path, directory: Path) -> Path:
    """The same with the encoder's rows moved by half a layer."""
    (directory / "broken").mkdir()
    tensors = load_file(exported / "crosscoder/sae_weights.safetensors")
    tensors["W_enc"] = tensors["W_enc"].roll(8, 0)
    save_file(tensors, directory / "broken/sae_weights.safetensors")
    (directory / "broken/cfg.json").write_bytes((exported / "crosscoder/cfg.json").read_bytes())
    return directory / "broken"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_scale": [2.0]}, "activation_scale has 1 factors for 2 layers; give one a layer"),
        ({"activations": {"layers": LAYERS[:1]}}, "reads activations of width 32, but those named have width 16; name its model"),
        ({"activations": {"layers": [*LAYERS, "transformer.h.1"]}}, "have length 32, which is not that of 3 layers side by side"),
        ({"layout": "dictionary_learning"}, r"holds none of model\.safetensors, ae\.pt"),
    ],
)
def test_settings_that_the_files_do_not_fit_are_named(
    changes: dict[str, Any], message: str, pieces: Pieces, exported: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        imported(pieces, exported, tmp_path, **changes)
