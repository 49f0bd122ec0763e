"""An evaluation of a crosscoder of two models: each model's own sites are replaced in its own run, and figures are given by model."""

import fnmatch
import io
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from evaluation_pieces import CONTEXT_TOKENS, D_MODEL, Json, Pieces, evaluated, loss_row, reconstruction_row
from slow_evaluation import NATS, SHARE
from tiny_models import tiny_gpt2

from pipeline.config.build_features import FeaturesConfig
from pipeline.config.crosscoder import CrosscoderConfig, Group, Normalization, Relu
from pipeline.config.errors import UserError
from pipeline.config.language_model import LanguageModelConfig
from pipeline.crosscoder.model import Crosscoder
from pipeline.evaluation.definitions import DEFINITIONS
from pipeline.features.logit_lens import LogitLens
from pipeline.language_model import LanguageModel
from pipeline.language_models import LanguageModels
from pipeline.run import Run
from pipeline.stages import build_features, evaluate_crosscoder
from slurm.record.comparison import flatten

SITES = {"base": ["transformer.h.0", "transformer.h.2"], "chat": ["transformer.h.2"]}
LAYERS = [f"{name}/{layer}" for name, layers in SITES.items() for layer in layers]
FEATURES = 12
"""Of each model's own."""
RAW = Normalization(center=False, scale="none")


def alone(name: str) -> tuple[CrosscoderConfig, Crosscoder]:
    """A random crosscoder of one of the models, on activations as they are."""
    config = CrosscoderConfig(num_features=FEATURES, activation_function=Relu(), normalization=RAW)
    crosscoder = Crosscoder(config, layers=SITES[name], d_model=D_MODEL, seed=list(SITES).index(name) + 1)
    with torch.no_grad():
        crosscoder.W_dec_FLD.mul_(3.0)
    return config, crosscoder


def side_by_side() -> tuple[CrosscoderConfig, Crosscoder]:
    """Both in one, each as a group of features that reads and writes the sites of its own model."""
    groups = [Group(features=FEATURES, reads=sites, writes=sites) for sites in (LAYERS[:2], LAYERS[2:])]
    config = CrosscoderConfig(num_features=2 * FEATURES, groups=groups, activation_function=Relu(), normalization=RAW)
    crosscoder = Crosscoder(config, layers=LAYERS, d_model=D_MODEL, seed=0)
    stored: Any = crosscoder.parameterization
    with torch.no_grad():
        for place, name in ((slice(0, 2), "base"), (slice(2, 3), "chat")):
            features = slice(0, FEATURES) if name == "base" else slice(FEATURES, 2 * FEATURES)
            own = alone(name)[1]
            stored.W_enc_LDF[place, :, features] = own.W_enc_LDF
            stored.W_dec_FLD[features, place] = own.W_dec_FLD
    return config, crosscoder


class Both:
    """The pieces of an evaluation, a second model, and what evaluations of one and of both give."""

    def __init__(self, root: Path) -> None:
        self.pieces = Pieces(root / "pieces")
        base = self.pieces.language_model_config()
        chat = LanguageModelConfig(model=str(tiny_gpt2(root / "chat", seed=1)), device="cpu")
        self.configs = {"base": base, "chat": chat}
        self.models = {"base": self.pieces.language_model, "chat": LanguageModel.load(chat)}
        hashes = {name: model.hash for name, model in self.models.items()}
        facts: dict[str, Any] = {"layers": LAYERS, "language_models": hashes, "language_model_hash": LanguageModels(self.models).hash}
        self.run = self.pieces.write_crosscoder(*side_by_side(), run="both", **facts)
        self.directory = root / "evaluation"
        self.metrics = evaluated(self.pieces, self.run, self.directory, **self.settings())
        self.of_one: dict[str, Json] = {}
        for name in SITES:
            run = self.pieces.write_crosscoder(*alone(name), run=name, layers=SITES[name], language_model_hash=hashes[name])
            self.of_one[name] = evaluated(
                self.pieces, run, root / name, language_model=self.configs[name], outlier_norm_ratio=None, spliced_baselines=1
            )

    def settings(self, **changes: Any) -> dict[str, Any]:
        settings = {"language_model": None, "language_models": self.configs, "outlier_norm_ratio": None, "spliced_baselines": 1}
        return settings | changes


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Both:
    return Both(tmp_path_factory.mktemp("both"))


