"""The configurations of model diffing train on two models, go on to the bit where they were stopped, and are evaluated."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from shipped import ROOT
from tiny_models import tiny_gpt2, tiny_token_set
from transformers import GPT2LMHeadModel

from pipeline import records
from pipeline.config import load
from pipeline.config.site_file import Site
from pipeline.crosscoder.checkpoint import load_crosscoder
from pipeline.run import Run, Stopped
from pipeline.stages import cache_activations, evaluate_crosscoder, train_crosscoder

SMALL = {
    "crosscoder.num_features": 32,
    "crosscoder.activation_function.k": 4,
    "held_out.positions": 64,
    "num_tokens": 1200,
    "batch_positions": 100,
    "dead_window_tokens": 400,
    "log_every_steps": 3,
    "device": "cpu",
}


class StopsItself(Run):
    """Asks itself to stop at the third report of training."""

    left = 3

    def report(self, phase: str, *arguments: Any, **keywords: Any) -> None:
        super().report(phase, *arguments, **keywords)
        self.left -= phase == "train"
        if self.left == 0:
            self.request_stop("test")


def changes(site: Site, values: dict[str, Any], prefix: str = "") -> list[str]:
    models = f"{prefix}language_models"
    base = {f"{models}.base.model": site.data.parent / "base", f"{models}.base.device": "cpu", f"{models}.chat.device": "cpu"}
    return [f"{key}={value}" for key, value in {**values, **base}.items()]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """What the configurations read, tiny: the chat model is the base model with another MLP in its second block."""
    root = tmp_path_factory.mktemp("site")
    base = tiny_gpt2(root / "base", num_layers=4)
    model = GPT2LMHeadModel.from_pretrained(base)
    with torch.no_grad():
        model.transformer.h[1].mlp.c_proj.weight.neg_()
    model.save_pretrained(root / "data/models/answers")
    tiny_token_set(root / "data/tokens/diffing/train", num_documents=60)
    tiny_token_set(root / "data/tokens/diffing/validation", num_documents=20, seed=5)
    found = Site(data=root / "data", ssd=root / "ssd", runs=root / "runs")
    small = {"context_tokens": 16, "contexts_per_generation": 32}
    config: Any = load.load(ROOT / "configs/diffing/cache.yaml", changes(found, small), found)
    cache_activations.run(config, Run(root / "cache", output=io.StringIO()))
    return found


@pytest.mark.parametrize("path", ["configs/diffing/train.yaml", "configs/groups/diffing.yaml"])
def test_a_configuration_of_two_models_resumes_to_the_bit_and_says_how_they_differ(path: str, site: Site, tmp_path: Path) -> None:
    small: dict[str, Any] = dict(SMALL)
    if "groups" in path:
        sites = [f"[{name}/transformer.h.3]" for name in ("base", "chat")]
        groups = [f"{{features: 8, reads: {at}, writes: {at}}}" for at in sites]
        small["crosscoder.groups"] = f"[{{features: 16, cost: 0.8}}, {', '.join(groups)}]"
    config: Any = load.load(ROOT / path, changes(site, small, "held_out."), site)
    with pytest.raises(Stopped):
        train_crosscoder.run(config, StopsItself(tmp_path / "stopped", stage="train", output=io.StringIO()))
    for name in ("stopped", "whole"):
        train_crosscoder.run(config, Run(tmp_path / name, stage="train", output=io.StringIO()))
    stopped, whole = (max((tmp_path / name / "checkpoints").iterdir()) for name in ("stopped", "whole"))
    assert {file.name: file.read_bytes() for file in stopped.iterdir()} == {file.name: file.read_bytes() for file in whole.iterdir()}
    assert load_crosscoder(whole).layers == ["base/transformer.h.3", "chat/transformer.h.3"]

    evaluated = {"crosscoder": whole, "context_tokens": 16, "max_tokens": 400, "fit_tokens": 200}
    settings: Any = load.load(ROOT / "configs/diffing/evaluate.yaml", changes(site, evaluated), site)
    evaluate_crosscoder.run(settings, Run(tmp_path / "evaluation", output=io.StringIO()))
    metrics = records.read_json(tmp_path / "evaluation/metrics.json")
    rows = {row["name"]: row["features"] for row in metrics["model_diffing"]}
    assert sum(rows.values()) > 0
    if "groups" in path:
        assert min(rows["only_base"], rows["only_chat"]) > 0
    clean = metrics["clean_cross_entropy_by_model"]
    assert clean["base"] != clean["chat"]
    assert (tmp_path / "evaluation/model_diffing.png").exists()
