"""Several language models over the same tokens: sites of both in one tensor, cached, streamed and trained on."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_gpt2, tiny_token_set

from pipeline import records
from pipeline.activations.opening import open_source
from pipeline.activations.shards import ActivationSet
from pipeline.activations.source import Provenance
from pipeline.config.activation_source import StreamedActivations
from pipeline.config.cache_activations import CacheConfig
from pipeline.config.errors import UserError
from pipeline.config.language_model import LanguageModelConfig
from pipeline.config.pretrained import at_commits, pretrained_in
from pipeline.config.schema import build
from pipeline.config.train_crosscoder import TrainConfig
from pipeline.crosscoder.checkpoint import load_crosscoder
from pipeline.language_model import LanguageModel
from pipeline.language_models import LanguageModels, load_models
from pipeline.run import Run, Stopped
from pipeline.stages import cache_activations, train_crosscoder

CPU = torch.device("cpu")
LAYERS = ["chat/transformer.h.1", "base/transformer.h.0", "chat/transformer.h.0.mlp_output"]
TOKENS = torch.arange(1, 25).reshape(3, 8)


class Inputs:
    """A token set and two models, and settings that read them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        tiny_token_set(root / "tokens", num_documents=40)
        tiny_token_set(root / "validation", num_documents=30, seed=5)
        self.paths = {"base": tiny_gpt2(root / "base"), "chat": tiny_gpt2(root / "chat", seed=1)}
        self.models = {name: {"model": str(path), "device": "cpu"} for name, path in self.paths.items()}

    def harvest(self, **changes: Any) -> dict[str, Any]:
        sizes = {"context_tokens": 16, "contexts_per_generation": 24, "model_batch_contexts": 8}
        return {"tokens": str(self.root / "tokens"), "language_models": self.models, "layers": LAYERS, **sizes, **changes}

    def cached(self, directory: Path, **changes: Any) -> ActivationSet:
        values = {"stage": "cache", "name": "x", "output": str(directory / "set"), **self.harvest(**changes)}
        cache_activations.run(build(CacheConfig, values, "cache.yaml"), Run(directory / "run", stage="cache"))
        return ActivationSet.open(directory / "set", CPU)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return Inputs(tmp_path_factory.mktemp("inputs"))


def loaded(path: Path, **changes: Any) -> LanguageModel:
    return LanguageModel.load(LanguageModelConfig(model=str(path), device="cpu", **changes))


def whole(source: Any) -> Any:
    return next(iter(source.batches(batch_positions=source.num_positions, epoch=0, cursor=0)))


def test_each_site_is_read_from_its_own_model(inputs: Inputs) -> None:
    models = LanguageModels({name: loaded(path) for name, path in inputs.paths.items()})
    models.check_use(LAYERS, 16)
    found_BSLD = models.activations(TOKENS, LAYERS)
    base, chat = models.by_name.values()
    for index, (model, layer) in enumerate([(chat, "transformer.h.1"), (base, "transformer.h.0"), (chat, "transformer.h.0.mlp_output")]):
        assert found_BSLD[:, :, index].equal(model.activations(TOKENS, [layer])[:, :, 0])
    swapped = LanguageModels({"base": chat, "chat": base})
    assert len({models.hash, swapped.hash, base.hash, chat.hash}) == 4


