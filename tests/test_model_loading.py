"""What is loaded is what the checkpoint holds: nothing drawn at random, nothing left out, no code of others, no traceback."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_architectures
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import tiny_tokenizer

from pipeline import weight_files
from pipeline.config.errors import UserError
from pipeline.config.language_model import LanguageModelConfig
from pipeline.language_model import LanguageModel

Weights = dict[str, torch.Tensor]


def load(path: Path, **changes: object) -> LanguageModel:
    return LanguageModel.load(LanguageModelConfig(model=str(path), device="cpu", **changes))


def refused(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        load(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    directory = tmp_path_factory.mktemp("saved")

    def give(architecture: str) -> Path:
        path = directory / architecture
        return path if path.exists() else tiny_architectures.save(architecture, path)

    return give


@pytest.fixture
def changed(saved: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of a saved model with its weights put through `change` and its config updated."""

    def give(architecture: str, change: Callable[[Weights], Weights] | None = None, **config: object) -> Path:
        path = Path(shutil.copytree(saved(architecture), tmp_path / "changed"))
        if change is not None:
            file = path / "model.safetensors"
            save_file({key: value.contiguous() for key, value in change(load_file(file)).items()}, file, metadata={"format": "pt"})
        described = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(described | config))
        return path

    return give


def without(*parts: str) -> Callable[[Weights], Weights]:
    return lambda weights: {key: value for key, value in weights.items() if not any(part in key for part in parts)}


def renamed(rename: Callable[[str], str]) -> Callable[[Weights], Weights]:
    return lambda weights: {rename(key): value for key, value in weights.items()}


# -- weights that are not the checkpoint's ------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model."])
def test_a_checkpoint_saved_from_within_a_wrapper_is_refused_and_the_prefix_said(changed, prefix):
    said = refused(changed("Llama", renamed(lambda key: prefix + key)))
    assert "lacks 30 of the model's 30 weights (lm_head.weight, model.embed_tokens.weight, " in said
    assert f"every name begins with a wrapper's {prefix!r}" in said


def test_a_checkpoint_without_its_head_is_refused_and_the_head_named(changed):
    assert "lacks 1 of the model's 30 weights (lm_head.weight), so that what runs" in refused(changed("Llama", without("lm_head")))


def test_a_checkpoint_without_some_blocks_is_refused(changed):
    said = refused(changed("Llama", without("layers.1.")))
    assert "lacks 9 of the model's 30 weights (model.layers.1.input_layernorm.weight, " in said


def test_a_config_that_promises_more_blocks_than_there_are_is_refused(changed):
    assert "lacks 9 of the model's 39 weights (model.layers.3." in refused(changed("Llama", num_hidden_layers=4))


def test_blocks_that_the_config_leaves_out_are_refused_and_counted(changed):
    assert "holds 9 that the model has no place for (model.layers.2." in refused(changed("Llama", num_hidden_layers=2))


def test_weights_of_another_shape_than_the_config_says_are_refused_with_both_shapes(changed):
    said = refused(changed("Llama", intermediate_size=48))
    assert "holds 9 of another shape than its config.json says (model.layers.0.mlp.down_proj.weight: (32, 64) instead of (32, 48)" in said


def test_biases_that_the_config_leaves_out_are_refused(changed):
    with_bias = renamed(lambda key: key)
    path = changed("Llama", lambda weights: with_bias(weights) | {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)})
    assert "holds 1 that the model has no place for (model.layers.0.self_attn.q_proj.bias)" in refused(path)


def test_an_adapter_is_refused_and_said_to_be_merged(changed):
    path = changed("Llama")
    (path / "adapter_config.json").write_text("{}")
    assert "holds an adapter (adapter_config.json)" in refused(path)