@pytest.mark.parametrize("by", ["crosscoder", "mean", "zero"])
def test_a_site_of_one_model_costs_what_it_costs_where_that_model_is_evaluated_alone(both: Both, by: str) -> None:
    for name, sites in SITES.items():
        for site in sites:
            found, expected = (loss_row(*row, by) for row in ((both.metrics, f"{name}/{site}"), (both.of_one[name], site)))
            assert found["difference"] == pytest.approx(expected["difference"], abs=2 * NATS)
            assert found["kl"] == pytest.approx(expected["kl"], abs=2 * NATS)
            assert abs(expected["difference"]) > 5 * 2 * NATS, "a replacement that changes nothing would prove nothing"
    found, expected = (loss_row(*row, by) for row in ((both.metrics, "base/split"), (both.of_one["base"], "split")))
    assert found["difference"] == pytest.approx(expected["difference"], abs=2 * NATS)
    assert {row["layer"] for row in both.metrics["replaced"] if "split" in row["layer"]} == {"base/split"}


def test_reconstruction_of_a_site_is_that_of_its_model_alone(both: Both) -> None:
    for name, sites in SITES.items():
        for site in sites:
            found = reconstruction_row(both.metrics, f"{name}/{site}", "crosscoder")
            expected = reconstruction_row(both.of_one[name], site, "crosscoder")
            assert found["explained_variance"] == pytest.approx(expected["explained_variance"], abs=SHARE)
    assert both.metrics["sparsity"]["l0"] == pytest.approx(sum(one["sparsity"]["l0"] for one in both.of_one.values()), abs=0.02)


def test_cross_entropy_is_given_by_model(both: Both) -> None:
    clean = both.metrics["clean_cross_entropy_by_model"]
    assert clean == {name: pytest.approx(one["clean_cross_entropy"], abs=NATS) for name, one in both.of_one.items()}
    assert abs(clean["base"] - clean["chat"]) > 5 * NATS
    assert both.metrics["clean_cross_entropy"] == pytest.approx(sum(clean.values()) / 2, rel=1e-12)
    for name, sites in SITES.items():
        rows = [loss_row(both.metrics, f"{name}/{site}", "crosscoder")["difference"] for site in sites]
        assert loss_row(both.metrics, f"{name}/mean_over_layers", "crosscoder")["difference"] == pytest.approx(sum(rows) / len(rows))
    every = [loss_row(both.metrics, layer, "crosscoder")["difference"] for layer in LAYERS]
    assert loss_row(both.metrics, "mean_over_layers", "crosscoder")["difference"] == pytest.approx(sum(every) / 3)


def test_the_difference_of_the_models_is_measured_and_drawn(both: Both) -> None:
    rows = {row["name"]: row for row in both.metrics["model_diffing"]}
    living = sum(row["features"] for row in rows.values())
    assert set(rows) == {"only_base", "shared", "only_chat", "between"}
    assert rows["shared"]["features"] == rows["between"]["features"] == 0
    assert rows["only_base"]["models"] == ["base", "chat"]
    assert rows["only_base"]["sites"] == ["transformer.h.2"]
    columns = safetensors.torch.load_file(both.directory / "features.safetensors")
    fires_F = columns["firing_counts"] > 0
    assert living == int(fires_F.sum()) > 4
    assert columns["norm_difference.base-chat"].tolist() == [0.0] * FEATURES + [1.0] * FEATURES
    # No feature writes in both models, so what the foreign error holds of one is its share of x - x_hat there.
    nu_F = columns["nu_error.base-chat"][:FEATURES][fires_F[:FEATURES]]
    assert rows["only_base"]["nu_error"] == pytest.approx(float(nu_F.median()), rel=1e-12)
    assert (both.directory / "model_diffing.png").read_bytes().startswith(b"\x89PNG")
    assert not (both.directory.parent / "base/model_diffing.png").exists()
    assert "model_diffing" not in both.of_one["base"]


