"""Imported crosscoders: the tensors of each layout become a crosscoder that computes what its library does, or are refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from exported_crosscoders import KINDS, activations, write_run
from torch import Tensor
from toy_activations import LAYERS

from pipeline.config.errors import UserError
from pipeline.crosscoder.checkpoint import load_crosscoder
from pipeline.crosscoder.folding import Folded
from pipeline.exchange import dictionary_learning, plain_tensors, sae_lens
from pipeline.exchange.export_crosscoder import LAYOUTS, export
from pipeline.exchange.imported import crosscoder_of, scaled
from pipeline.stages.import_crosscoder import READERS

L, D, F = 2, 6, 40


def computed(folded: Folded, acts_NLD: Tensor) -> tuple[Tensor, Tensor]:
    """What the crosscoder made of the folded weights computes."""
    _, crosscoder = crosscoder_of(folded, LAYERS[: folded.W_enc_LDF.shape[0]])
    with torch.no_grad():
        features_NF = crosscoder.encode(acts_NLD)
        return features_NF, crosscoder.decode(features_NF, acts_NLD)


ROUND_TRIPS = [(layout, kind) for layout in LAYOUTS for kind in KINDS]
ROUND_TRIPS = [pair for pair in ROUND_TRIPS if pair not in (("dictionary_learning", "dense"), ("dictionary_learning", "gated"))]


@pytest.mark.parametrize(("layout", "kind"), ROUND_TRIPS)
def test_what_was_exported_comes_back(layout: str, kind: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", kind)
    trained, acts_NLD = load_crosscoder(run), activations()
    export(run, tmp_path / "out", to=layout)
    features_NF, x_NLD = computed(READERS[layout](tmp_path / "out", L).folded, acts_NLD)
    expected_NF = trained.encode(acts_NLD)
    expected_NLD = trained.decode(expected_NF, acts_NLD)
    assert torch.equal(features_NF > 0, expected_NF > 0)
    # Float32 weights multiply numbers of up to 100, 12 at a time.
    torch.testing.assert_close(features_NF, expected_NF, rtol=0, atol=2e-6 * expected_NF.max().item())
    assert (x_NLD - expected_NLD).norm() < 1e-6 * expected_NLD.norm()


SAME_UNITS = [(layout, kind) for layout in LAYOUTS for kind in ("relu", "batch_topk_by_activation")]
SAME_UNITS += [("sae_lens", "jump_relu"), ("safetensors", "jump_relu")]


@pytest.mark.parametrize(("layout", "kind"), SAME_UNITS)
def test_where_no_unit_changes_a_second_export_has_the_bytes_of_the_first(layout: str, kind: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", kind)
    export(run, tmp_path / "first", to=layout)
    folded = READERS[layout](tmp_path / "first", L).folded

    def take(crosscoder: Any) -> None:
        crosscoder.load_state_dict(crosscoder_of(folded, LAYERS)[1].state_dict())

    function = {"kind": "relu"} if kind == "relu" else {"kind": "fixed_threshold"}
    values = {"activation_function": function, "normalization": {"center": False, "scale": "none"}}
    export(write_run(tmp_path / "again", values, take), tmp_path / "second", to=layout)
    for first in sorted((tmp_path / "first").rglob("*.safetensors")):
        second = tmp_path / "second" / first.relative_to(tmp_path / "first")
        tensors, again = safetensors.torch.load_file(first), safetensors.torch.load_file(second)
        assert tensors.keys() - {"k"} == again.keys() - {"k"}
        assert all(torch.equal(tensors[name], again[name]) for name in tensors if name != "k")


def random_tensors(*, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"encoder.weight": (L, D, F), "encoder.bias": (F,), "decoder.weight": (L, F, D), "decoder.bias": (L, D)}
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize(("number", "name"), [(1, "CROSSCODER"), (2, "SAE"), (3, "MIXED"), (4, "NONE")])
def test_the_code_normalizations_of_dictionary_learning_decide_what_fires(number: int, name: str, tmp_path: Path) -> None:
    t, acts_NLD, threshold = random_tensors(), activations(), 2.0
    further = {"threshold": torch.tensor(threshold), "k": torch.tensor(5), "code_normalization_id": torch.tensor(number)}
    torch.save({f"_orig_mod.{key}": value for key, value in (t | further).items()}, tmp_path / "ae.pt")
    pre_NF = torch.einsum("nld,ldf->nf", acts_NLD, t["encoder.weight"]) + t["encoder.bias"]
    features_NF, x_NLD = computed(dictionary_learning.read(tmp_path / "ae.pt", L).folded, acts_NLD)
    for f in range(F):
        norms = [t["decoder.weight"][layer, f].square().sum().sqrt() for layer in range(L)]
        of_all = sum(norm**2 for norm in norms) ** 0.5
        factor = {"CROSSCODER": sum(norms), "SAE": of_all, "MIXED": of_all + 0.1 * sum(norms), "NONE": 1.0}[name]
        fires_N = pre_NF[:, f].relu() * factor > threshold
        assert torch.equal(features_NF[:, f] > 0, fires_N)
        torch.testing.assert_close(features_NF[:, f], pre_NF[:, f] * fires_N, rtol=1e-5, atol=1e-4)
    expected_NLD = torch.einsum("nf,lfd->nld", features_NF, t["decoder.weight"]) + t["decoder.bias"]
    torch.testing.assert_close(x_NLD, expected_NLD, rtol=1e-5, atol=1e-3)


def test_dictionary_learnings_own_normalization_is_multiplied_in(tmp_path: Path) -> None:
    t, acts_NLD = random_tensors(), activations()
    mean_LD, scale_L = acts_NLD.mean(0), torch.tensor([0.5, 0.02])
    further = {"activation_mean": mean_LD, "activation_std": torch.ones(L, D), "activation_global_scale": scale_L}
    torch.save(t | further, tmp_path / "ae.pt")
    normalized_NLD = ((acts_NLD - mean_LD) * scale_L[:, None]).double()
    expected_NF = (torch.einsum("nld,ldf->nf", normalized_NLD, t["encoder.weight"].double()) + t["encoder.bias"]).relu()
    out_NLD = torch.einsum("nf,lfd->nld", expected_NF, t["decoder.weight"].double()) + t["decoder.bias"]
    features_NF, x_NLD = computed(dictionary_learning.read(tmp_path, L).folded, acts_NLD)
    torch.testing.assert_close(features_NF.double(), expected_NF, rtol=0, atol=1e-5)
    torch.testing.assert_close(x_NLD.double(), out_NLD / (scale_L[:, None] + 1e-8) + mean_LD, rtol=0, atol=1e-4 * x_NLD.abs().max().item())


@pytest.mark.parametrize("scale", [None, [0.5, 0.02]])
def test_the_public_replications_file_is_read_with_the_scales_of_its_training(scale: list[float] | None, tmp_path: Path) -> None:
    t, acts_NLD = random_tensors(), activations()
    weights = {"W_enc": t["encoder.weight"], "b_enc": t["encoder.bias"], "W_dec": t["decoder.weight"].transpose(0, 1)}
    torch.save({**weights, "b_dec": t["decoder.bias"].bfloat16()}, tmp_path / "cc_weights.pt")
    folded = READERS["ckkissane"](tmp_path, L).folded
    scale_L = torch.tensor(scale or [1.0, 1.0])
    scaled_NLD = acts_NLD.double() * scale_L[:, None]
    expected_NF = (torch.einsum("nld,ldf->nf", scaled_NLD, t["encoder.weight"].double()) + t["encoder.bias"]).relu()
    expected_NLD = torch.einsum("nf,lfd->nld", expected_NF, t["decoder.weight"].double()) + t["decoder.bias"].bfloat16().double()
    features_NF, x_NLD = computed(scaled(folded, scale_L) if scale else folded, acts_NLD)
    torch.testing.assert_close(features_NF.double(), expected_NF, rtol=0, atol=2e-6 * expected_NF.max().item())
    assert (x_NLD - expected_NLD / scale_L[:, None]).norm() < 1e-6 * x_NLD.norm()


def test_a_sae_lens_autoencoder_that_takes_its_bias_away_first_is_read(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (D, F), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,)}
    t = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    safetensors.torch.save_file(t, tmp_path / "sae_weights.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps({"architecture": "standard", "d_in": D, "d_sae": F}))
    acts_NLD = activations()[:, :1]
    features_NF, x_NLD = computed(sae_lens.read(tmp_path, 1).folded, acts_NLD)
    expected_NF = ((acts_NLD[:, 0] - t["b_dec"]).double() @ t["W_enc"].double() + t["b_enc"]).relu()
    torch.testing.assert_close(features_NF.double(), expected_NF, rtol=0, atol=1e-5 * expected_NF.max().item())
    torch.testing.assert_close(x_NLD[:, 0].double(), expected_NF @ t["W_dec"].double() + t["b_dec"], rtol=0, atol=1e-5 * x_NLD.max().item())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architecture": "gated"}, "has architecture gated, which no crosscoder here computes"),
        ({"architecture": "topk", "k": 5}, "has architecture topk"),
        ({"normalize_activations": "layer_norm"}, "has normalize_activations layer_norm"),
        ({"activation_fn": "tanh-relu"}, "has activation_fn tanh-relu"),
        ({"apply_b_dec_to_input": False}, "holds scaling_factor besides, which this layout does not have"),
    ],
)
def test_what_sae_lens_has_and_a_crosscoder_has_not_is_refused(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    t = {
        "W_enc": torch.ones(D, F),
        "b_enc": torch.ones(F),
        "W_dec": torch.ones(F, D),
        "b_dec": torch.ones(D),
        "scaling_factor": torch.ones(F),
    }
    safetensors.torch.save_file(t, tmp_path / "sae_weights.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps({"d_in": D, "d_sae": F, **config}))
    with pytest.raises(UserError, match=message):
        sae_lens.read(tmp_path, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder.bias": torch.ones(F - 1)}, r"encoder\.bias is 39, expected 40"),
        ({"decoder.weight": torch.ones(L, F)}, r"decoder\.weight is 2 x 40, expected 2 x 40 x 6"),
        ({"encoder.weight": torch.ones(3, D, F)}, r"encoder\.weight is 3 x 6 x 40, expected 2 x any x any"),
        ({"encoder.weight": torch.full((L, D, F), torch.nan)}, "numbers that are not finite"),
        ({"threshold": torch.tensor(torch.nan), "k": torch.tensor(4)}, "threshold holds numbers that are not finite"),
        ({"encoder.bias": torch.ones(F, dtype=torch.int32)}, r"encoder\.bias is int32, expected floating-point numbers"),
        ({"other": torch.ones(1)}, "holds other besides"),
        ({"code_normalization_id": torch.tensor(5)}, "code normalization DECOUPLED"),
        ({"activation_mean": torch.ones(L, D), "activation_std": torch.ones(L, D)}, "normalizes each neuron by itself"),
    ],
)
def test_a_file_that_is_not_of_the_layout_is_named(changes: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    torch.save(random_tensors() | changes, tmp_path / "ae.pt")
    with pytest.raises(UserError, match=message):
        dictionary_learning.read(tmp_path, L)


class Runs:
    """What a pickle may hold that would run when it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("ran",)


def test_no_code_in_a_file_of_torch_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"W_enc": Runs()}, tmp_path / "cc_weights.pt")
    with pytest.raises(UserError, match=r"cc_weights\.pt is damaged or holds more than tensors, which is not read"):
        plain_tensors.read(tmp_path, L)
    assert capsys.readouterr().out == ""
    for damaged in (b"", b"\x80\x02}", b"PK\x03\x04"):
        (tmp_path / "cc_weights.pt").write_bytes(damaged)
        with pytest.raises(UserError, match="is damaged"):
            plain_tensors.read(tmp_path, L)


def test_a_directory_without_weights_and_a_tensor_that_is_missing_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds none of model\.safetensors, ae\.pt"):
        dictionary_learning.read(tmp_path, L)
    torch.save({"W_enc": torch.ones(L, D, F)}, tmp_path / "1.pt")
    with pytest.raises(UserError, match=r"1\.pt has no b_enc, but nothing"):
        plain_tensors.read(tmp_path, L)
    torch.save({}, tmp_path / "2.pt")
    with pytest.raises(UserError, match="holds 2 files of weights; name one of them"):
        plain_tensors.read(tmp_path, L)
