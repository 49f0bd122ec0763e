"""A site is named in one form, found in the block that it names, read and replaced there, or refused."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_architectures
import torch
from pydantic import TypeAdapter, ValidationError
from rounding import forward_pass
from tiny_architectures import ARCHITECTURES
from tiny_models import tiny_token_set

from pipeline.activations.shards import ActivationSet
from pipeline.config.cache_activations import CacheConfig
from pipeline.config.errors import UserError
from pipeline.config.language_model import LanguageModelConfig
from pipeline.config.sites import SiteName, SiteText
from pipeline.language_model import LanguageModel
from pipeline.run import Run
from pipeline.stages import cache_activations
from slurm.submission.block_names import layer_fault

TOKENS = torch.tensor([[5, 9, 200, 7, 31, 8], [1, 2, 3, 4, 5, 6]])
KINDS = ["GPT-2", "Llama", "Mixtral", "Gemma 2", "OLMo 2", "GPT-NeoX", "Falcon", "RWKV"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    directory = tmp_path_factory.mktemp("saved")

    def give(architecture: str) -> Path:
        path = directory / architecture
        return path if path.exists() else tiny_architectures.save(architecture, path)

    return give


def load(path: Path, **changes: Any) -> LanguageModel:
    return LanguageModel.load(LanguageModelConfig(model=str(path), device="cpu", **changes))


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ("transformer.h.2", "transformer.h.2"),
        ("transformer.h.2.residual", "transformer.h.2"),
        ("transformer.h.2.mlp_output", "transformer.h.2.mlp_output"),
        ({"layer": "transformer.h.2", "point": "attention_output"}, "transformer.h.2.attention_output"),
        ({"layer": "transformer.h.2"}, "transformer.h.2"),
        ("chat/transformer.h.2.residual", "chat/transformer.h.2"),
        ({"model": "chat", "layer": "transformer.h.2", "point": "mlp_output"}, "chat/transformer.h.2.mlp_output"),
    ],
)
def test_a_site_has_one_written_form(given: Any, written: str) -> None:
    found = TypeAdapter(SiteText).validate_python(given)
    assert found == written
    assert str(SiteName.parse(found)) == found


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("h.2.mlp_out", "names the point mlp_out, expected one of residual, mlp_output, attention_output; did you mean h.2.mlp_output?"),
        ({"layer": "h.2", "point": "attention"}, "did you mean h.2.attention_output?"),
        ("a.b/h.2", "names the model 'a.b', expected a key of language_models before the slash"),
        ({"block": "h.2"}, "expected a name or {layer: NAME, point: residual | mlp_output | attention_output}"),
    ],
)
def test_a_point_that_there_is_none_of_is_refused_with_the_nearest(given: Any, sentence: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(sentence)):
        TypeAdapter(SiteText).validate_python(given)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sublayers_output_is_what_the_residual_stream_grows_by(saved: Callable[[str], Path], kind: str) -> None:
    model = load(saved(kind))
    before, block, _ = model.block_names
    attention, mlp = f"{block}.attention_output", f"{block}.mlp_output"
    model.check_use([mlp, before, attention], 6)
    x, y, a, m = model.activations(TOKENS, [before, block, attention, mlp]).unbind(2)
    assert a.abs().max() > 1e-3
    assert m.abs().max() > 1e-3
    torch.testing.assert_close(x + a + m, y, rtol=0, atol=forward_pass() * float(y.abs().max()) * 4)
    logits_BSV = model.logits(TOKENS)
    assert model.logits(TOKENS, {mlp: lambda _: m.clone()}).equal(logits_BSV)
    assert model.logits(TOKENS, {attention: lambda _: a.clone()}).equal(logits_BSV)
    assert not model.logits(TOKENS, {mlp: torch.zeros_like}).equal(logits_BSV)
    assert not model.logits(TOKENS, {attention: torch.zeros_like}).equal(logits_BSV)


@pytest.mark.parametrize(
    ("kind", "point", "sentence"),
    [
        ("GPT (2018)", "mlp_output", "is not what is added to the residual stream"),
        ("BLOOM", "mlp_output", "is not what is added to the residual stream"),
        ("BART (decoder)", "attention_output", "is not what is added to the residual stream"),
        ("Llama 4 (text)", "mlp_output", r"is \(8, 32\), expected \(1, 8, 32\), one vector a position"),
        ("Mamba", "mlp_output", "MambaBlock of norm, mixer: which of them gives the"),
    ],
)
def test_a_block_whose_sublayers_are_other_than_they_seem_is_refused(
    saved: Callable[[str], Path], kind: str, point: str, sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        load(saved(kind)).check_use([f"{ARCHITECTURES[kind].blocks}.1.{point}"], 6)


def test_a_factor_on_what_is_added_is_seen(saved: Callable[[str], Path], tmp_path: Path) -> None:
    load(saved("Granite")).check_use(["model.layers.1.mlp_output"], 6)
    weighted = load(tiny_architectures.save("Granite", tmp_path / "weighted", residual_multiplier=0.5))
    with pytest.raises(UserError, match="or a factor follows; read the residual stream"):
        weighted.check_use(["model.layers.1.mlp_output"], 6)


def test_the_block_of_a_site_is_looked_up_at_submission() -> None:
    assert layer_fault("transformer.h.5.mlp_output", "m", "gpt2", 6) is None
    assert layer_fault("transformer.h.6.mlp_output", "m", "gpt2", 6) == "but m has blocks 0 to 5; use a smaller number"


def test_sublayers_are_cached_beside_the_stream(saved: Callable[[str], Path], tmp_path: Path) -> None:
    tiny_token_set(tmp_path / "tokens")
    layers: list[Any] = ["transformer.h.1", {"layer": "transformer.h.1", "point": "mlp_output"}]
    settings = {"tokens": tmp_path / "tokens", "output": tmp_path / "acts", "layers": layers, "context_tokens": 16, "max_tokens": 60}
    model = {"model": str(saved("GPT-2")), "device": "cpu", "check_tokenizer": False}
    cache_activations.run(CacheConfig(stage="cache", name="a", language_model=model, **settings), Run(tmp_path / "run"))
    found = ActivationSet.open(tmp_path / "acts", torch.device("cpu"))
    assert found.layers == ["transformer.h.1", "transformer.h.1.mlp_output"]
    batch = next(iter(found.batches(batch_positions=8, epoch=0, cursor=0)))
    assert not batch.acts_BLD[:, 0].equal(batch.acts_BLD[:, 1])
    assert bool(batch.acts_BLD.any(-1).all())
