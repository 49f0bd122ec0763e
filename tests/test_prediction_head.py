"""The head of a language model, taken apart and computed in float32: the model's own logits, without their rounding."""

from typing import Any

import pytest
import torch
import transformers
from tiny_models import tiny_gpt2
from torch import Tensor, nn

from pipeline import prediction_head
from pipeline.config.language_model import LanguageModelConfig
from pipeline.language_model import LanguageModel
from pipeline.prediction_head import PredictionHead

TOKENS = torch.tensor([[5, 9, 200, 7, 31, 8], [1, 2, 3, 4, 5, 6]])
SMALL = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL |= {"num_key_value_heads": 1, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("LlamaConfig", {}),
    "soft cap": ("Gemma2Config", {"head_dim": 8, "final_logit_softcapping": 3.0}),
    "multiplied": ("CohereConfig", {"logit_scale": 0.25}),
    "divided": ("GraniteConfig", {"logits_scaling": 4.0}),
    "bias": ("PhiConfig", {"num_key_value_heads": 2}),
}


def tiny_model(name: str, dtype: torch.dtype = torch.float32) -> Any:
    config_class, settings = ARCHITECTURES[name]
    config = getattr(transformers, config_class)(**{**SMALL, **settings})
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        for parameter in model.parameters():  # freshly drawn weights give logits so small that no cap could be seen
            parameter.copy_(torch.randn(parameter.shape) * (0.5 if parameter.dim() == 2 else 1.0))
    return model


def as_language_model(model: Any) -> LanguageModel:
    return LanguageModel(model, name="tiny", content_hash="")


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_a_float32_model_keeps_its_logits(name: str) -> None:
    model = as_language_model(tiny_model(name))
    assert model.head.is_exact
    found_BSV = model.head.logits(model.before_head(TOKENS).flatten(0, 1)).view(2, 6, -1)
    expected_BSV = model.logits(TOKENS)
    torch.testing.assert_close(found_BSV, expected_BSV, rtol=1e-4, atol=1e-5 * float(expected_BSV.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_logits_of_a_bfloat16_model_are_those_of_float64_products(name: str) -> None:
    model = as_language_model(tiny_model(name, torch.bfloat16))
    assert model.head.is_exact
    hidden_ND = model.before_head(TOKENS).flatten(0, 1)
    assert hidden_ND.dtype == torch.bfloat16
    head = model.model.get_output_embeddings()
    exact_NV = nn.functional.linear(hidden_ND.double(), head.weight.double(), None if head.bias is None else head.bias.double())
    exact_NV = {
        "soft cap": lambda logits: torch.tanh(logits / 3.0) * 3.0,
        "multiplied": lambda logits: logits * 0.25,
        "divided": lambda logits: logits / 4.0,
    }.get(name, lambda logits: logits)(exact_NV)
    found_NV = model.head.logits(hidden_ND)
    assert found_NV.dtype == torch.float32
    largest = float(exact_NV.abs().max())
    assert float((found_NV - exact_NV).abs().max()) < 1e-5 * largest
    assert float((model.logits(TOKENS).flatten(0, 1) - exact_NV).abs().max()) > 1e-4 * largest


def test_parts_of_the_vocabulary_give_what_the_whole_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    model = as_language_model(tiny_model("bias", torch.bfloat16))
    hidden_ND = model.before_head(TOKENS).flatten(0, 1)
    whole_NV = model.head.logits(hidden_ND)
    monkeypatch.setattr(prediction_head, "WEIGHTS_AT_A_TIME", 16 * 7)
    torch.testing.assert_close(model.head.logits(hidden_ND), whole_NV, rtol=1e-6, atol=1e-5)


def test_a_replaced_layer_is_seen_by_the_head(tmp_path: Any) -> None:
    model = LanguageModel.load(LanguageModelConfig(model=str(tiny_gpt2(tmp_path)), device="cpu"))
    replace = {model.block_names[0]: torch.zeros_like}
    hidden_ND = model.before_head(TOKENS, replace).flatten(0, 1)
    torch.testing.assert_close(model.head.logits(hidden_ND), model.logits(TOKENS, replace).flatten(0, 1), rtol=1e-4, atol=1e-4)
    assert not hidden_ND.equal(model.before_head(TOKENS).flatten(0, 1))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.model.modules())


class OddModel(nn.Module):
    """The tiny Llama, with something done to its logits that its configuration does not tell."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tiny_model("plain", torch.bfloat16)
        self.config = self.inner.config

    def get_output_embeddings(self) -> Any:
        return self.inner.get_output_embeddings()

    def get_input_embeddings(self) -> Any:
        return self.inner.get_input_embeddings()

    def forward(self, **inputs: Any) -> Any:
        output = self.inner(**inputs)
        output.logits = output.logits + 0.5 * output.logits.square()
        return output


def test_a_head_that_can_not_be_taken_apart_gives_the_models_own_logits() -> None:
    model = OddModel()
    head = PredictionHead.of(model)
    assert not head.is_exact
    wrapped = as_language_model(model)
    logits_BSV = wrapped.logits(TOKENS)
    assert wrapped.before_head(TOKENS).equal(logits_BSV)
    assert wrapped.head.logits(logits_BSV[0]).equal(logits_BSV[0].float())


def test_divergences_from_bfloat16_logits_are_too_large_and_these_are_not() -> None:
    """Two runs that differ little, heads of width 256 on a vocabulary of 4,000, logits of standard deviation 8."""
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(256, 4000, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        head.weight.copy_(torch.randn(4000, 256, generator=generator) * 8 / 16)
    clean_ND = torch.randn(200, 256, generator=generator).bfloat16()
    changed_ND = (clean_ND.float() + 0.004 * torch.randn(200, 256, generator=generator)).bfloat16()

    def divergence(clean_NV: Tensor, changed_NV: Tensor) -> float:
        p, q = clean_NV.double().log_softmax(-1), changed_NV.double().log_softmax(-1)
        return float((p.exp() * (p - q)).sum(-1).mean())

    with torch.no_grad():
        exact = divergence(*(hidden_ND.double() @ head.weight.double().T for hidden_ND in (clean_ND, changed_ND)))
        rounded = divergence(head(clean_ND), head(changed_ND))
        taken_apart = PredictionHead(head, lambda logits: logits)
        found = divergence(taken_apart.logits(clean_ND), taken_apart.logits(changed_ND))
    assert rounded > 1.5 * exact
    assert found == pytest.approx(exact, rel=1e-3)
