"""Exports read by the real libraries, in an interpreter that has them; left out where there is none.

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

from pipeline.crosscoder.checkpoint import load_crosscoder
from pipeline.exchange.export_crosscoder import export

INTERPRETER = os.environ.get("PYTEST_THEIR_LIBRARIES")
READER = Path(__file__).parent / "read_in_their_libraries.py"
CASES = [("dictionary_learning", kind) for kind in KINDS if kind not in ("dense", "gated")] + [("sae_lens", kind) for kind in KINDS]

pytestmark = pytest.mark.skipif(
    INTERPRETER is None, reason="PYTEST_THEIR_LIBRARIES names no interpreter with sae-lens and dictionary_learning"
)


@pytest.mark.parametrize(("layout", "kind"), CASES)
def test_a_library_finds_the_features_and_reconstructions_of_the_crosscoder(layout: str, kind: str, tmp_path: Path) -> None:
    run, acts_NLD = write_run(tmp_path / "run", kind), activations(3000)
    export(run, tmp_path / "out", to=layout)
    save_file({"acts": acts_NLD}, tmp_path / "acts.safetensors")
    files = [str(tmp_path / name) for name in ("out", "acts.safetensors", "found.safetensors")]
    done = subprocess.run([str(INTERPRETER), str(READER), layout, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found, trained = load_file(tmp_path / "found.safetensors"), load_crosscoder(run)
    features_NF = trained.encode(acts_NLD)
    x_NLD = trained.decode(features_NF, acts_NLD)
    assert (features_NF > 0).sum() > 30_000
    assert int(((found["features"] > 0) != (features_NF > 0)).sum()) == 0
    # Float32 weights multiply numbers of up to 100, 12 at a time, here and there in another order.
    torch.testing.assert_close(found["features"], features_NF, rtol=0, atol=2e-6 * features_NF.max().item())
    assert (found["x"] - x_NLD).norm() < 1e-6 * x_NLD.norm()
