"""Disk and stream give the same batches, every position once an epoch, from any point on."""

import itertools
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
from tiny_models import tiny_gpt2, tiny_token_set

from pipeline import records
from pipeline.activations import layer_sums
from pipeline.activations.opening import open_source
from pipeline.activations.order import Order, batch_pieces, generation_order
from pipeline.activations.shards import ActivationSet
from pipeline.activations.source import LayerStatistics
from pipeline.config.activation_source import DiskActivations, Harvest, StreamedActivations
from pipeline.config.cache_activations import CacheConfig
from pipeline.config.errors import UserError
from pipeline.contexts import Contexts
from pipeline.language_model import LanguageModel
from pipeline.permutation import Permutation
from pipeline.run import Run, Stopped
from pipeline.stages import cache_activations
from pipeline.tokens import TokenSet, write_token_set

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("inputs")
    tiny_gpt2(directory / "model")
    tiny_token_set(directory / "tokens", num_documents=12)
    return directory


def harvest_settings(inputs, **changes):
    settings = {
        "tokens": inputs / "tokens",
        "language_model": {"model": str(inputs / "model"), "device": "cpu"},
        "layers": ["transformer.h.1", "transformer.h.0"],
        "context_tokens": 16,
        "contexts_per_generation": 6,
        "model_batch_contexts": 4,
        "seed": 7,
    }
    return settings | changes


@pytest.fixture
def pair(inputs, tmp_path, request):
    """The same activations from disk and as a stream; parametrized by generation size and model batch size."""
    contexts_per_generation, model_batch_contexts = getattr(request, "param", (6, 4))
    sizes = {"contexts_per_generation": contexts_per_generation, "model_batch_contexts": model_batch_contexts}
    settings = harvest_settings(inputs, **sizes)
    cache_activations.run(CacheConfig(name="test", output=tmp_path / "set", **settings), Run(tmp_path / "cache"))
    disk = open_source(DiskActivations(path=tmp_path / "set"), Run(tmp_path / "disk"), CPU)
    streamed = open_source(StreamedActivations(kind="stream", **settings), Run(tmp_path / "stream"), CPU)
    return disk, streamed


def read(source, *, batch_positions=50, epoch=0, cursor=0):
    return list(source.batches(batch_positions=batch_positions, epoch=epoch, cursor=cursor))


def joined(batches):
    return [torch.cat(columns) for columns in zip(*batches, strict=True)]


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert all(a.equal(b) and a.dtype == b.dtype for a, b in zip(batch, other, strict=True))


def places(batches):
    """Which rows came, as sorted (document, position, token, first activation) tuples."""
    acts, tokens, documents, positions = joined(batches)
    return sorted(zip(documents.tolist(), positions.tolist(), tokens.tolist(), acts[:, 0, 0].tolist(), strict=True))


@pytest.mark.parametrize("pair", [(12, 5), (1, 1), (1000, 7)], ids=["several", "a-context-each", "all-in-one"], indirect=True)
@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_disk_and_stream_give_the_same_batches(pair, epoch):
    disk, streamed = pair
    assert disk.num_positions == streamed.num_positions
    for batch_positions in (1, 50, 10_000) if epoch == 0 else (33,):
        assert_same(read(disk, batch_positions=batch_positions, epoch=epoch), read(streamed, batch_positions=batch_positions, epoch=epoch))


@pytest.mark.parametrize("kind", [0, 1], ids=["disk", "stream"])
def test_every_position_comes_exactly_once_an_epoch(pair, inputs, kind):
    source = pair[kind]
    contexts = Contexts(TokenSet.open(inputs / "tokens"), 16)
    read_all = contexts.read(np.arange(len(contexts)))
    kept = (np.arange(16) < read_all.lengths_B[:, None]) & (np.arange(16) > 0)
    positions = np.broadcast_to(np.arange(16), kept.shape)
    expected = sorted(zip(read_all.documents_BS[kept].tolist(), positions[kept].tolist(), read_all.tokens_BS[kept].tolist(), strict=True))
    epochs = [places(read(source, epoch=epoch)) for epoch in range(3)]
    assert [row[:3] for row in epochs[0]] == expected
    assert len(expected) == source.num_positions
    assert epochs[0] == epochs[1] == epochs[2]


