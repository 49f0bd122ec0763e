"""Models with the tokenizers that they really come with: more tokens than embeddings, several ends of text, beginning-of-text.

Each is built tiny after the published configuration of its kind, and goes from text to a metrics table.
"""

import io
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers
from token_fixtures import json_lines, make_texts, make_tokenizer, tokenize
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from pipeline import records
from pipeline.activations.opening import open_source
from pipeline.activations.token_check import check_tokens
from pipeline.config.activation_source import DiskActivations, StreamedActivations
from pipeline.config.cache_activations import CacheConfig
from pipeline.config.errors import UserError
from pipeline.config.evaluate_crosscoder import EvaluateConfig
from pipeline.config.language_model import LanguageModelConfig
from pipeline.config.schema import build
from pipeline.config.train_crosscoder import TrainConfig
from pipeline.crosscoder.checkpoint import load_crosscoder
from pipeline.language_model import LanguageModel
from pipeline.run import Run
from pipeline.stages import cache_activations, evaluate_crosscoder, train_crosscoder
from pipeline.text.tokenizer import load_tokenizer
from pipeline.tokens import TokenSet

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32}
LAYERS = ["model.layers.0", "model.layers.1"]
CPU = torch.device("cpu")


class Kind(NamedTuple):
    """What of a kind of model matters here. The tokenizer has 300 tokens and then `added`."""

    config: type
    added: list[str]
    embeddings: int
    bos: str | None
    call_adds_bos: bool
    eos: str
    config_eos: list[str] | str
    generation_eos: list[str] | str | None = None


KINDS = {
    # An image token beyond the embeddings; the call adds <bos>; the instruction-tuned model ends turns otherwise than texts.
    "gemma3": Kind(transformers.Gemma3TextConfig, ["<bos>", "<eos>", "<end_of_turn>", "<image>"], 303, "<bos>", True, "<eos>", "<eos>"),
    "gemma3-it": Kind(
        transformers.Gemma3TextConfig, ["<bos>", "<eos>", "<end_of_turn>", "<image>"], 303, "<bos>", True, "<eos>", ["<end_of_turn>"]
    ),
    # Embeddings padded beyond the tokenizer; no bos at all; generation_config names both ends, config one.
    "qwen2.5-it": Kind(
        transformers.Qwen3Config, ["<|end|>", "<|im_end|>"], 320, None, False, "<|end|>", "<|im_end|>", ["<|im_end|>", "<|end|>"]
    ),
    "llama3": Kind(transformers.LlamaConfig, ["<|begin|>", "<|end|>", "<|eot|>"], 303, "<|begin|>", True, "<|end|>", "<|end|>"),
    "llama3-it": Kind(transformers.LlamaConfig, ["<|begin|>", "<|end|>", "<|eot|>"], 303, "<|begin|>", True, "<|eot|>", ["<|end|>"]),
    # Its tokenizer has a bos that its call does not add.
    "smollm2": Kind(transformers.LlamaConfig, ["<|end|>", "<|im_end|>"], 302, "<|end|>", False, "<|im_end|>", "<|end|>"),
}