# -- what transformers loads rightly runs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "rename", "masks"),
    [
        # As the files of the hub are: without the prefix of the model with a head, and with the causal masks of older versions.
        ("GPT-2", lambda key: key.removeprefix("transformer."), ["h.{}.attn.bias"]),
        ("GPT-J", lambda key: key, ["transformer.h.{}.attn.bias", "transformer.h.{}.attn.masked_bias"]),
        ("GPT-Neo", lambda key: key, ["transformer.h.{}.attn.attention.bias", "transformer.h.{}.attn.attention.masked_bias"]),
        ("CodeGen", lambda key: key, ["transformer.h.{}.attn.causal_mask"]),
        ("GPT-NeoX", lambda key: key, ["gpt_neox.layers.{}.attention.bias", "gpt_neox.layers.{}.attention.rotary_emb.inv_freq"]),
        ("BLOOM", lambda key: key.removeprefix("transformer."), []),
        ("OPT", lambda key: key.removeprefix("model."), []),
        ("Llama", lambda key: key, ["model.layers.{}.self_attn.rotary_emb.inv_freq"]),
    ],
)
def test_checkpoints_as_the_hub_has_them_give_the_model_that_was_saved(saved, changed, architecture, rename, masks):
    buffers = {mask.format(index): torch.ones(1, 1, 8, 8) for mask in masks for index in range(3)}
    path = changed(architecture, lambda weights: renamed(rename)(weights) | buffers)
    tokens_BS = torch.tensor([[5, 9, 200, 7]])
    assert load(path).logits(tokens_BS).equal(load(saved(architecture)).logits(tokens_BS))


def test_a_head_that_is_tied_to_the_embeddings_need_not_be_in_the_file(saved):
    assert "lm_head.weight" not in load_file(saved("Gemma") / "model.safetensors")
    assert load(saved("Gemma")).d_model == 32


def test_the_text_of_a_model_for_pictures_too_is_loaded_whole(saved):
    model = load(saved("Gemma 3 (text and pictures)"))
    assert model.block_names == [f"model.language_model.layers.{index}" for index in range(3)]


def test_towers_for_pictures_beside_a_whole_text_model_are_left_out(changed):
    tower = {"vision_tower.layers.0.weight": torch.ones(2, 2), "multi_modal_projector.linear.weight": torch.ones(2, 2)}
    assert load(changed("Llama", lambda weights: weights | tower)).d_model == 32


def as_integers(name: str) -> Callable[[Weights], Weights]:
    return lambda weights: weights | {name: (weights[name] * 10).to(torch.int8)}


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias"])
@pytest.mark.parametrize("is_pickled", [False, True])
def test_integers_in_the_place_of_weights_are_refused_by_name(changed, name, is_pickled):
    bias = renamed(lambda key: key)
    path = changed("Qwen2", bias)
    file = path / "model.safetensors"
    weights = as_integers(name)(load_file(file))
    save_file(weights, file, metadata={"format": "pt"})
    if is_pickled:
        torch.save(weights, path / "pytorch_model.bin")
        file.unlink()
    said = refused(path)
    assert f"weights of the model are integers ({name}: int8), as quantized ones are, but config.json has no quantization_config" in said


def test_masks_of_integers_that_the_model_has_as_buffers_or_ignores_are_no_weights(changed):
    mask = torch.ones(1, 1, 8, 8, dtype=torch.uint8)
    path = changed("GPT-2", lambda weights: weights | {"transformer.h.0.attn.bias": mask, "transformer.h.1.attn.masked_bias": mask.clone()})
    assert load(path).d_model == 32


@pytest.fixture
def sharded(saved, tmp_path) -> Path:
    """A Llama in nine files."""
    transformers.AutoModelForCausalLM.from_pretrained(saved("Llama")).save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    return tmp_path / "sharded"


def test_a_weight_that_two_files_hold_is_refused_by_name(sharded):
    one, other = sorted(sharded.glob("*.safetensors"))[:2]
    weights = load_file(one)
    save_file(load_file(other) | weights, other, metadata={"format": "pt"})
    assert f"{one} and {other.name} both hold {', '.join(sorted(weights))}, and which of them counts" in refused(sharded)


@pytest.mark.parametrize("kept", [8, 0])
def test_an_index_that_leaves_out_files_is_named(sharded, kept):
    index = sharded / "model.safetensors.index.json"
    files = sorted(path.name for path in sharded.glob("*.safetensors"))
    described = json.loads(index.read_text())
    weights = described["weight_map"]
    described["weight_map"] = {key: file for key, file in weights.items() if file in files[:kept]}
    lacked = f"lacks {len(weights) - len(described['weight_map'])} of the model's 30 weights"
    index.write_text(json.dumps(described))
    (fault,) = weight_files.faults(sharded, {})
    assert fault.startswith(f"{index} leaves out {files[8]}," if kept else f"{index} has an empty `weight_map`")
    assert (lacked if kept else f"could not be loaded: {fault}") in refused(sharded)