@pytest.mark.parametrize("kind", [0, 1], ids=["disk", "stream"])
def test_epochs_have_orders_of_their_own(pair, kind):
    first, second, again = (joined(read(pair[kind], epoch=epoch)) for epoch in (0, 1, 1))
    assert not first[1].equal(second[1])
    assert second[1].equal(again[1])


@pytest.mark.parametrize("kind", [0, 1], ids=["disk", "stream"])
def test_resumed_at_any_cursor_is_the_same_as_uninterrupted(pair, kind):
    source = pair[kind]
    whole = read(source, batch_positions=30, epoch=1)
    for number in range(len(whole) + 1):
        cursor = min(30 * number, source.num_positions)
        assert_same(read(source, batch_positions=30, epoch=1, cursor=cursor), whole[number:])
    rows = joined(whole)
    for cursor in (1, 29, 31, source.num_positions - 1):
        rest = joined(read(source, batch_positions=64, epoch=1, cursor=cursor))
        assert all(a[cursor:].equal(b) for a, b in zip(rows, rest, strict=True))


@pytest.mark.parametrize("kind", [0, 1], ids=["disk", "stream"])
def test_a_cursor_beyond_the_epoch_is_refused(pair, kind):
    with pytest.raises(UserError, match="the position in the data is 100,000, but an epoch has"):
        read(pair[kind], cursor=100_000)


@pytest.mark.parametrize("kind", [0, 1], ids=["disk", "stream"])
def test_batches_are_full_but_for_the_last(pair, kind):
    sizes = [len(batch.tokens_B) for batch in read(pair[kind], batch_positions=50)]
    assert set(sizes[:-1]) == {50}
    assert sum(sizes) == pair[kind].num_positions


@pytest.mark.parametrize("kind", [0, 1], ids=["disk", "stream"])
def test_batches_can_be_trained_on(pair, kind):
    weight = torch.ones(2, 16, requires_grad=True)
    (read(pair[kind])[0].acts_BLD * weight).sum().backward()
    assert weight.grad is not None


def count_passes(monkeypatch):
    passes = []
    forward = LanguageModel.activations
    monkeypatch.setattr(LanguageModel, "activations", lambda self, *args: passes.append(1) or forward(self, *args))
    return passes


@pytest.mark.parametrize("pair", [(6, 1)], ids=["a-context-a-pass"], indirect=True)
def test_the_stream_computes_the_next_generation_while_this_one_is_consumed(pair, monkeypatch):
    passes = count_passes(monkeypatch)
    counts = [len(passes) for _ in pair[1].batches(batch_positions=10, epoch=0, cursor=0)]
    # A generation is 6 contexts of up to 15 kept positions, in 6 passes: the first fill; then 10 rows leave room for one or two.
    assert 6 <= counts[0] <= 8
    steps = [after - before for before, after in itertools.pairwise(counts)]
    assert max(steps) <= 3
    assert counts[-1] == _order(pair[1]).num_contexts


def _order(source):
    return source._harvester.order


def test_resuming_the_stream_computes_at_most_one_generation_again(pair, monkeypatch):
    source = pair[1]
    rows = _order(source).rows
    passes = count_passes(monkeypatch)
    list(source.batches(batch_positions=1000, epoch=0, cursor=int(rows[:-1].sum()) + 1))
    assert len(passes) == len(_order(source).model_batches(len(rows) - 1))