def test_models_that_do_not_go_together_are_refused(inputs: Inputs, tmp_path: Path) -> None:
    base = loaded(inputs.paths["base"])
    wide, more = loaded(tiny_gpt2(tmp_path / "wide", d_model=32)), loaded(tiny_gpt2(tmp_path / "more", vocab_size=302))
    with pytest.raises(UserError, match=re.escape("language_models have width 16 (base), 32 (chat), but sites of a crosscoder have one")):
        LanguageModels({"base": base, "chat": wide})
    with pytest.raises(UserError, match=re.escape("language_models have numbers of embeddings 300 (base), 302 (chat), but all read")):
        LanguageModels({"base": base, "chat": more})
    models = LanguageModels({"base": base, "chat": more}, check_tokenizer=False)
    with pytest.raises(UserError, match=r"instruct/transformer\.h\.0 is a site of none of the models base, chat"):
        models.check_use(["base/transformer.h.0", "instruct/transformer.h.0"], 16)
    with pytest.raises(UserError, match=re.escape("layers[1] is chat/transformer.h.3, but")):
        models.check_use(["base/transformer.h.0", "chat/transformer.h.3"], 16)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"layers": ["transformer.h.0"]}, "layers[0] is transformer.h.0, which is of no model, but language_models are base, chat"),
        ({"layers": ["base/h.0", "it/h.0"]}, "layers[1] is it/h.0, which is of the model it, but language_models are base, chat"),
        ({"layers": ["base/h.0"]}, "language_models.chat has no site in layers; add one, chat/..., or leave the model out"),
        ({"language_model": {"model": "demo"}}, "language_model and language_models are both given"),
        ({"language_models": {}}, "language_model is missing: name the model that is read, or several"),
        ({"language_models": {"a": {"model": "m"}, "b": {"model": "m", "dtype": "bfloat16"}}}, "dtype of language_models is float32 for a"),
        ({"language_models": {"a": {"modle": "m"}}}, "language_models.a.modle is not a setting; did you mean `model`?"),
        ({"language_models": {"a": {"model": 3, "dtype": "f32"}}}, 'language_models.a.dtype is "f32", expected'),
    ],
)
def test_settings_that_contradict_each_other_are_refused(inputs: Inputs, changes: dict[str, Any], sentence: str) -> None:
    values = {"stage": "cache", "name": "x", "output": "/out", **inputs.harvest(**changes)}
    with pytest.raises(UserError, match=re.escape(sentence)):
        build(CacheConfig, values, "cache.yaml")


def test_a_single_model_has_no_name_in_its_sites(inputs: Inputs) -> None:
    values = inputs.harvest(language_model={"model": "demo"}, language_models={}, kind="stream")
    with pytest.raises(UserError, match=re.escape("of the model chat, but there is one language_model, without a name; name one of them")):
        build(StreamedActivations, values, "x.yaml")
    config = build(StreamedActivations, values | {"layers": ["transformer.h.1"]}, "x.yaml")
    assert "language_models" not in config.identity()


def test_each_model_is_bound_to_its_own_commit(inputs: Inputs) -> None:
    config = build(StreamedActivations, inputs.harvest(kind="stream"), "x.yaml")
    bound = pretrained_in(at_commits(config, {"language_models.chat": "a39f"}))
    assert {field: model.revision for field, model in bound.items()} == {"language_models.base": None, "language_models.chat": "a39f"}
    assert at_commits(config, {}) == config


def test_disk_and_stream_give_the_rows_that_each_model_gives_alone(inputs: Inputs, tmp_path: Path) -> None:
    both = inputs.cached(tmp_path / "both")
    stream = open_source(build(StreamedActivations, inputs.harvest(kind="stream"), "x.yaml"), Run(tmp_path / "stream"), CPU)
    for found, expected in zip(whole(stream), whole(both), strict=True):
        assert found.equal(expected)
    for name, at_L in (("chat", [0, 2]), ("base", [1])):
        layers = [LAYERS[index].partition("/")[2] for index in at_L]
        alone = inputs.cached(tmp_path / name, language_models={}, language_model=inputs.models[name], layers=layers)
        assert whole(alone).acts_BLD.equal(whole(both).acts_BLD[:, at_L])
        assert whole(alone).tokens_B.equal(whole(both).tokens_B)
        assert alone.provenance.language_models is None
        assert "language_models" not in records.read_manifest(tmp_path / name / "set")
    assert both.provenance.language_models == {name: loaded(path).hash for name, path in inputs.paths.items()}
    assert stream.provenance == both.provenance == Provenance.from_facts(both.provenance.facts())


