"""A language model's layers are read where they are, and replaced by what they are to be."""

import json
import shutil

import pytest
import safetensors.torch
import torch
import transformers
from rounding import forward_pass
from tiny_models import tiny_gpt2, tiny_llama, tiny_token_set, tiny_tokenizer

from pipeline.activations.token_check import check_tokens
from pipeline.config.errors import UserError
from pipeline.config.language_model import LanguageModelConfig
from pipeline.language_model import LanguageModel
from pipeline.text.tokenizer import load_tokenizer

TOKENS = torch.tensor([[5, 9, 200, 7, 31, 8], [1, 2, 3, 4, 5, 6]])
FAMILIES = ["gpt2", "llama"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    tiny_gpt2(directory / "gpt2")
    tiny_llama(directory / "llama")
    return directory


def load(path, **changes):
    return LanguageModel.load(LanguageModelConfig(model=str(path), device="cpu", **changes))


@pytest.fixture(params=FAMILIES)
def model(request, directory):
    return load(directory / request.param)


def test_what_a_model_says_of_itself(directory):
    gpt2, llama = load(directory / "gpt2"), load(directory / "llama")
    for model in (gpt2, llama):
        assert (model.d_model, model.vocab_size, model.max_context, model.end_of_text_id) == (16, 300, 64, 0)
        assert (model.device.type, model.dtype) == ("cpu", torch.float32)
    assert gpt2.block_names == ["transformer.h.0", "transformer.h.1", "transformer.h.2"]
    assert llama.block_names == ["model.layers.0", "model.layers.1", "model.layers.2"]


def test_layers_are_the_hidden_states_of_transformers_but_for_the_normed_last(model):
    acts_BSLD = model.activations(TOKENS, model.block_names)
    with torch.inference_mode():  # with gradients torch may take other kernels, which round otherwise
        hidden = model.model(TOKENS, output_hidden_states=True).hidden_states
        last = model.model.transformer.ln_f if "transformer.h.0" in model.block_names else model.model.model.norm
        normed = last(acts_BSLD[:, :, 2])
    assert acts_BSLD[:, :, 0].equal(hidden[1])
    assert acts_BSLD[:, :, 1].equal(hidden[2])
    assert not acts_BSLD[:, :, 2].equal(hidden[3])
    torch.testing.assert_close(normed, hidden[3], rtol=0, atol=4 * forward_pass())  # of size up to 4


def test_layers_come_in_the_order_asked_for(model):
    first, second, third = model.block_names
    forward, mixed = model.activations(TOKENS, [first, second, third]), model.activations(TOKENS, [third, first])
    assert mixed.equal(forward[:, :, [2, 0]])


def test_no_block_after_the_last_layer_read_is_computed(model):
    computed = []
    for name in model.block_names:
        model.model.get_submodule(name).register_forward_pre_hook(lambda *_, n=name: computed.append(n))
    model.model.get_output_embeddings().register_forward_pre_hook(lambda *_: computed.append("head"))
    model.activations(TOKENS, model.block_names[1::-1])
    assert computed == model.block_names[:2]
    model.logits(TOKENS)
    assert computed[2:] == [*model.block_names, "head"]


def test_reading_leaves_no_hook_and_no_gradient_behind(model):
    acts_BSLD = model.activations(TOKENS, model.block_names[:1])
    with pytest.raises(RuntimeError, match="went wrong"):
        model.logits(TOKENS, {model.block_names[0]: _fail})
    assert not acts_BSLD.requires_grad
    assert not any(module._forward_hooks for module in model.model.modules())
    with torch.inference_mode():
        assert model.logits(TOKENS).equal(model.model(TOKENS).logits)


def _fail(_acts_BSD):
    raise RuntimeError("went wrong")


def test_padding_on_the_right_changes_nothing_before_it(model):
    padded = torch.cat([TOKENS, torch.zeros(2, 4, dtype=torch.int64)], dim=1)
    found, expected = model.activations(padded, model.block_names)[:, :6], model.activations(TOKENS, model.block_names)
    torch.testing.assert_close(found, expected, rtol=0, atol=forward_pass() * float(expected.abs().max()))


def test_a_replaced_layer_gives_the_logits_computed_by_hand(directory):
    model = load(directory / "gpt2")
    body = model.model.transformer
    replacement_BSD = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))
    by_hand = model.model.lm_head(body.ln_f(body.h[2](replacement_BSD)))
    by_hand = by_hand if isinstance(by_hand, torch.Tensor) else by_hand[0]
    found = model.logits(TOKENS, {"transformer.h.1": lambda _: replacement_BSD})
    torch.testing.assert_close(found, by_hand, rtol=0, atol=forward_pass(num_blocks=1) * float(by_hand.abs().max()))


def test_several_layers_are_replaced_each_seeing_what_the_earlier_ones_changed(model):
    first, second, _ = model.block_names
    seen = {}
    clean_BSLD = model.activations(TOKENS, [first, second])
    model.logits(TOKENS, {second: lambda acts: seen.setdefault(second, acts), first: lambda acts: seen.setdefault(first, acts) * 0})
    assert seen[first].equal(clean_BSLD[:, :, 0])
    assert not seen[second].equal(clean_BSLD[:, :, 1])


def test_replacing_a_layer_by_itself_changes_nothing(model):
    same = {name: lambda acts: acts.double() for name in model.block_names}
    assert model.logits(TOKENS, same).equal(model.logits(TOKENS))
    assert not model.logits(TOKENS, {model.block_names[0]: torch.zeros_like}).equal(model.logits(TOKENS))