def test_statistics_of_a_stream_over_all_contexts_are_those_on_disk(inputs, tmp_path, pair):
    settings = StreamedActivations(kind="stream", statistics_contexts=10_000, **harvest_settings(inputs))
    streamed = open_source(settings, Run(tmp_path / "all"), CPU).statistics
    disk = pair[0].statistics
    assert streamed.num_positions == disk.num_positions
    torch.testing.assert_close(streamed.mean_LD, disk.mean_LD, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(streamed.mean_squared_norm_L, disk.mean_squared_norm_L, rtol=1e-12, atol=0)


@pytest.mark.parametrize("place", ["disk", "stream"])
def test_statistics_leave_position_0_out_even_where_it_is_kept(inputs, tmp_path, place):
    settings = harvest_settings(inputs, drop_positions=[])
    if place == "disk":
        cache_activations.run(CacheConfig(name="test", output=tmp_path / "set", **settings), Run(tmp_path / "run"))
        source = ActivationSet.open(tmp_path / "set", CPU)
    else:
        source = open_source(StreamedActivations(kind="stream", statistics_contexts=10_000, **settings), Run(tmp_path / "run"), CPU)
    rows = next(iter(source.batches(batch_positions=source.num_positions, epoch=0, cursor=0)))
    assert len(rows.acts_BLD) == source.num_positions
    counted = rows.acts_BLD[rows.positions_B > 0].double()
    assert source.statistics.num_positions == len(counted) < source.num_positions
    torch.testing.assert_close(source.statistics.mean_LD, counted.mean(0), rtol=1e-10, atol=1e-12)


def test_statistics_of_a_stream_are_of_its_leading_contexts(inputs, tmp_path):
    settings = StreamedActivations(kind="stream", statistics_contexts=8, **harvest_settings(inputs))
    source = open_source(settings, Run(tmp_path / "run"), CPU)
    batches = _order(source).model_batches(0) + _order(source).model_batches(1)
    # 4 + 2 contexts of the first generation, then 4 of the second: whole model batches, until 8 are reached.
    assert source.statistics.num_positions == sum(batch.num_rows for batch in batches[:3])


def test_the_identity_of_a_stream_follows_what_decides_its_rows(inputs, tmp_path):
    def data_id(**changes):
        settings = StreamedActivations(kind="stream", **harvest_settings(inputs, **changes))
        return open_source(settings, Run(tmp_path / str(len(list(tmp_path.iterdir())))), CPU).data_id

    original = data_id()
    assert original == data_id(statistics_contexts=3)
    shutil.copytree(inputs / "model", tmp_path / "model")
    assert original == data_id(language_model={"model": str(tmp_path / "model"), "device": "auto"})
    changes = [{"seed": 8}, {"layers": ["transformer.h.0"]}, {"drop_positions": []}, {"max_tokens": 9}, {"model_batch_contexts": 3}]
    assert len({original, *(data_id(**change) for change in changes)}) == 1 + len(changes)


def test_another_token_set_in_place_of_the_first_is_refused(inputs, tmp_path):
    shutil.copytree(inputs / "tokens", tmp_path / "tokens")
    settings = StreamedActivations(kind="stream", **harvest_settings(inputs, tokens=tmp_path / "tokens"))
    open_source(settings, Run(tmp_path / "run"), CPU)
    shutil.rmtree(tmp_path / "tokens")
    tiny_token_set(tmp_path / "tokens", seed=1)
    with pytest.raises(UserError, match=r"input tokens is .* but this run began with"):
        open_source(settings, Run(tmp_path / "run"), CPU)


def test_a_stop_reaches_into_the_filling_of_the_buffer(inputs, tmp_path):
    run = Run(tmp_path / "run")
    source = open_source(StreamedActivations(kind="stream", **harvest_settings(inputs)), run, CPU)
    batches = source.batches(batch_positions=10, epoch=0, cursor=0)
    next(batches)
    run.request_stop("time is up")
    with pytest.raises(Stopped):
        list(batches)


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
    ("vocab_size", "end", "message"),
    [
        (301, 0, "a vocabulary of 301 ids, but .* knows 300"),
        (300, 5, "has end-of-text id 5, but .* has 0: it is another tokenizer's"),
    ],
)
def test_tokens_of_another_tokenizer_are_refused(inputs, tmp_path, vocab_size, end, message):
    write_token_set(tmp_path / "tokens", {"a": [[1, 2, 3]]}, vocab_size=vocab_size, end_of_text_id=end)
    settings = StreamedActivations(kind="stream", **harvest_settings(inputs, tokens=tmp_path / "tokens"))
    with pytest.raises(UserError, match=message):
        open_source(settings, Run(tmp_path / "run"), CPU)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_too_disk_and_stream_give_the_same_batches(inputs, tmp_path):
    settings = harvest_settings(inputs, language_model={"model": str(inputs / "model"), "dtype": "bfloat16"})
    cache_activations.run(CacheConfig(name="test", output=tmp_path / "set", **settings), Run(tmp_path / "cache"))
    gpu = torch.device("cuda")
    disk = open_source(DiskActivations(path=tmp_path / "set"), Run(tmp_path / "disk"), gpu)
    streamed = open_source(StreamedActivations(kind="stream", **settings), Run(tmp_path / "stream"), gpu)
    assert_same(read(disk, batch_positions=33, epoch=1), read(streamed, batch_positions=33, epoch=1))


