"""Replacing a layer's activations: where, by what, and what that does to the model's predictions."""

from pathlib import Path

import pytest
import tiny_architectures
import torch
from rounding import forward_pass
from tiny_models import tiny_gpt2, tiny_llama
from torch import Tensor

from pipeline.config.language_model import LanguageModelConfig
from pipeline.interventions import clean_run, put, replaceable, zero
from pipeline.language_model import LanguageModel

EARLY, LATE = "transformer.h.0", "transformer.h.1"


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    directory = tiny_gpt2(tmp_path_factory.mktemp("model"))
    return LanguageModel.load(LanguageModelConfig(model=str(directory), device="cpu"))


@pytest.fixture(scope="module")
def tokens_BS() -> Tensor:
    return torch.randint(1, 300, (3, 10), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def replaced_BS() -> Tensor:
    return replaceable(torch.tensor([10, 7, 1]), 10)


def test_position_0_and_padding_are_not_replaceable(replaced_BS: Tensor) -> None:
    assert replaced_BS.tolist() == [[False] + [True] * 9, [False] + [True] * 6 + [False] * 3, [False] * 10]


def test_reading_a_run_does_not_change_it(language_model: LanguageModel, tokens_BS: Tensor) -> None:
    clean = clean_run(language_model, tokens_BS, [LATE, EARLY])
    assert torch.equal(clean.hidden_BSD, language_model.before_head(tokens_BS))
    assert torch.equal(clean.acts_BSLD, language_model.activations(tokens_BS, [LATE, EARLY]))


def test_a_run_can_be_read_in_a_model_whose_blocks_give_plain_tensors(tmp_path: Path, tokens_BS: Tensor) -> None:
    llama = LanguageModel.load(LanguageModelConfig(model=str(tiny_llama(tmp_path)), device="cpu"))
    clean = clean_run(llama, tokens_BS, ["model.layers.1"])
    assert torch.equal(clean.hidden_BSD, llama.before_head(tokens_BS))
    assert torch.equal(clean.acts_BSLD, llama.activations(tokens_BS, ["model.layers.1"]))


def test_what_an_evaluation_reads_is_what_is_trained_on_bit_for_bit(tmp_path: Path, tokens_BS: Tensor) -> None:
    # Mamba's blocks give float32 in a model of bfloat16.
    config = LanguageModelConfig(model=str(tiny_architectures.save("Mamba", tmp_path)), device="cpu", dtype="bfloat16")
    mamba = LanguageModel.load(config)
    assert torch.equal(clean_run(mamba, tokens_BS, mamba.block_names).acts_BSLD, mamba.activations(tokens_BS, mamba.block_names))


def test_a_layer_replaced_by_its_own_activations_changes_no_bit(
    language_model: LanguageModel, tokens_BS: Tensor, replaced_BS: Tensor
) -> None:
    clean = clean_run(language_model, tokens_BS, [EARLY, LATE])
    same = {layer: put(clean.acts_BSLD[replaced_BS][:, i], replaced_BS) for i, layer in enumerate([EARLY, LATE])}
    assert torch.equal(language_model.before_head(tokens_BS, same), clean.hidden_BSD)


def test_rows_a_vector_and_a_number_go_to_the_replaced_positions_only(replaced_BS: Tensor) -> None:
    acts_BSD = torch.randn(3, 10, 4, generator=torch.Generator().manual_seed(1))
    before = acts_BSD.clone()
    rows_ND = torch.arange(15 * 4.0).view(15, 4)
    for values, expected_ND in [(rows_ND, rows_ND), (rows_ND[3], rows_ND[3].expand(15, 4)), (torch.tensor(2.5), torch.full((15, 4), 2.5))]:
        changed_BSD = put(values.double(), replaced_BS)(acts_BSD)
        assert changed_BSD.dtype == acts_BSD.dtype
        assert torch.equal(changed_BSD[replaced_BS], expected_ND)
        assert torch.equal(changed_BSD[~replaced_BS], acts_BSD[~replaced_BS])
    assert torch.equal(acts_BSD, before)


def test_zero_ablation_equals_a_hook_worked_by_hand(language_model: LanguageModel, tokens_BS: Tensor, replaced_BS: Tensor) -> None:
    def block_output_with_zeros(_module: torch.nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> object:
        acts_BSD = (output[0] if isinstance(output, tuple) else output).clone()
        for context, length in enumerate([10, 7, 1]):
            for position in range(1, length):
                acts_BSD[context, position] = 0.0
        return (acts_BSD, *output[1:]) if isinstance(output, tuple) else acts_BSD

    hook = language_model.model.get_submodule(LATE).register_forward_hook(block_output_with_zeros)
    with torch.inference_mode():
        expected_BSV = language_model.model(input_ids=tokens_BS).logits
    hook.remove()
    found_BSV = language_model.logits(tokens_BS, {LATE: zero(replaced_BS)})
    assert torch.equal(found_BSV, expected_BSV)
    assert not torch.allclose(found_BSV, language_model.logits(tokens_BS))


def test_replacing_several_layers_predicts_as_replacing_the_last_alone(
    language_model: LanguageModel, tokens_BS: Tensor, replaced_BS: Tensor
) -> None:
    clean = clean_run(language_model, tokens_BS, [EARLY, LATE])
    noisy_NLD = clean.acts_BSLD[replaced_BS] + 0.5
    both = {layer: put(noisy_NLD[:, i], replaced_BS) for i, layer in enumerate([EARLY, LATE])}
    together_BSV = language_model.logits(tokens_BS, both)[replaced_BS]
    alone_BSV = language_model.logits(tokens_BS, {LATE: both[LATE]})[replaced_BS]
    torch.testing.assert_close(together_BSV, alone_BSV, rtol=0, atol=forward_pass() * float(alone_BSV.abs().max()))
    assert not torch.allclose(together_BSV, language_model.logits(tokens_BS, {EARLY: both[EARLY]})[replaced_BS])


def test_predictions_at_position_0_stay(language_model: LanguageModel, tokens_BS: Tensor, replaced_BS: Tensor) -> None:
    clean_BSV, zeroed_BSV = language_model.logits(tokens_BS), language_model.logits(tokens_BS, {EARLY: zero(replaced_BS)})
    assert torch.equal(zeroed_BSV[:, 0], clean_BSV[:, 0])