def test_a_replacement_of_another_shape_is_refused(model):
    with pytest.raises(ValueError, match=r"has shape \(2, 5, 16\), expected \(2, 6, 16\)"):
        model.logits(TOKENS, {model.block_names[0]: lambda acts: acts[:, 1:]})


def test_half_precision_is_computed_in_it(directory):
    model = load(directory / "llama", dtype="bfloat16")
    acts_BSLD = model.activations(TOKENS, model.block_names)
    assert acts_BSLD.dtype == torch.bfloat16
    exact_BSLD = load(directory / "llama").activations(TOKENS, model.block_names)
    # A third of what is never reached by chance: half precision must not be so coarse that this shows nothing.
    near = forward_pass(context_tokens=6, dtype=torch.bfloat16) / 3 * float(exact_BSLD.abs().max())
    torch.testing.assert_close(acts_BSLD.float(), exact_BSLD, rtol=0, atol=near)


def test_a_callers_autocast_does_not_reach_into_the_model(model):
    alone_BSLD, alone_BSV = model.activations(TOKENS, model.block_names), model.logits(TOKENS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.activations(TOKENS, model.block_names).equal(alone_BSLD)
        assert model.logits(TOKENS).equal(alone_BSV)


@pytest.mark.parametrize(("layer", "message"), [
    ("transformer.h.12", r"layers\[1\] is transformer\.h\.12, but .* has blocks 0 to 2 \(transformer\.h\.N\); use a smaller number"),
    ("transformer.h1", r"layers\[1\] is transformer\.h1, .*did you mean transformer\.h\.1\?"),
    ("lm_head", r"layers\[1\] is lm_head, .*; the first is transformer\.h\.0"),
])  # fmt: skip
def test_a_layer_that_the_model_does_not_have_is_refused(directory, layer, message):
    with pytest.raises(UserError, match=message):
        load(directory / "gpt2").check_layers(["transformer.h.0", layer])


def test_the_hash_is_of_the_content_and_not_of_the_place_or_the_dtype(directory, tmp_path):
    shutil.copytree(directory / "gpt2", tmp_path / "copy")
    model = load(directory / "gpt2")
    assert load(tmp_path / "copy", dtype="bfloat16").hash == model.hash
    assert load(directory / "llama").hash != model.hash
    tensors = safetensors.torch.load_file(tmp_path / "copy" / "model.safetensors")
    tensors["transformer.wte.weight"][3, 3] += 1e-3
    safetensors.torch.save_file(tensors, tmp_path / "copy" / "model.safetensors", metadata={"format": "pt"})
    changed = load(tmp_path / "copy").hash
    assert changed != model.hash
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config | {"layer_norm_epsilon": 1e-3}))
    assert load(tmp_path / "copy").hash != changed


def test_weights_in_several_files_are_hashed_whole(directory, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(directory / "gpt2")
    model.save_pretrained(tmp_path / "split", max_shard_size="20KB")
    assert len(list((tmp_path / "split").glob("model-*.safetensors"))) > 1
    first = load(tmp_path / "split").hash
    last_file = sorted((tmp_path / "split").glob("model-*.safetensors"))[-1]
    tensors = safetensors.torch.load_file(last_file)
    next(iter(tensors.values())).view(-1)[0] += 1
    safetensors.torch.save_file(tensors, last_file, metadata={"format": "pt"})
    assert load(tmp_path / "split").hash != first


def test_random_weights_need_no_weights_and_follow_their_seed(directory, tmp_path):
    tmp_path.joinpath("config.json").write_bytes((directory / "gpt2" / "config.json").read_bytes())
    state = torch.random.get_rng_state()
    one, same, other = (load(tmp_path, random_weights=True, random_weights_seed=seed) for seed in (1, 1, 2))
    assert torch.random.get_rng_state().equal(state)
    assert one.logits(TOKENS).equal(same.logits(TOKENS))
    assert one.hash == same.hash != other.hash
    assert load(tmp_path, random_weights=True, random_weights_seed=1, dtype="bfloat16").dtype == torch.bfloat16


def test_a_directory_that_is_missing_or_holds_no_model_is_named(tmp_path):
    with pytest.raises(UserError, match=r"language_model\.model is /nowhere/gpt2, which does not exist; put it back"):
        load("/nowhere/gpt2")
    with pytest.raises(UserError, match=r"the language model .* could not be loaded"):
        load(tmp_path)


def test_a_token_set_of_another_tokenizer_than_the_models_own_is_refused(directory, tmp_path):
    shutil.copytree(directory / "gpt2", tmp_path / "model")
    tiny_tokenizer(tmp_path / "model")
    own = load_tokenizer(str(tmp_path / "model"), revision=None, special_text="token", end_of_text=None).vocabulary.tokenizer_hash
    check_tokens(tiny_token_set(tmp_path / "own", tokenizer_hash=own), load(tmp_path / "model"))
    other = tiny_token_set(tmp_path / "other", tokenizer_hash="0123456789abcdef")
    with pytest.raises(UserError, match=r"other was made by tokenizer 0123456789ab, but .*model has .*check_tokenizer"):
        check_tokens(other, load(tmp_path / "model"))
    check_tokens(other, load(tmp_path / "model", check_tokenizer=False))
    check_tokens(other, load(directory / "gpt2"))  # it has no tokenizer to compare with
