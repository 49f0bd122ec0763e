"""The notebook in docs/ runs from its first cell to its last, on a crosscoder as small as can be."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_token_set

from pipeline import records
from pipeline.config import load
from pipeline.config.site_file import Site
from pipeline.run import Run
from pipeline.stages import build_features, train_crosscoder

NOTEBOOK = Path(__file__).resolve().parent.parent / "docs" / "in-python.ipynb"
MODEL = {"model": "demo", "device": "cpu"}
LAYERS = ["transformer.h.2", "transformer.h.3"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root of runs with `train/demo` and `features/demo`."""
    root = tmp_path_factory.mktemp("notebook")
    tiny_token_set(root / "tokens")
    reading = {"tokens": str(root / "tokens"), "language_model": {**MODEL, "check_tokenizer": False}, "context_tokens": 32}
    stages: dict[str, tuple[Any, dict[str, Any]]] = {
        "train": (
            train_crosscoder,
            {
                "activations": {"kind": "stream", **reading, "layers": LAYERS},
                "crosscoder": {"num_features": 64, "activation_function": {"kind": "batch_topk", "k": 4}},
                "loss": {},
                "num_tokens": 600,
                "batch_positions": 100,
                "device": "cpu",
            },
        ),
        "features": (build_features, {**reading, "crosscoder": str(root / "runs/train/demo/1"), "max_tokens": 500}),
    }
    for stage, (program, values) in stages.items():
        directory = root / "runs" / stage / "demo" / "1"
        config = load.from_values({"stage": stage, "name": "demo", **values}, where=f"{stage}.yaml", site=Site())
        program.run(config, Run(directory, stage=stage, output=io.StringIO()))
        records.write_json(directory / "result.json", {"status": "finished"})
    return root / "runs"


def test_the_notebook_runs(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CROSSCODER_RUNS", str(runs))
    cells = ["".join(cell["source"]) for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    names: dict[str, Any] = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for cell in cells:
            exec(compile(cell, str(NOTEBOOK), "exec"), names)
    assert "64 features over transformer.h.2 and transformer.h.3, 600 training tokens" in printed.getvalue()
    assert printed.getvalue().count("nats of KL a token") == 3