def save(kind: Kind, directory: Path) -> Path:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(make_texts(50, seed=1), trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False))
    assert backend.get_vocab_size() == 300
    backend.add_special_tokens(kind.added)
    if kind.call_adds_bos and kind.bos is not None:
        numbered = [(kind.bos, backend.token_to_id(kind.bos))]
        backend.post_processor = processors.TemplateProcessing(single=f"{kind.bos} $A", special_tokens=numbered)

    def ids(tokens: list[str] | str | None) -> Any:
        return [backend.token_to_id(token) for token in tokens] if isinstance(tokens, list) else backend.token_to_id(tokens or "none")

    # Their own classes are rewritten by transformers 5; the plain one takes the file as it is.
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=kind.bos, eos_token=kind.eos).save_pretrained(directory)
    sizes = SIZES | {"vocab_size": kind.embeddings, "max_position_embeddings": 64, "pad_token_id": 0}
    sizes |= {"head_dim": 8} if "head_dim" in kind.config().to_dict() else {}
    config = kind.config(**sizes, bos_token_id=ids(kind.bos), eos_token_id=ids(kind.config_eos))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.generation_config = transformers.GenerationConfig(eos_token_id=ids(kind.generation_eos or kind.config_eos))
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """For each kind a directory with `model` and `text/tokens/train`, made when first asked for."""

    class Made(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            directory = tmp_path_factory.mktemp(name)
            save(KINDS[name], directory / "model")
            (directory / "text").mkdir()
            (directory / "text/a.jsonl").write_bytes(json_lines(make_texts(60)))
            tokenize(directory / "text", tokenizer={"name": str(directory / "model")}, encoder="auto", validation_fraction=0.3)
            self[name] = directory
            return directory

    return Made()


def harvest(directory: Path, **changes: Any) -> dict[str, Any]:
    settings = {"tokens": directory / "text/tokens/train", "language_model": {"model": str(directory / "model"), "device": "cpu"}}
    settings |= {"layers": LAYERS, "context_tokens": 16, "contexts_per_generation": 24, "model_batch_contexts": 8}
    return settings | changes


def said_of(directory: Path, run: Path, **changes: Any) -> str:
    output = io.StringIO()
    open_source(StreamedActivations(kind="stream", **harvest(directory, **changes)), Run(run, output=output), CPU)
    return output.getvalue()


# -- four causes, four sentences --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_a_model_with_its_own_tokenizer_goes_from_text_to_a_metrics_table(made: dict[str, Path], tmp_path: Path, name: str) -> None:
    directory, kind = made[name], KINDS[name]
    values = {"stage": "train", "name": "x", "activations": {"kind": "disk", "path": tmp_path / "acts"}, "device": "cpu"}
    values |= {"crosscoder": {"num_features": 32, "activation_function": {"kind": "relu"}}, "num_tokens": 256, "batch_positions": 64}
    values |= {"loss": {}, "dead_window_tokens": 100}
    cache_activations.run(CacheConfig(name="x", output=tmp_path / "acts", **harvest(directory, max_tokens=300)), Run(tmp_path / "cache"))
    train_crosscoder.run(build(TrainConfig, values, "train"), Run(tmp_path / "train", stage="train"))
    settings = harvest(directory)
    config = EvaluateConfig(
        name="x",
        crosscoder=tmp_path / "train",
        tokens=directory / "text/tokens/validation",
        language_model=LanguageModelConfig(**settings["language_model"]),
        context_tokens=16,
        max_tokens=200,
    )
    output = io.StringIO()
    evaluate_crosscoder.run(config, Run(tmp_path / "evaluate", output=output))
    assert (tmp_path / "evaluate/metrics.json").exists()
    trained = load_crosscoder(tmp_path / "train").provenance
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory / "model")
    assert trained.beginning_of_text_id == (tokenizer.bos_token_id if kind.call_adds_bos else None)
    does = f"with beginning-of-text, id {trained.beginning_of_text_id}" if kind.call_adds_bos else "without beginning-of-text"
    assert f"contexts begin {does}, as in training" in output.getvalue()


def test_other_ends_of_text_than_the_models_run_and_both_are_named_with_the_setting(made: dict[str, Path], tmp_path: Path) -> None:
    said = said_of(made["smollm2"], tmp_path / "run")
    assert "ends its documents with id 301 (<|im_end|>), but the configuration of" in said
    assert "names id 300 (<|end|>) as the end of a text" in said
    assert "tokenizer.end_of_text, set when tokenizing, decides" in said
    # An instruction-tuned model's generation configuration names the base model's end too.
    for quiet in ("qwen2.5-it", "llama3"):
        assert "ends its documents" not in said_of(made[quiet], tmp_path / quiet)
    assert "names id 302 (<end_of_turn>) as the end" in said_of(made["gemma3-it"], tmp_path / "gemma3-it")


def test_a_real_mismatch_of_tokenizers_is_still_refused(made: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"was made by tokenizer [0-9a-f]{12}, but .*model has [0-9a-f]{12}"):
        said_of(made["llama3"], tmp_path / "run", tokens=made["smollm2"] / "text/tokens/train")