def test_the_terminal_says_what_the_models_share(both: Both, tmp_path: Path) -> None:
    output = io.StringIO()
    evaluate_crosscoder.run(both.pieces.config(both.run, **both.settings()), Run(tmp_path, output=output))
    rows = {row["name"]: row for row in both.metrics["model_diffing"]}
    living = sum(row["features"] for row in rows.values())
    alone = [
        f"{rows[f'only_{name}']['features']} in {name} alone ({rows[f'only_{name}']['absent']} absent from {other})"
        for name, other in (("base", "chat"), ("chat", "base"))
    ]
    said = " ".join(output.getvalue().split())
    assert f"0.0 % of {living} features write in both models alike, {', '.join(alone)}" in said
    assert "nats more than the models' own (mean of each)" in said
    assert ": 2 as the models are, " in said
    assert f"Model diffing, base to chat, of {living} features" in (tmp_path / "tables.txt").read_text()


def test_every_number_and_every_result_has_a_name_that_is_known(both: Both, tmp_path: Path) -> None:
    for key in ("model_diffing", "clean_cross_entropy_by_model"):
        assert key.removesuffix("_by_model") in DEFINITIONS
    assert {name for row in both.metrics["model_diffing"] for name, value in row.items() if isinstance(value, int | float)} <= set(
        DEFINITIONS
    )
    config = both.pieces.config(both.run, **both.settings())
    result = flatten(evaluate_crosscoder.run(config, Run(tmp_path, output=io.StringIO())))
    numbers = {name for name, value in result.items() if not isinstance(value, list)} - {"short_of_max_tokens"}
    assert {name for name in numbers if not any(fnmatch.fnmatchcase(name, known) for known in config.RESULT_NAMES)} == set()
    assert {"model_diffing.base-chat.only_chat_fraction", "cross_entropy_difference_by_model.chat"} <= numbers


def test_other_models_than_those_of_the_training_are_refused(both: Both, tmp_path: Path) -> None:
    hashes = {name: model.hash[:12] for name, model in both.models.items()}
    swapped = {"base": both.configs["chat"], "chat": both.configs["base"]}
    known = f"was trained on a language model, base, of hash {hashes['base']}, but language_models.base.model"
    one = {"language_model": both.configs["base"], "language_models": {}}
    for changes, sentence in (
        ({"language_models": swapped}, known),
        (one, "was trained on language_models called base, chat, but one language_model; name the model that it was trained on"),
    ):
        with pytest.raises(UserError, match=re.escape(sentence)):
            evaluated(both.pieces, both.run, tmp_path, **both.settings(**changes))


def test_the_feature_store_reads_both_models_and_each_decoder_through_its_own_unembedding(both: Both, tmp_path: Path) -> None:
    settings = {"name": "x", "crosscoder": both.run, "tokens": both.pieces.tokens.directory, "context_tokens": CONTEXT_TOKENS}
    config = FeaturesConfig(**settings, language_models=both.configs, promoted_tokens=3, outlier_norm_ratio=None)
    build_features.run(config, Run(tmp_path, output=io.StringIO()))
    rows = pq.read_table(tmp_path / "features/features.parquet").to_pylist()
    W_dec_FLD = side_by_side()[1].W_dec_FLD.detach()
    for layer, name in enumerate(("base", "base", "chat")):
        writes = slice(0, FEATURES) if name == "base" else slice(FEATURES, 2 * FEATURES)
        expected = LogitLens(both.models[name], 300).tokens(W_dec_FLD[writes, layer], 3)
        for row, ids in zip(rows[writes], expected.promoted_FK.tolist(), strict=True):
            assert row["promoted"][layer] == [{0: "<|endoftext|>"}.get(token, f"<{token}>") for token in ids]
    densities = [row["density"] for row in rows]
    assert sum(densities) == pytest.approx(both.metrics["sparsity"]["l0"], abs=0.02)
