"""Groups of features: who reads and writes which layer, and what that makes of a crosscoder."""

from typing import Any

import pytest
import torch
from toy_activations import LAYERS, MemorySource, random_activations, train_config

from pipeline.config.crosscoder import CrosscoderConfig
from pipeline.config.errors import UserError
from pipeline.config.schema import build
from pipeline.crosscoder.checkpoint import load_crosscoder
from pipeline.crosscoder.model import Crosscoder
from pipeline.crosscoder.trainer import Trainer
from pipeline.run import Run

CPU = torch.device("cpu")
A, B = LAYERS


def crosscoder(groups: list[dict[str, Any]], **settings: Any) -> Crosscoder:
    values = {"num_features": 24, "activation_function": {"kind": "relu"}, "groups": groups, **settings}
    return Crosscoder(build(CrosscoderConfig, values, "test"), layers=LAYERS, d_model=6, seed=0)


def test_a_group_reads_and_writes_its_layers_and_no_others_by_hand() -> None:
    model = crosscoder([{"features": 8}, {"features": 10, "reads": [A], "writes": [A]}, {"features": 6, "reads": [A], "writes": [B]}])
    reads_LF, writes_FL = model.W_enc_LDF.abs().sum(1) > 0, model.W_dec_FLD.abs().sum(2) > 0
    expected_reads = [[True] * 24, [True] * 8 + [False] * 16]
    expected_writes = [[True, True]] * 8 + [[True, False]] * 10 + [[False, True]] * 6
    assert reads_LF.tolist() == expected_reads
    assert writes_FL.tolist() == expected_writes


@pytest.mark.parametrize("parameterization", [{"kind": "free"}, {"kind": "aligned"}, {"kind": "factorized", "rank": 5}])
def test_training_never_gives_a_group_a_layer_that_is_not_its_own(parameterization: dict[str, Any], tmp_path: Any) -> None:
    groups = [{"features": 8}, {"features": 8, "reads": [A], "writes": [A]}, {"features": 8, "reads": "all", "writes": [B]}]
    settings = {"num_features": 24, "activation_function": {"kind": "batch_topk", "k": 3}, "groups": groups}
    config = train_config(crosscoder={**settings, "parameterization": parameterization}, loss={"auxk": {"k": 2}})
    course = Trainer(config, MemorySource(random_activations(300)), Run(tmp_path), CPU)
    course.train()
    trained = load_crosscoder(tmp_path).crosscoder
    assert not trained.W_dec_FLD[8:16, 1].any()
    assert not trained.W_enc_LDF[1, :, 8:16].any()
    assert not trained.W_dec_FLD[16:, 0].any()
    assert trained.W_dec_FLD[:8].any(-1).all()


def test_aligned_groups_are_aligned_over_the_layers_that_they_read_and_write() -> None:
    groups = [{"features": 8}, {"features": 8, "reads": [A], "writes": [A]}, {"features": 8, "reads": "all", "writes": [B]}]
    model = crosscoder(groups, parameterization={"kind": "aligned"})
    inner_F = torch.einsum("ldf,fld->f", model.W_enc_LDF, model.W_dec_FLD)
    torch.testing.assert_close(inner_F, torch.ones(24), rtol=0, atol=1e-4)


def test_two_groups_of_a_layer_each_are_two_separate_autoencoders() -> None:
    both = crosscoder([{"features": 12, "reads": [A], "writes": [A]}, {"features": 12, "reads": [B], "writes": [B]}])
    acts_BLD = torch.randn(7, 2, 6)
    features_BF = both.encode(acts_BLD)
    x_BLD = both.decode(features_BF)
    for layer, own in ((0, slice(0, 12)), (1, slice(12, 24))):
        alone_BF = torch.relu(acts_BLD[:, layer] @ both.W_enc_LDF[layer][:, own])
        torch.testing.assert_close(features_BF[:, own], alone_BF)
        torch.testing.assert_close(x_BLD[:, layer], alone_BF @ both.W_dec_FLD[own, layer])


def test_a_transcoder_is_trained_on_what_it_writes_alone(tmp_path: Any) -> None:
    settings = {"num_features": 24, "activation_function": {"kind": "relu"}, "groups": [{"features": 24, "reads": [A], "writes": [B]}]}
    config = train_config(crosscoder=settings, loss={"l1": {"coefficient": 0.1}}, log_every_steps=1)
    acts_NLD = random_activations(300)
    course = Trainer(config, MemorySource(acts_NLD), Run(tmp_path), CPU)
    x_BLD = course.state.normalizer.normalize(acts_NLD[:32])
    model = course.state.crosscoder
    expected = (x_BLD[:, 1] - torch.relu(x_BLD[:, 0] @ model.W_enc_LDF[0]) @ model.W_dec_FLD[:, 1]).square().sum(-1).mean()
    course.train_step(acts_NLD[:32])
    row = course.state.window.metrics()
    assert row["loss_reconstruction"] == pytest.approx(expected.item(), rel=1e-5)
    assert row["explained_variance_by_layer"][0] is None
    assert row["explained_variance"] == row["explained_variance_by_layer"][1]
    before = acts_NLD[:32].clone()
    changed = before.clone()
    changed[:, 1] += 5.0
    assert torch.equal(model.encode(course.state.normalizer.normalize(changed)), model.encode(course.state.normalizer.normalize(before)))


def test_a_cheaper_group_fires_more_and_is_penalized_less(tmp_path: Any) -> None:
    fired = {}
    for cost in (1.0, 0.25):
        groups = [{"features": 12, "cost": cost}, {"features": 12}]
        model = crosscoder(groups, activation_function={"kind": "batch_topk", "k": 4})
        torch.manual_seed(0)
        features_BF = model.encode_as_trained(torch.randn(64, 2, 6))
        fired[cost] = (features_BF[:, :12] > 0).sum().item()
        assert (features_BF > 0).sum() == 4 * 64
    assert fired[0.25] > 1.3 * fired[1.0]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"groups": [{"features": 20}]}, "the groups have 20 features together, expected num_features, 24"),
        (
            {"groups": [{"features": 24, "reads": ["block.7"]}]},
            r"groups\[0\]\.reads names block\.7, but the activations are of block\.0, block\.1",
        ),
        ({"groups": [{"features": 24, "reads": [A], "writes": [B]}], "parameterization": {"kind": "aligned"}}, "aligned needs a layer"),
    ],
)
def test_groups_that_make_no_sense_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        crosscoder(**settings)