def test_a_text_that_has_a_token_beyond_the_embeddings_is_refused_with_the_id(made: dict[str, Path], tmp_path: Path) -> None:
    directory = made["gemma3"]
    (tmp_path / "a.jsonl").write_bytes(json_lines(["an <image> here"]))
    tokenize(tmp_path, tokenizer={"name": str(directory / "model")}, encoder="auto", validation_fraction=0.0)
    with pytest.raises(UserError, match=r"holds id 303, but .* has embeddings for ids up to 302; tokenize with the model's own"):
        said_of(directory, tmp_path / "run", tokens=tmp_path / "tokens/train")
    tokenize(tmp_path, output=str(tmp_path / "text"), tokenizer={"name": str(directory / "model"), "special_text": "text"},
             encoder="auto", validation_fraction=0.0)  # fmt: skip
    said_of(directory, tmp_path / "run-2", tokens=tmp_path / "text/train")


def test_an_end_of_text_beyond_the_embeddings_is_refused_with_the_setting(made: dict[str, Path], tmp_path: Path) -> None:
    directory = made["gemma3"]
    (tmp_path / "a.jsonl").write_bytes(json_lines(["a text"]))
    tokenize(tmp_path, tokenizer={"name": str(directory / "model"), "end_of_text": "<image>"}, validation_fraction=0.0)
    with pytest.raises(UserError, match=r"has id 303 \(<image>\) as its end of text, but .* with tokenizer\.end_of_text set"):
        said_of(directory, tmp_path / "run", tokens=tmp_path / "tokens/train")


# -- a directory's tokenizer and the file in it -----------------------------------------------------------------------------------


def test_a_tokenizer_that_transformers_rewrites_is_said_with_the_one_that_is_used(made: dict[str, Path], tmp_path: Path) -> None:
    save(KINDS["smollm2"], tmp_path / "model")
    transformers.Qwen2Config(**SIZES).save_pretrained(tmp_path / "model")  # by it transformers 5 takes a tokenizer class of its own
    path = tmp_path / "model/tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "Qwen2Tokenizer"}))
    definition = load_tokenizer(str(tmp_path / "model"), revision=None, special_text="token", end_of_text=None)
    (remark,) = definition.remarks
    assert "makes a Qwen2Tokenizer of" in remark
    assert f"transformers' ids are used, as its users get them. tokenizer.name={tmp_path}/model/tokenizer.json takes the file's" in remark
    file = load_tokenizer(str(tmp_path / "model/tokenizer.json"), revision=None, special_text="token", end_of_text="<|end|>")
    assert (file.remarks, file.vocabulary.tokenizer_hash == definition.vocabulary.tokenizer_hash) == ([], False)
    alike = load_tokenizer(str(made["smollm2"] / "model"), revision=None, special_text="token", end_of_text=None)
    assert (alike.remarks, alike.vocabulary.tokenizer_hash) == ([], file.vocabulary.tokenizer_hash)


def test_an_added_token_that_only_one_of_the_two_knows_is_a_difference(tmp_path: Path) -> None:
    save(KINDS["llama3"], tmp_path)
    path = tmp_path / "tokenizer.json"
    definition = json.loads(path.read_text())
    path.write_text(json.dumps(definition))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"additional_special_tokens": ["<|more|>"]}))
    (remark,) = load_tokenizer(str(tmp_path), revision=None, special_text="token", end_of_text=None).remarks
    assert "a<|more|>b" in remark


# -- beginning-of-text ------------------------------------------------------------------------------------------------------------


def test_a_token_set_knows_its_tokenizers_beginning_of_text_and_keeps_its_data_id(made: dict[str, Path]) -> None:
    known = {name: TokenSet.open(made[name] / "text/tokens/train").beginning_of_text for name in ("llama3", "smollm2", "qwen2.5-it")}
    assert known == {"llama3": (300, True), "smollm2": (300, False), "qwen2.5-it": (None, False)}
    manifest, shards = records.read_data_set(made["llama3"] / "text/tokens/train", "token-set/1", "token-shard/1")
    assert not any("beginning" in key for record in shards.values() for key in record)
    assert manifest["data_id"] == records.data_id(shards.values())
    assert manifest["end_of_text"] == "<|end|>"