def test_a_buffer_that_does_not_fit_is_refused(inputs, tmp_path, monkeypatch):
    source = open_source(StreamedActivations(kind="stream", **harvest_settings(inputs)), Run(tmp_path / "run"), CPU)

    def full(*_args, **_kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(UserError, match=r"a generation of [0-9]+ positions takes .* set contexts_per_generation below 6"):
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
    source = open_source(DiskActivations(path=tmp_path / "set"), Run(tmp_path / "again"), CPU)
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


def test_rows_beside_each_other_come_from_many_contexts(inputs):
    settings = Harvest(**harvest_settings(inputs, context_tokens=100, contexts_per_generation=50))
    order = Order(np.full(200, 100), settings)
    places_of_rows = order.places(1, CPU)
    context_of_place = torch.empty_like(places_of_rows)
    context_of_place[places_of_rows] = torch.arange(50 * 99) // 99
    for batch in context_of_place.split(99):
        assert len(batch.unique()) > 30  # 50 (1 - (1 - 1/50)^99) = 43 expected


def test_generations_of_the_same_size_are_shuffled_differently(inputs):
    order = Order(np.full(12, 16), Harvest(**harvest_settings(inputs)))
    assert not order.places(0, CPU).equal(order.places(1, CPU))


def test_rows_lie_where_the_order_puts_them(pair, tmp_path, inputs):
    order = _order(pair[1])
    contexts = Contexts(TokenSet.open(inputs / "tokens"), 16)
    for generation in range(order.num_generations):
        # Independently of harvest and buffer: the contexts of the generation, position by position.
        harvested = []
        for index in Permutation(len(contexts), seed=7)(torch.arange(*order.context_range(generation))).tolist():
            context = contexts.read(np.array([index]))
            harvested += [(int(context.documents_BS[0, p]), p, int(context.tokens_BS[0, p])) for p in range(1, int(context.lengths_B[0]))]
        stored = safetensors.torch.load_file(tmp_path / "set" / f"{generation:06d}.safetensors")
        columns = [stored[name].tolist() for name in ("document", "position", "token")]
        on_disk = list(zip(*columns, strict=True))
        assert [on_disk[place] for place in order.places(generation, CPU).tolist()] == harvested


def test_pieces_worked_by_hand():
    rows = np.array([3, 0, 4, 2])
    pieces = batch_pieces(rows, seed=0, epoch=0, cursor=2, batch_positions=4)
    assert [[tuple(piece) for piece in batch] for batch in pieces] == [[(0, 2, 3), (2, 0, 3)], [(2, 3, 4), (3, 0, 2)]]
    assert list(batch_pieces(rows, seed=0, epoch=0, cursor=9, batch_positions=4)) == []


def test_later_epochs_take_the_generations_in_other_orders():
    orders = [generation_order(20, seed=3, epoch=epoch) for epoch in range(4)]
    assert orders[0] == list(range(20))
    assert len({tuple(order) for order in orders}) == 4
    assert all(sorted(order) == orders[0] for order in orders)


def test_sums_of_parts_are_the_sums_of_the_whole():
    acts_BLD = torch.randn(10_000, 2, 3)
    whole, parts = layer_sums.LayerSums(2, 3), [layer_sums.LayerSums(2, 3) for _ in range(2)]
    whole.add(acts_BLD)
    for part, acts in zip(parts, acts_BLD.split(7_000), strict=True):
        part.add(acts)
    joint = layer_sums.statistics_of(part.to_json() for part in parts)
    torch.testing.assert_close(joint.mean_LD, acts_BLD.double().mean(0), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(joint.mean_squared_norm_L, whole.statistics().mean_squared_norm_L, rtol=1e-12, atol=0)
    kept = LayerStatistics.from_json(joint.to_json())
    assert kept.mean_LD.equal(joint.mean_LD)
    assert kept.num_positions == 10_000