class StopsItself(Run):
    """Asks itself to stop at the third report of training."""

    left = 3

    def report(self, phase: str, *arguments: Any, **keywords: Any) -> None:
        super().report(phase, *arguments, **keywords)
        self.left -= phase == "train"
        if self.left == 0:
            self.request_stop("test")


def train_config(activations: dict[str, Any], **changes: Any) -> TrainConfig:
    groups = [
        {"features": 24, "cost": 0.8},
        {"features": 8, "reads": LAYERS[1:2], "writes": LAYERS[1:2]},
        {"features": 8, "reads": [{"model": "chat", "layer": "transformer.h.1"}], "writes": LAYERS[:1]},
    ]
    crosscoder = {"num_features": 40, "groups": groups, "activation_function": {"kind": "batch_topk", "k": 4}}
    course = {"epochs": 2, "batch_positions": 100, "dead_window_tokens": 300, "log_every_steps": 5, "device": "cpu"}
    values = {"stage": "train", "name": "x", "activations": activations, "crosscoder": crosscoder, "loss": {}, **course, **changes}
    return build(TrainConfig, values, "train.yaml")


@pytest.mark.parametrize("kind", ["disk", "stream"])
def test_a_crosscoder_of_two_models_is_trained_and_resumes_to_the_bit(inputs: Inputs, tmp_path: Path, kind: str) -> None:
    held_out: dict[str, Any] = {"tokens": str(inputs.root / "validation"), "positions": 64}
    activations = inputs.harvest(kind="stream")
    if kind == "disk":
        activations = {"kind": "disk", "path": str(inputs.cached(tmp_path).directory)}
        held_out["language_models"] = inputs.models
    config = train_config(activations, held_out=held_out)
    with pytest.raises(Stopped):
        train_crosscoder.run(config, StopsItself(tmp_path / "stopped", stage="train"))
    for name in ("stopped", "whole"):
        train_crosscoder.run(config, Run(tmp_path / name, stage="train"))
    stopped, through = (max((tmp_path / name / "checkpoints").iterdir()) for name in ("stopped", "whole"))
    assert {path.name: path.read_bytes() for path in stopped.iterdir()} == {path.name: path.read_bytes() for path in through.iterdir()}
    trained = load_crosscoder(through)
    assert trained.layers == LAYERS
    bound = records.read_json(tmp_path / "whole/inputs.json")
    assert trained.provenance.language_models == {name: bound[f"language_models.{name}"]["data_id"] for name in inputs.paths}
    norms_FL = trained.crosscoder.weights().W_dec_FLD.norm(dim=-1)
    assert not norms_FL[24:32, [0, 2]].any()
    assert not norms_FL[32:, [1, 2]].any()
    assert norms_FL[:24].all()


def test_held_out_positions_of_other_models_are_refused(inputs: Inputs, tmp_path: Path) -> None:
    activations = {"kind": "disk", "path": str(inputs.cached(tmp_path).directory)}
    held_out = {"tokens": str(inputs.root / "validation"), "positions": 64}
    swapped = {"base": inputs.models["chat"], "chat": inputs.models["base"]}
    for models, sentence in (
        ({"language_models": swapped}, f"held_out: language_models.base.model {inputs.paths['chat']} has"),
        (
            {"language_model": inputs.models["base"]},
            "held_out: one language_model, but the activations are of language_models called base, chat",
        ),
    ):
        config = train_config(activations, held_out=held_out | models)
        with pytest.raises(UserError, match=re.escape(sentence)):
            train_crosscoder.run(config, Run(tmp_path / "refused", stage="train"))
    single = build(StreamedActivations, inputs.harvest(kind="stream"), "x.yaml")
    assert load_models(single, "cpu").hash == records.read_manifest(tmp_path / "set")["language_model_hash"]
