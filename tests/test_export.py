"""Exported crosscoders: what stands in each library's files computes what the crosscoder does, or is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.numpy
import yaml
from exported_crosscoders import KINDS, NUM_FEATURES, activations, write_run
from toy_activations import LAYERS

from pipeline import records
from pipeline.config.errors import UserError
from pipeline.crosscoder.checkpoint import load_crosscoder
from pipeline.crosscoder.model import Crosscoder
from pipeline.exchange.export_crosscoder import export

Array = npt.NDArray[Any]
ONE_THRESHOLD = {"batch_topk_by_activation"}
NO_THRESHOLD = {"relu"}


def expected(run: Path) -> tuple[Array, Array, Array]:
    """Activations, features and reconstructions of the crosscoder itself."""
    trained, acts_NLD = load_crosscoder(run), activations()
    features_NF = trained.encode(acts_NLD)
    return acts_NLD.double().numpy(), features_NF.numpy(), trained.decode(features_NF, acts_NLD).numpy()


def check_same(found: tuple[Array, Array], features_NF: Array, x_NLD: Array) -> None:
    """Float32 weights multiply numbers of up to 100, 12 at a time: an error of a few 1e-7 of the largest of them."""
    fires_NF = features_NF > 0
    assert 1000 < fires_NF.sum() < 0.9 * fires_NF.size
    assert np.array_equal(found[0] > 0, fires_NF)
    np.testing.assert_allclose(found[0], features_NF, rtol=0, atol=2e-6 * features_NF.max())
    assert np.linalg.norm(found[1] - x_NLD) < 1e-6 * np.linalg.norm(x_NLD)


def by_dictionary_learning(directory: Path, acts_NLD: Array) -> tuple[Array, Array]:
    """What its CrossCoder and BatchTopKCrossCoder compute, a feature and a layer at a time, in units of this project."""
    config = json.loads((directory / "config.json").read_text())
    t = {name: tensor.astype(np.float64) for name, tensor in safetensors.numpy.load_file(directory / "model.safetensors").items()}
    num_layers, num_features = config["num_layers"], config["dict_size"]
    features_NF = np.empty((len(acts_NLD), num_features))
    for f in range(num_features):
        value_N = sum(acts_NLD[:, layer] @ t["encoder.weight"][layer, :, f] for layer in range(num_layers)) + t["encoder.bias"][f]
        features_NF[:, f] = np.where(value_N > t.get("threshold", 0.0), value_N, 0.0)
    x_NLD = np.stack([features_NF @ t["decoder.weight"][layer] + t["decoder.bias"][layer] for layer in range(num_layers)], axis=1)
    return features_NF / t.get("feature_scale", np.ones(num_features)), x_NLD


def by_plain_tensors(directory: Path, acts_NLD: Array) -> tuple[Array, Array]:
    t = {name: tensor.astype(np.float64) for name, tensor in safetensors.numpy.load_file(directory / "crosscoder.safetensors").items()}
    value_NF = np.einsum("nld,ldf->nf", acts_NLD, t["W_enc"]) + t["b_enc"]
    features_NF = np.where(value_NF > t["threshold"], value_NF, 0.0)
    x_NLD = np.einsum("nf,fld->nld", features_NF, t["W_dec"]) + t["b_dec"]
    if "dense_read" in t:
        x_NLD += (acts_NLD.reshape(len(acts_NLD), -1) @ t["dense_read"] @ t["dense_write"]).reshape(x_NLD.shape)
    return features_NF, x_NLD


def by_sae_lens(directory: Path, acts_NLD: Array) -> tuple[Array, Array]:
    """What its autoencoders and transcoders compute of vectors that are the layers one after another."""
    config = json.loads((directory / "crosscoder/cfg.json").read_text())
    weights = safetensors.numpy.load_file(directory / "crosscoder/sae_weights.safetensors")
    t = {name: tensor.astype(np.float64) for name, tensor in weights.items()}
    assert ("jumprelu" in config["architecture"], "skip" in config["architecture"]) == ("threshold" in t, "W_skip" in t)
    assert (config["d_in"], config["d_sae"], config["apply_b_dec_to_input"]) == (*t["W_enc"].shape, False)
    x_NC = np.concatenate([acts_NLD[:, layer] for layer in range(acts_NLD.shape[1])], axis=1)
    value_NF = x_NC @ t["W_enc"] + t["b_enc"]
    features_NF = np.maximum(value_NF, 0.0) * (value_NF > t.get("threshold", 0.0))
    found_NC = features_NF @ t["W_dec"] + t["b_dec"] + (x_NC @ t["W_skip"].T if "W_skip" in t else 0.0)
    return features_NF, np.stack(np.split(found_NC, acts_NLD.shape[1], axis=1), axis=1)


@pytest.mark.parametrize("kind", KINDS)
def test_sae_lens_files_compute_what_the_crosscoder_does(kind: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", kind)
    acts_NLD, features_NF, x_NLD = expected(run)
    export(run, tmp_path / "out", to="sae_lens")
    check_same(by_sae_lens(tmp_path / "out", acts_NLD), features_NF, x_NLD)


@pytest.mark.parametrize("kind", KINDS)
def test_plain_tensors_compute_what_the_crosscoder_does(kind: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", kind)
    acts_NLD, features_NF, x_NLD = expected(run)
    export(run, tmp_path / "out", to="safetensors")
    check_same(by_plain_tensors(tmp_path / "out", acts_NLD), features_NF, x_NLD)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("dense", "gated")])
def test_dictionary_learnings_files_compute_what_the_crosscoder_does(kind: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", kind)
    acts_NLD, features_NF, x_NLD = expected(run)
    remarks = export(run, tmp_path / "out", to="dictionary_learning")
    check_same(by_dictionary_learning(tmp_path / "out", acts_NLD), features_NF, x_NLD)
    tensors = safetensors.numpy.load_file(tmp_path / "out/model.safetensors")
    shapes = {name: tensor.shape for name, tensor in tensors.items() if "." in name}
    assert shapes == {
        "encoder.weight": (2, 6, NUM_FEATURES),
        "encoder.bias": (NUM_FEATURES,),
        "decoder.weight": (2, NUM_FEATURES, 6),
        "decoder.bias": (2, 6),
    }
    assert ("threshold" in tensors) == (kind not in NO_THRESHOLD)
    is_scaled = kind not in ONE_THRESHOLD | NO_THRESHOLD
    assert ("feature_scale" in tensors) == any("feature_scale" in remark for remark in remarks) == is_scaled


def test_a_feature_without_a_decoder_never_fires_in_dictionary_learning_either(tmp_path: Path) -> None:
    def without_decoder(crosscoder: Crosscoder) -> None:
        crosscoder.W_dec_FLD[3] = 0.0
        crosscoder.activation_function.threshold.fill_(5.0)
        crosscoder.b_enc_F.add_(5.0)

    run = write_run(tmp_path / "run", "batch_topk", without_decoder)
    acts_NLD, features_NF, x_NLD = expected(run)
    export(run, tmp_path / "out", to="dictionary_learning")
    found_NF, found_NLD = by_dictionary_learning(tmp_path / "out", acts_NLD)
    assert not features_NF[:, 3].any()
    assert np.array_equal(found_NF > 0, features_NF > 0)
    assert np.linalg.norm(found_NLD - x_NLD) < 1e-6 * np.linalg.norm(x_NLD)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("dense", "has a dense path of rank 2 beside its features, which dictionary_learning has no place for"),
        ("gated", r"feature \d+ fires from 0 on and feature \d+ from .*, but dictionary_learning has one threshold"),
    ],
)
def test_what_dictionary_learning_has_no_place_for_is_refused_and_leaves_nothing(kind: str, message: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", kind)
    with pytest.raises(UserError, match=message):
        export(run, tmp_path / "out", to="dictionary_learning")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_export_takes_no_directory_that_holds_something(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "relu")
    (tmp_path / "out").mkdir()
    export(run, tmp_path / "out", to="safetensors")
    with pytest.raises(UserError, match="out is there already; give the directory of an export a new name"):
        export(run, tmp_path / "out", to="safetensors")


def card_of(directory: Path) -> tuple[dict[str, Any], str]:
    _, front, text = (directory / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front), text


def test_the_card_tells_the_hub_and_a_reader_what_it_is_but_no_path(tmp_path: Path) -> None:
    run, evaluation = write_run(tmp_path / "run", "batch_topk"), tmp_path / "evaluation"
    training = {"stage": "train", "activations": {"kind": "disk", "path": "/home/ana/acts"}, "loss": {"auxk": {"k": 2}}, "seed": 3}
    training["optimizer"] = {"eps": 1e-8}
    (run / "config.yaml").write_text(yaml.safe_dump(training))
    metrics = {
        "inputs": {"crosscoder": load_crosscoder(run).identity},
        "layers": LAYERS,
        "held_out": {"positions": 29712, "outliers": 4},
        "sparsity": {"l0": 31.4, "dead_eval": 12, "dense": 5},
        "clean_cross_entropy": 1.8019,
        "reconstruction": [{"layer": layer, "by": by, "explained_variance": 0.9} for layer in LAYERS for by in ("crosscoder", "mean")],
        "replaced": [
            {"layer": LAYERS[0], "by": by, "difference": nats} for by, nats in [("crosscoder", 0.07), ("affine", 0.04), ("mean", 2.0)]
        ],
    }
    records.write_json(evaluation / "metrics.json", metrics)
    (evaluation / "config.yaml").write_text(yaml.safe_dump({"language_model": {"model": "gpt2", "revision": "607a30d"}}))
    export(run, tmp_path / "out", to="dictionary_learning", evaluation=evaluation, license="apache-2.0", repository="ana/diff")
    front, text = card_of(tmp_path / "out")
    assert front["library_name"] == "dictionary_learning"
    assert (front["base_model"], front["license"]) == ("gpt2", "apache-2.0")
    assert "| `block.0` | 0.9000 | 0.0700 | 0.0400 (affine) |" in text
    assert 'BatchTopKCrossCoder.from_pretrained("ana/diff", from_hub=True)' in text
    assert "`feature_scale[i]`" in text
    assert "of gpt2@607a30d" in text
    assert "auxk" in text
    assert "seed: 3" in text
    assert "eps: 1" in text
    for identity in ("a" * 64, "d" * 64, "m" * 64, "t" * 64, load_crosscoder(run).identity):
        assert identity in text
    assert "/home" not in text
    assert str(tmp_path) not in text


def test_results_of_another_checkpoint_are_not_on_the_card(tmp_path: Path) -> None:
    run, evaluation = write_run(tmp_path / "run", "relu"), tmp_path / "evaluation"
    records.write_json(evaluation / "metrics.json", {"inputs": {"crosscoder": "c" * 64}})
    export(run, tmp_path / "out", to="safetensors", evaluation=evaluation)
    assert "## Results" not in card_of(tmp_path / "out")[1]


def test_a_crosscoder_of_one_layer_names_the_place_that_sae_lens_hooks_into(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "jump_relu", layers=["transformer.h.7.mlp_output"])
    (run / "config.yaml").write_text(yaml.safe_dump({"activations": {"language_model": {"model": "gpt2"}}}))
    export(run, tmp_path / "out", to="sae_lens")
    metadata = json.loads((tmp_path / "out/crosscoder/cfg.json").read_text())["metadata"]
    assert (metadata["hook_name"], metadata["model_name"]) == ("blocks.7.hook_mlp_out", "gpt2")
    assert "from_pretrained_no_processing" in card_of(tmp_path / "out")[1]


def test_a_card_of_several_models_names_them_all(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "relu", layers=["base/transformer.h.2", "chat/transformer.h.2"])
    models = {"base": {"model": "org/base"}, "chat": {"model": "org/chat", "revision": "v1"}}
    (run / "config.yaml").write_text(yaml.safe_dump({"activations": {"language_models": models}}))
    export(run, tmp_path / "out", to="sae_lens")
    front, text = card_of(tmp_path / "out")
    assert front["base_model"] == ["org/base", "org/chat"]
    assert "`base/transformer.h.2`, `chat/transformer.h.2` of org/base and org/chat@v1" in text


def test_a_card_names_no_language_model_that_is_a_directory_and_no_license_that_nobody_gave(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "relu")
    (run / "config.yaml").write_text(yaml.safe_dump({"activations": {"language_model": {"model": "/models/secret"}}}))
    export(run, tmp_path / "out", to="safetensors")
    front, text = card_of(tmp_path / "out")
    assert not {"base_model", "license"} & set(front)
    assert "/models" not in text
    assert "No license was given" in text
