"""A model is tried out before any work: blocks that give the residual stream, no view of the future, contexts of the length asked for."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_architectures
import torch
import transformers
from tiny_architectures import ARCHITECTURES
from tiny_models import tiny_token_set

from pipeline import model_trial
from pipeline.config.cache_activations import CacheConfig
from pipeline.config.errors import UserError
from pipeline.config.language_model import LanguageModelConfig
from pipeline.language_model import LanguageModel
from pipeline.run import Run
from pipeline.stages import cache_activations

TOKENS = torch.tensor([[5, 9, 200, 7, 31, 8], [1, 2, 3, 4, 5, 6]])
KINDS = ["Mixtral", "Gemma 3 (text and pictures)", "OPT (350M's form)", "BLOOM", "MPT", "Falcon", "Mamba", "RWKV", "GPT (2018)"]
KINDS += ["BERT (decoder)", "BART (decoder)", "RecurrentGemma", "DeepSeek-V3"]
REFUSED = [name for name, architecture in ARCHITECTURES.items() if architecture.refused is not None]


def load(path: Path, **changes: object) -> LanguageModel:
    return LanguageModel.load(LanguageModelConfig(model=str(path), device="cpu", **changes))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    directory = tmp_path_factory.mktemp("saved")

    def give(architecture: str) -> Path:
        path = directory / architecture
        return path if path.exists() else tiny_architectures.save(architecture, path)

    return give


@pytest.fixture
def llama(saved: Callable[[str], Path]) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(saved("Llama"))


def tried(model: transformers.PreTrainedModel) -> LanguageModel:
    return LanguageModel(model.eval(), name="tiny", content_hash="")


# -- models of many kinds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_blocks_of_a_kind_are_named_read_and_replaced(saved, kind):
    model = load(saved(kind))
    assert model.block_names == [f"{ARCHITECTURES[kind].blocks}.{index}" for index in range(3)]
    assert model.d_model == 32
    acts_BSLD = model.activations(TOKENS, model.block_names)
    logits_BSV = model.logits(TOKENS)
    assert logits_BSV.shape == (2, 6, 300)
    own = {name: lambda _, index=index: acts_BSLD[:, :, index] for index, name in enumerate(model.block_names)}
    assert model.logits(TOKENS, own).equal(logits_BSV)
    # Nothing of the tokens passes by the last block, or its output is not the residual stream.
    nothing_BSV = model.logits(TOKENS, {model.block_names[-1]: torch.zeros_like})
    assert nothing_BSV.equal(nothing_BSV[:1, :1].expand_as(nothing_BSV))


@pytest.mark.parametrize("kind", ["Mamba", "Mixtral", "Llama"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_activations_are_of_the_dtype_asked_for_whatever_a_block_gives(saved, kind, dtype):
    model = load(saved(kind), dtype=dtype)
    assert model.activations(TOKENS, model.block_names).dtype == getattr(torch, dtype)


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_of_another_kind_is_refused_in_one_sentence(saved, kind):
    with pytest.raises(UserError, match=ARCHITECTURES[kind].refused) as caught:
        load(saved(kind))
    assert "\n" not in str(caught.value)


def test_the_stage_refuses_it_before_it_makes_anything(saved, tmp_path):
    tokens = tiny_token_set(tmp_path / "tokens").directory
    model = {"model": str(saved("BERT")), "device": "cpu"}
    config = CacheConfig(name="a", tokens=tokens, output=tmp_path / "out", language_model=model, layers=["bert.encoder.layer.0"])
    with pytest.raises(UserError, match="sees the future"):
        cache_activations.run(config, Run(tmp_path / "run"))
    assert not (tmp_path / "out").exists()


# -- what a trial looks at ---------------------------------------------------------------------------------------------------------


def test_a_trial_is_three_passes_of_one_shape_and_leaves_no_hook(llama):
    shapes = []
    hook = llama.register_forward_pre_hook(lambda _m, _a, given: shapes.append(given["input_ids"].shape), with_kwargs=True)
    tried(llama)
    hook.remove()
    assert shapes == [(1, 8)] * 3
    assert not any(module._forward_hooks for module in llama.modules())


def test_both_texts_of_a_trial_share_their_first_half_and_differ_in_every_place_after_it(llama):
    first_S, second_S = model_trial.trial_tokens(llama)
    assert first_S[:4].equal(second_S[:4])
    assert (first_S[4:] != second_S[4:]).all()
    assert not {0} & {*first_S.tolist(), *second_S.tolist()}  # the config gives id 0 a meaning


def test_the_width_is_that_of_the_blocks_and_not_what_the_config_says(llama):
    llama.config.hidden_size = 99
    assert tried(llama).d_model == 32


def test_blocks_that_share_a_module_are_refused(llama):
    llama.model.layers[2] = llama.model.layers[0]
    with pytest.raises(UserError, match=r"does not run its blocks model\.layers\.0 to model\.layers\.2 once each and in this order, but"):
        tried(llama)


def test_blocks_that_run_in_another_order_are_refused(llama):
    class Reversed(torch.nn.ModuleList):
        def __getitem__(self, index):
            return list(reversed(list(super().__iter__())))[index]

    llama.model.layers = Reversed(llama.model.layers)
    with pytest.raises(UserError, match=r"but model\.layers\.2, model\.layers\.1, model\.layers\.0: its layers can't be read"):
        tried(llama)


def test_blocks_that_are_not_run_are_refused(llama):
    llama.model.layers.append(copy.deepcopy(llama.model.layers[0]))
    llama.config.num_hidden_layers = 4
    llama.config.layer_types = None
    kept = list(llama.model.layers)[:3]
    llama.model.layers.__class__ = type("Fewer", (torch.nn.ModuleList,), {"__getitem__": lambda self, index: kept[index]})
    with pytest.raises(UserError, match=r"but model\.layers\.0, model\.layers\.1, model\.layers\.2: its layers"):
        tried(llama)


@pytest.mark.parametrize(
    ("give", "found"),
    [(lambda acts: acts.flatten(0, 1), r"\(8, 32\)"), (lambda acts: acts[..., :7], r"\(1, 8, 7\)"), (lambda acts: {"a": acts}, "dict")],
)
def test_a_block_that_gives_another_shape_is_refused(llama, give, found):
    class Odd(torch.nn.Module):
        """Gives its block's output in another form, as long as it is asked from outside."""

        def forward(self, acts, **_):
            return give(acts)

    llama.model.layers[1] = Odd()
    llama.model.layers[2].forward = lambda *_, **__: torch.zeros(1, 8, 32)
    with pytest.raises(UserError, match=rf"model\.layers\.1 of tiny \(LlamaForCausalLM\) gives {found} for 1 context of 8 tokens"):
        tried(llama)