# -- code of others ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_question(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))


@pytest.mark.usefixtures("no_question")
def test_a_model_that_needs_code_of_its_own_is_refused_without_a_question(changed):
    path = changed("Llama", model_type="odd", auto_map={"AutoConfig": "odd.OddConfig", "AutoModelForCausalLM": "odd.Odd"})
    (path / "odd.py").write_text("raise SystemExit('run')\n")
    assert "needs Python code that comes with it (auto_map in its config.json), which is never run here" in refused(path)


@pytest.mark.usefixtures("no_question")
@pytest.mark.parametrize("random_weights", [False, True])
def test_code_beside_a_model_that_transformers_knows_is_not_run(changed, random_weights):
    path = changed("Llama", auto_map={"AutoConfig": "odd.OddConfig", "AutoModelForCausalLM": "odd.Odd"})
    (path / "odd.py").write_text("raise SystemExit('run')\n")
    model = load(path, random_weights=random_weights)
    assert model.block_names[0] == "model.layers.0"
    (said,) = model.remarks
    assert said.startswith(
        f"{path} names Python code of its own for the model (auto_map: AutoConfig, AutoModelForCausalLM); it is not used"
    )


def test_a_type_that_this_transformers_does_not_know_is_said(changed):
    assert "is of model_type 'llama9', which transformers" in refused(changed("Llama", model_type="llama9"))


def test_a_model_that_is_no_causal_one_is_refused_by_its_type(saved):
    assert "is of model_type 't5', no causal language model to transformers" in refused(saved("T5"))


# -- files that can't be read ------------------------------------------------------------------------------------------------------


def lfs_pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 512\n")


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "said"),
    [(lfs_pointer, "is a pointer of Git LFS, .*git lfs pull"), (cut_off, "is cut off or damaged .*fetch it again"), (empty, "is cut off")],
)
def test_damaged_weights_are_one_sentence_that_names_the_file(changed, damage, said):
    path = changed("Llama")
    damage(path / "model.safetensors")
    with pytest.raises(UserError, match=f"model.safetensors {said}"):
        load(path)


@pytest.mark.parametrize("damage", [lfs_pointer, cut_off, empty])
def test_damaged_weights_of_the_older_kind_too(changed, damage):
    path = changed("Llama")
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    assert load(path).d_model == 32
    damage(path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin is"):
        load(path)


def test_one_damaged_file_of_several_is_named(saved, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(saved("Llama"))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    victim = sorted(tmp_path.glob("model-*.safetensors"))[1]
    cut_off(victim)
    assert f"{victim.name} is cut off" in refused(tmp_path)
    victim.unlink()
    assert victim.name in refused(tmp_path)


def test_a_damaged_tokenizer_beside_the_weights_is_named(changed):
    path = changed("Llama")
    tiny_tokenizer(path)
    cut_off(path / "tokenizer.json")
    assert "tokenizer.json is cut off or damaged" in refused(path)


def test_quantized_weights_without_their_library_are_one_sentence(changed):
    path = changed("Llama", quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    said = refused(path)
    assert "bitsandbytes" in said
    assert "not quantized" in said


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"hidden_act": "nope"}, "hidden_act"), ({"rope_parameters": {"rope_type": "nope"}}, "rope_parameters.rope_type")],
)
def test_a_value_that_transformers_does_not_know_is_said_with_its_field(changed, changes, field):
    path = changed("Llama", **changes)
    says = f"the language model '{path}' could not be loaded: transformers {transformers.__version__} says KeyError: 'nope'; look at "
    assert refused(path) == f"{says}{field} in {path / 'config.json'}, which is 'nope'"


def test_an_error_of_transformers_is_more_than_its_heading(changed):
    said = refused(changed("Llama", num_attention_heads="x"))
    assert "Validation error for field 'num_attention_heads': TypeError: Field 'num_attention_heads' expected int, got str" in said
