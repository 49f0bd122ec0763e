"""What a source of activations refuses: settings that do not fit, other inputs than before, and damage."""

import shutil

import activation_pieces
import pytest
import torch
from activation_pieces import CPU, harvest_settings, read
from tiny_models import tiny_token_set

from pipeline import records
from pipeline.activations.opening import open_source
from pipeline.activations.shards import ActivationSet
from pipeline.config.activation_source import DiskActivations, StreamedActivations
from pipeline.config.errors import UserError
from pipeline.language_model import LanguageModel
from pipeline.run import Run
from pipeline.tokens import write_token_set

inputs, pair = activation_pieces.inputs, activation_pieces.pair


@pytest.mark.parametrize("kind", [0, 1], ids=["disk", "stream"])
def test_a_cursor_beyond_the_epoch_is_refused(pair, kind):
    with pytest.raises(UserError, match="the position in the data is 100,000, but an epoch has"):
        read(pair[kind], cursor=100_000)


def test_another_token_set_in_place_of_the_first_is_refused(inputs, tmp_path):
    shutil.copytree(inputs / "tokens", tmp_path / "tokens")
    settings = StreamedActivations(kind="stream", **harvest_settings(inputs, tokens=tmp_path / "tokens"))
    open_source(settings, Run(tmp_path / "run"), CPU)
    shutil.rmtree(tmp_path / "tokens")
    tiny_token_set(tmp_path / "tokens", seed=1)
    with pytest.raises(UserError, match=r"input tokens is .* but this run began with"):
        open_source(settings, Run(tmp_path / "run"), CPU)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": ["transformer.h.3"]}, r"layers\[0\] is transformer\.h\.3, but .* has blocks 0 to 2 .*use a smaller number"),
        ({"context_tokens": 65}, "context_tokens is 65, but .* reads at most 64 tokens"),
        ({"drop_positions": list(range(16))}, "has no position left"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(inputs, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        open_source(StreamedActivations(kind="stream", **harvest_settings(inputs, **changes)), Run(tmp_path / "run"), CPU)


@pytest.mark.parametrize(
    ("greatest", "end", "message"),
    [
        (300, 0, "tokens holds id 300, but .* has embeddings for ids up to 299; tokenize with the model's own tokenizer"),
        (
            3,
            300,
            r"tokens has id 300 \(END\) as its end of text, but .* has embeddings for ids up to 299; .* with tokenizer.end_of_text set",
        ),
        (
            3,
            5,
            r"ends its documents with id 5 \(END\), but the configuration of .* names id 0 as .*, and no tokenizer beside the model shows",
        ),
    ],
    ids=["an-id-beyond", "the-end-beyond", "other-ends"],
)
def test_tokens_that_the_model_cannot_read_or_may_not_be_its_own_are_refused(inputs, tmp_path, greatest, end, message):
    facts = {"end_of_text": "END"}
    write_token_set(tmp_path / "tokens", {"a": [[1, 2, greatest]]}, vocab_size=400, end_of_text_id=end, facts=facts)
    settings = StreamedActivations(kind="stream", **harvest_settings(inputs, tokens=tmp_path / "tokens"))
    with pytest.raises(UserError, match=message):
        open_source(settings, Run(tmp_path / "run"), CPU)


def test_a_buffer_that_does_not_fit_is_refused(inputs, tmp_path, monkeypatch):
    source = open_source(StreamedActivations(kind="stream", **harvest_settings(inputs)), Run(tmp_path / "run"), CPU)

    def full(*_args, **_kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(
        UserError,
        match=r"a buffer of [0-9]+ positions, [0-9] generations, takes .* set shuffle_generations below [0-9], or .* below 6",
    ):
        list(source.batches(batch_positions=10, epoch=0, cursor=0))


def test_a_model_batch_that_does_not_fit_is_refused(inputs, tmp_path, monkeypatch):
    source = open_source(StreamedActivations(kind="stream", **harvest_settings(inputs)), Run(tmp_path / "run"), CPU)

    def full(*_args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(LanguageModel, "activations", full)
    with pytest.raises(UserError, match=r"too little memory for .* on 4 contexts at once; set model_batch_contexts"):
        list(source.batches(batch_positions=10, epoch=0, cursor=0))


def flip_a_bit(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


def test_no_row_of_a_shard_with_a_flipped_bit_is_given(pair, tmp_path):
    flip_a_bit(tmp_path / "set" / "000002.safetensors", 5000)
    source = open_source(DiskActivations(path=tmp_path / "set", shuffle_generations=1), Run(tmp_path / "again"), CPU)
    given = []
    with pytest.raises(UserError, match=r"000002\.safetensors does not have the bytes that were written .* delete .*000002\.json"):
        given.extend(source.batches(batch_positions=1, epoch=0, cursor=0))
    rows = [record["num_positions"] for record in records.committed_shards(tmp_path / "set", "activation-shard/1").values()]
    assert len(given) == sum(rows[:2])
    assert [("000002.safetensors does not have the bytes" in damage) for damage in records.verify(tmp_path / "set")] == [True]


def test_a_shard_is_rehashed_once_a_start_and_not_at_all_when_told_so(pair, tmp_path, monkeypatch):
    rehashed = []
    monkeypatch.setattr(records, "check_hashes", lambda directory, stem, record: rehashed.append(stem))
    source = ActivationSet.open(tmp_path / "set", CPU)
    for epoch in (0, 1):
        list(source.batches(batch_positions=50, epoch=epoch, cursor=100))
    assert sorted(rehashed) == sorted(path.stem for path in (tmp_path / "set").glob("*.safetensors"))
    list(ActivationSet.open(tmp_path / "set", CPU, check_hashes=False).batches(batch_positions=50, epoch=0, cursor=0))
    assert len(rehashed) == len(set(rehashed))


def test_a_stream_from_a_token_set_with_a_flipped_bit_is_refused(inputs, tmp_path):
    shutil.copytree(inputs / "tokens", tmp_path / "tokens")
    flip_a_bit(next((tmp_path / "tokens").glob("*.bin")), 0)
    config = StreamedActivations(kind="stream", **harvest_settings(inputs, tokens=tmp_path / "tokens"))
    with pytest.raises(UserError, match=r"\.bin does not have the bytes that were written"):
        open_source(config, Run(tmp_path / "run"), CPU)


def test_a_shard_cut_short_is_found_on_opening_and_while_it_is_read(pair, tmp_path):
    path = tmp_path / "set" / "000001.safetensors"
    size = path.stat().st_size
    whole = shutil.copytree(tmp_path / "set", tmp_path / "whole")
    with open(path, "r+b") as file:
        file.truncate(size - 1)
    with pytest.raises(UserError, match=f"000001.safetensors holds {size - 1:,} bytes, its record says {size:,}"):
        ActivationSet.open(tmp_path / "set", CPU)
    opened_before = ActivationSet.open(whole, CPU, check_hashes=False)
    with open(whole / path.name, "r+b") as file:
        file.truncate(size - 1)
    with pytest.raises(UserError, match=f"000001.safetensors ends at byte {size - 1:,}, expected {size:,}"):
        read(opened_before)


def test_a_damaged_header_is_found_when_the_shard_is_read(pair, tmp_path):
    flip_a_bit(tmp_path / "set" / "000000.safetensors", 20)
    with pytest.raises(UserError, match=r"000000\.safetensors does not have the header that its record asks for"):
        read(ActivationSet.open(tmp_path / "set", CPU, check_hashes=False))


def test_a_set_that_is_not_finished_is_refused(pair, tmp_path):
    (tmp_path / "set" / "manifest.json").unlink()
    with pytest.raises(UserError, match="not a finished data set"):
        ActivationSet.open(tmp_path / "set", CPU)