def test_a_set_from_before_has_no_beginning_says_so_and_gets_it_recorded_without_being_made_again(
    made: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_bytes(json_lines(make_texts(20)))
    settings = {"tokenizer": {"name": str(made["llama3"] / "model")}, "validation_fraction": 0.0}
    tokenize(tmp_path, **settings)
    path = tmp_path / "tokens/train/manifest.json"
    new = records.read_json(path)
    older = {key: value for key, value in new.items() if key not in ("beginning_of_text_id", "adds_beginning_of_text", "end_of_text")}
    records.write_json(path, records.with_checksum(older))
    said = said_of(made["llama3"], tmp_path / "run", tokens=tmp_path / "tokens/train")
    assert "contexts begin without beginning-of-text: whether the tokenizer's call adds one was not recorded; to have it" in said
    with pytest.raises(UserError, match=r"beginning_of_text is true, but no such token is known: .* was made before it was recorded"):
        said_of(made["llama3"], tmp_path / "run", tokens=tmp_path / "tokens/train", beginning_of_text=True)
    assert tokenize(tmp_path, run=Run(tmp_path / "again"), **settings)["this_run"]["lines"] == 0
    assert records.read_json(path) == new
    assert "begins with beginning-of-text, id 300, as the tokenizer's own call adds it" in said_of(
        made["llama3"], tmp_path / "run-2", tokens=tmp_path / "tokens/train"
    )


@pytest.mark.parametrize(
    ("name", "setting", "wanted"),
    [("llama3", "auto", 300), ("llama3", False, None), ("smollm2", "auto", None), ("smollm2", True, 300), ("qwen2.5-it", "auto", None)],
)
def test_auto_does_what_the_tokenizers_call_does_and_the_setting_the_contrary(
    made: dict[str, Path], tmp_path: Path, name: str, setting: Any, wanted: int | None
) -> None:
    settings = StreamedActivations(kind="stream", **harvest(made[name], beginning_of_text=setting))
    output = io.StringIO()
    source = open_source(settings, Run(tmp_path / "run", output=output), CPU)
    assert source.provenance.beginning_of_text_id == wanted
    assert ("every context begins with beginning-of-text" if wanted else "contexts begin without beginning-of-text") in output.getvalue()


def test_a_tokenizer_without_the_token_cannot_be_asked_for_it(made: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="beginning_of_text is true, but no such token is known: the tokenizer has none"):
        said_of(made["qwen2.5-it"], tmp_path / "run", beginning_of_text=True)


def test_every_id_of_the_text_is_a_position_once_and_beginning_of_text_none(made: dict[str, Path], tmp_path: Path) -> None:
    directory = made["llama3"]
    tokens = TokenSet.open(directory / "text/tokens/train")
    ids = np.concatenate([shard.ids for shard in tokens.shards])
    wanted = sorted(np.where(ids == tokens.separator, tokens.end_of_text_id, ids).tolist())
    for drop_positions in ([0], []):
        settings = harvest(directory, drop_positions=drop_positions)
        source = open_source(StreamedActivations(kind="stream", **settings), Run(tmp_path / f"{len(drop_positions)}"), CPU)
        batches = list(source.batches(batch_positions=50, epoch=0, cursor=0))
        assert sorted(torch.cat([batch.tokens_B for batch in batches]).tolist()) == wanted
        assert source.num_positions == len(wanted)
        positions = torch.cat([batch.positions_B for batch in batches])
        assert (int(positions.min()), int(positions.max())) == (1, 15)
        assert source.provenance.drop_positions == [0]
        assert source.statistics.num_positions == min(len(wanted), source.statistics.num_positions)


def test_with_beginning_of_text_disk_and_stream_give_the_same_batches_resumed_or_not(made: dict[str, Path], tmp_path: Path) -> None:
    settings = harvest(made["llama3"])
    result = cache_activations.run(CacheConfig(name="x", output=tmp_path / "acts", **settings), Run(tmp_path / "cache"))
    disk = open_source(DiskActivations(path=tmp_path / "acts"), Run(tmp_path / "disk"), CPU)
    streamed = open_source(StreamedActivations(kind="stream", **settings), Run(tmp_path / "stream"), CPU)
    assert disk.num_positions == streamed.num_positions == result["positions"]
    assert disk.provenance == streamed.provenance
    for epoch, cursor in ((0, 0), (1, 0), (1, 57)):
        both = [list(source.batches(batch_positions=33, epoch=epoch, cursor=cursor)) for source in (disk, streamed)]
        assert len(both[0]) == len(both[1]) > 3
        for one, other in zip(*both, strict=True):
            assert all(a.equal(b) for a, b in zip(one, other, strict=True))
    whole = torch.cat([batch.tokens_B for batch in disk.batches(batch_positions=33, epoch=1, cursor=0)])
    rest = torch.cat([batch.tokens_B for batch in disk.batches(batch_positions=33, epoch=1, cursor=57)])
    assert whole[57:].equal(rest)


def test_the_model_reads_the_token_before_every_context(made: dict[str, Path], tmp_path: Path) -> None:
    """One context by hand: its activations are those of the model on [bos, ids...]."""
    directory = made["llama3"]
    source = open_source(
        StreamedActivations(kind="stream", **harvest(directory, max_tokens=15, contexts_per_generation=1)), Run(tmp_path / "r"), CPU
    )
    (batch,) = source.batches(batch_positions=15, epoch=0, cursor=0)
    order = batch.positions_B.argsort()
    model = LanguageModel.load(LanguageModelConfig(model=str(directory / "model"), device="cpu"))
    acts_BSLD = model.activations(torch.cat([torch.tensor([300]), batch.tokens_B[order]])[None], LAYERS)
    torch.testing.assert_close(batch.acts_BLD[order], acts_BSLD[0, 1:], rtol=1e-4, atol=1e-5)


def test_identities_differ_with_and_without_it_and_a_set_is_not_continued_otherwise(made: dict[str, Path], tmp_path: Path) -> None:
    directory, ids = made["llama3"], []
    for setting in ("auto", True, False):
        run = Run(tmp_path / str(setting))
        ids.append(open_source(StreamedActivations(kind="stream", **harvest(directory, beginning_of_text=setting)), run, CPU).data_id)
    assert ids[0] == ids[1] != ids[2]
    made_of = {}
    for setting in ("auto", False):
        config = CacheConfig(name="x", output=tmp_path / f"acts-{setting}", **harvest(directory, beginning_of_text=setting))
        made_of[setting] = cache_activations.run(config, Run(tmp_path / f"cache-{setting}"))["data_id"]
    assert made_of["auto"] != made_of[False]
    record = records.read_json(tmp_path / "acts-auto/000000.json")
    assert record["beginning_of_text_id"] == 300
    assert "beginning_of_text_id" not in records.read_json(tmp_path / "acts-False/000000.json")
    config = CacheConfig(name="x", output=tmp_path / "acts-auto", **harvest(directory, beginning_of_text=False))
    with pytest.raises(UserError, match=r"was made with other settings: inputs\.beginning_of_text_id was 300, now it is null"):
        cache_activations.run(config, Run(tmp_path / "again"))


def test_the_token_has_to_be_among_the_embeddings(made: dict[str, Path]) -> None:
    model = LanguageModel.load(LanguageModelConfig(model=str(made["llama3"] / "model"), device="cpu"))
    tokens = TokenSet.open(made["llama3"] / "text/tokens/train")
    with pytest.raises(UserError, match=r"would begin with beginning-of-text id 999, but .* set beginning_of_text to false"):
        check_tokens(tokens, model, beginning_of_text_id=999)


def test_a_tokenizer_that_drops_merges_at_random_is_refused_however_it_is_named(tmp_path: Path) -> None:
    file = make_tokenizer(tmp_path / "tokenizer.json")
    described = json.loads(file.read_text())
    file.write_text(json.dumps(described | {"model": described["model"] | {"dropout": 0.5}}))
    for name in (file, tmp_path):
        with pytest.raises(UserError, match=r"tokenizer: .*tokenizer\.json has model\.dropout 0\.5, which drops merges at random"):
            load_tokenizer(str(name), revision=None, special_text="token", end_of_text=None)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}')
    with pytest.raises(UserError, match=r"model\.dropout 0\.5"):
        load_tokenizer(str(tmp_path), revision=None, special_text="token", end_of_text=None)


def test_code_that_a_tokenizer_brings_along_is_not_run_and_that_is_said(tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "tokenizer.json")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    settings |= {"auto_map": {"AutoTokenizer": ["odd.OddTokenizer", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "odd.py").write_text("raise SystemExit('run')\n")
    (said,) = load_tokenizer(str(tmp_path), revision=None, special_text="token", end_of_text=None).remarks
    assert said.startswith(f"{tmp_path} names Python code of its own for the tokenizer (auto_map: AutoTokenizer); it is not used")
