"""Exports read by the real libraries, and what those saved imported, in an interpreter that has them; left out where there is none.

To run it: a virtual environment with torch, and in it
    pip install sae-lens git+https://github.com/science-of-finetuning/dictionary_learning
then `PYTEST_THEIR_LIBRARIES=path/to/venv/bin/python pytest tests/test_their_libraries.py`.
"""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from exported_crosscoders import KINDS, activations, write_run
from safetensors.torch import load_file, save_file
from toy_activations import LAYERS

from pipeline.crosscoder.checkpoint import load_crosscoder
from pipeline.exchange.export_crosscoder import export
from pipeline.exchange.imported import crosscoder_of
from pipeline.stages.import_crosscoder import READERS

INTERPRETER = os.environ.get("PYTEST_THEIR_LIBRARIES")
READER = Path(__file__).parent / "read_in_their_libraries.py"
CASES = [("dictionary_learning", kind) for kind in KINDS if kind not in ("dense", "gated")] + [("sae_lens", kind) for kind in KINDS]

pytestmark = pytest.mark.skipif(
    INTERPRETER is None, reason="PYTEST_THEIR_LIBRARIES names no interpreter with sae-lens and dictionary_learning"
)


def by_their_library(what: str, directory: Path, acts_NLD: torch.Tensor) -> dict[str, torch.Tensor]:
    """`features` and `x`, as the real library computes them."""
    save_file({"acts": acts_NLD}, directory.parent / "acts.safetensors")
    files = [str(directory), *(str(directory.parent / name) for name in ("acts.safetensors", "found.safetensors"))]
    done = subprocess.run([str(INTERPRETER), str(READER), what, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return load_file(directory.parent / "found.safetensors")


MADE = [("dictionary_learning", kind) for kind in ("relu", "batch_topk", "normalizing relu", "normalizing batch_topk")]
MADE += [("sae_lens", kind) for kind in ("standard", "jumprelu")]


@pytest.mark.parametrize(("layout", "kind"), MADE)
def test_what_a_library_saved_is_imported_as_what_it_computes(layout: str, kind: str, tmp_path: Path) -> None:
    acts_NLD = activations(3000)
    found = by_their_library(f"made:{kind}", tmp_path / "out", acts_NLD)
    for path in (tmp_path / "out", *(tmp_path / "out").glob("weights.pt")):
        _, crosscoder = crosscoder_of(READERS[layout](path, 2).folded, LAYERS)
        with torch.no_grad():
            features_NF = crosscoder.encode(acts_NLD)
            x_NLD = crosscoder.decode(features_NF)
        assert 1000 < (features_NF > 0).sum() < 0.9 * features_NF.numel()
        assert int(((found["features"] > 0) != (features_NF > 0)).sum()) == 0
        torch.testing.assert_close(features_NF, found["features"], rtol=0, atol=2e-6 * features_NF.max().item())
        assert (found["x"] - x_NLD).norm() < 1e-6 * x_NLD.norm()


@pytest.mark.parametrize(("layout", "kind"), CASES)
def test_a_library_finds_the_features_and_reconstructions_of_the_crosscoder(layout: str, kind: str, tmp_path: Path) -> None:
    run, acts_NLD = write_run(tmp_path / "run", kind), activations(3000)
    export(run, tmp_path / "out", to=layout)
    found, trained = by_their_library(layout, tmp_path / "out", acts_NLD), load_crosscoder(run)
    features_NF = trained.encode(acts_NLD)
    x_NLD = trained.decode(features_NF, acts_NLD)
    assert (features_NF > 0).sum() > 30_000
    assert int(((found["features"] > 0) != (features_NF > 0)).sum()) == 0
    # Float32 weights multiply numbers of up to 100, 12 at a time, here and there in another order.
    torch.testing.assert_close(found["features"], features_NF, rtol=0, atol=2e-6 * features_NF.max().item())
    assert (found["x"] - x_NLD).norm() < 1e-6 * x_NLD.norm()
