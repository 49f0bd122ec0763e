"""The stage `count`: counts from the ids themselves, and damage that sizes don't show."""

import io
import json

import numpy as np
import pytest

from pipeline import records
from pipeline.config.count_tokens import CountConfig
from pipeline.config.errors import UserError
from pipeline.config.schema import build
from pipeline.run import Run, Stopped
from pipeline.stages import count_tokens
from pipeline.tokens import write_token_set

TRAIN = {"a-000": [[5, 6, 7], [8]], "a-001": [[1, 2]], "b-000": [], "c-000": [[9]]}


@pytest.fixture
def directory(tmp_path):
    for split, shards in (("train", TRAIN), ("validation", {"a-000": [[3, 3, 3]]})):
        write_token_set(tmp_path / "tokens" / split, shards, vocab_size=100, end_of_text_id=99)
    return tmp_path


def count(directory, output=None, **settings):
    values = {"stage": "count", "name": "test", "tokens": str(directory / "tokens"), **settings}
    return count_tokens.run(build(CountConfig, values, "test"), Run(directory / "run", stage="count", output=output))


def test_documents_and_tokens_by_shard_file_and_split(directory):
    output = io.StringIO()
    result = count(directory, output)
    counts = json.loads((directory / "run" / "counts.json").read_text())
    assert (result["train"]["documents"], result["train"]["tokens"], result["train"]["num_shards"]) == (4, 7, 4)
    assert (result["validation"]["documents"], result["validation"]["tokens"]) == (1, 3)
    assert counts["train"]["files"]["a"] == {
        "documents": 3,
        "tokens": 6,
        "shards": {"a-000": {"documents": 2, "tokens": 4}, "a-001": {"documents": 1, "tokens": 2}},
    }
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.getvalue().splitlines() if line.startswith("│")]
    assert rows == [
        ["train", "a", "2", "3", "6", "2.0"],
        ["train", "b", "1", "0", "0", "0.0"],
        ["train", "c", "1", "1", "1", "1.0"],
        ["train", "total", "4", "4", "7", "1.8"],
        ["validation", "a", "1", "1", "3", "3.0"],
        ["validation", "total", "1", "1", "3", "3.0"],
        ["all", "total", "5", "5", "10", "2.0"],
    ]


def test_blocks_and_their_borders_change_nothing(directory, monkeypatch):
    wanted = count(directory)
    for block in (1, 2, 3, 4):
        monkeypatch.setattr(count_tokens, "BLOCK_IDS", block)
        assert count(directory) == wanted


def test_one_split_alone_is_counted_where_it_is_asked_for(directory):
    assert list(count(directory, splits=["validation"])) == ["validation"]


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, 65535, r"a-000\.bin holds 3 documents, its record says 2: the shard is damaged; delete .*a-000\.json and run tokenize again"),
        (3, 4, r"a-000\.bin holds 1 documents, its record says 2"),
        (1, 100, r"a-000\.bin holds 1 ids outside the vocabulary of 100"),
    ],
)
def test_a_flipped_id_is_found_and_named(directory, position, value, message):
    path = directory / "tokens" / "train" / "a-000.bin"
    ids = np.fromfile(path, "<u2")
    ids[position] = value
    path.write_bytes(ids.tobytes())
    with pytest.raises(UserError, match=message):
        count(directory)


def test_an_id_changed_into_another_of_the_vocabulary_is_named(directory):
    path = next((directory / "tokens/train").glob("*.bin"))
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"\.bin does not have the bytes that were written \(its hash differs\)"):
        count(directory)


@pytest.mark.parametrize("ends", [[0, 3, 6], [0, 7, 6], [0, 0, 6]])
def test_offsets_that_point_beside_the_separators_are_named(directory, ends):
    (directory / "tokens/train/a-000.ends").write_bytes(np.array(ends, "<u8").tobytes())
    with pytest.raises(UserError, match=r"a-000\.ends points beside the separators of a-000\.bin"):
        count(directory)


def test_a_manifest_that_disagrees_fails(directory):
    path = directory / "tokens/train/manifest.json"
    records.write_json(path, records.with_checksum({**records.read_json(path), "tokens": 8}))
    with pytest.raises(UserError, match=r"manifest\.json says 8 tokens, its shards' records 7"):
        count(directory)


def test_it_heeds_a_request_to_stop(directory):
    run = Run(directory / "run")
    run.request_stop("test")
    with pytest.raises(Stopped):
        count_tokens.run(build(CountConfig, {"stage": "count", "name": "t", "tokens": str(directory / "tokens")}, "t"), run)
