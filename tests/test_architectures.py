"""The harness that takes models of many architectures through all stages by the command line, on some of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(900)]

ROOT = Path(__file__).parent.parent


def test_models_of_other_kinds_go_through_every_stage_or_are_refused_before_it(tmp_path: Path) -> None:
    kinds = ["Gemma 3 (text and pictures)", "Mamba", "BERT", "T5"]
    command = [sys.executable, "-m", "bench.architectures", "--json", str(tmp_path / "table.json"), "--only", *kinds]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "2"}, check=True, capture_output=True)
    rows = {row["architecture"]: row for row in json.loads((tmp_path / "table.json").read_text())["rows"]}
    assert list(rows) == kinds
    for kind in kinds[:2]:
        assert rows[kind]["stages"] == dict.fromkeys(("tokenize", "cache", "train", "evaluate"), "ok")
    for kind, sentence in {"BERT": "sees the future", "T5": "no causal language model"}.items():
        stages = rows[kind]["stages"]
        assert (stages["tokenize"], stages["train"], stages["evaluate"]) == ("ok", "-", "-")
        assert sentence in stages["cache"]
        assert "Traceback" not in stages["cache"]