def test_blocks_that_pass_a_stream_on_beside_what_they_give_are_refused(llama):
    kept = []
    llama.model.layers[2].register_forward_pre_hook(lambda _m, given: kept.append(given[0]))
    llama.model.layers[2].register_forward_hook(lambda _m, _i, acts: acts - kept[-1])
    llama.model.norm.register_forward_pre_hook(lambda _m, given: (given[0] + kept[-1],))
    with pytest.raises(UserError, match=r"predicts from more than model\.layers\.2 gives: that is not its whole residual stream"):
        tried(llama)


@pytest.mark.parametrize("share", [1e-2, 1e-1])
def test_a_little_of_the_future_is_seen_to_be_seen(llama, share):
    llama.model.layers[1].register_forward_hook(lambda _m, _i, acts: acts + share * acts.mean(dim=1, keepdim=True))
    with pytest.raises(UserError, match=r"sees the future: other tokens in the second half .* change its model\.layers\.1"):
        tried(llama)


def test_a_head_that_sees_the_future_is_refused(llama):
    llama.lm_head.register_forward_hook(lambda _m, _i, logits: logits + 0.1 * logits.mean(dim=1, keepdim=True))
    with pytest.raises(UserError, match="change its logits in the first half"):
        tried(llama)


def test_an_error_of_the_models_own_code_is_one_sentence(llama):
    llama.model.forward = lambda *_, **__: {}["pixel_values"]
    with pytest.raises(UserError, match=r"tiny \(LlamaForCausalLM\) can't be run on 8 tokens alone: KeyError: 'pixel_values'"):
        tried(llama)


def test_only_what_is_read_has_to_be_finite(llama):
    llama.model.layers[1].register_forward_hook(lambda _m, _i, acts: acts * float("inf"))
    model = tried(llama)
    model.check_use(["model.layers.0"], 16)
    with pytest.raises(UserError, match=r"model\.layers\.2 of tiny is not finite .* in torch\.float32.*choose a dtype with a wider range"):
        model.check_use(["model.layers.0", "model.layers.2"], 16)
    with pytest.raises(UserError, match="logits of tiny is not finite"):
        model.check_use(["model.layers.0"], 16, predictions=True)


# -- the longest context -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["GPT-2", "Llama", "Mistral", "OPT", "MPT", "CodeGen", "RWKV", "XGLM", "BART (decoder)", "Falcon (ALiBi)"])
def test_a_context_as_long_as_the_config_allows_is_read_and_no_longer_one(saved, kind):
    model = load(saved(kind))
    model.check_use(model.block_names[:1], 64)
    assert model.activations(torch.ones(1, 64, dtype=torch.int64), model.block_names[:1]).shape == (1, 64, 1, 32)
    with pytest.raises(UserError, match=r"context_tokens is 65, but .* reads at most 64 tokens; use a smaller number"):
        model.check_use(model.block_names[:1], 65)


@pytest.mark.parametrize("kind", ["BLOOM", "Mamba"])
def test_a_model_without_a_limit_reads_any_context(saved, kind):
    model = load(saved(kind))
    assert model.max_context is None
    model.check_use(model.block_names[:1], 500)


@pytest.mark.parametrize("field", ["n_ctx", "seq_length", "max_target_positions", "max_seq_len"])
def test_the_least_of_several_limits_counts(saved, tmp_path, field):
    path = Path(shutil.copytree(saved("GPT-2"), tmp_path / "model"))
    (path / "config.json").write_text(json.dumps(json.loads((path / "config.json").read_text()) | {field: 48}))
    assert load(path).max_context == 48


def test_positions_that_the_embeddings_do_not_hold_are_found_out_by_reading(tmp_path):
    # RoBERTa counts positions from the padding id on, so that one of its 64 rows is never used.
    tiny_architectures.save("RoBERTa", tmp_path, is_decoder=True)
    model = load(tmp_path)
    model.check_use(model.block_names[:1], 63)
    with pytest.raises(
        UserError, match=r"context_tokens is 64, but .*\(RobertaForCausalLM\) can't read a context of that length: .*out of"
    ):
        model.check_use(model.block_names[:1], 64)
