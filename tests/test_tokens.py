"""Token sets: layout, random access, the width of ids, and what damage is found."""

import numpy as np
import pytest

from pipeline import records
from pipeline.config.errors import UserError
from pipeline.tokens import TokenSet, TokenShardWriter, Vocabulary, join_documents, write_token_set

DOCUMENTS = {"a-000": [[5, 6, 7], [8]], "b-000": [], "c-000": [[9, 2]]}


@pytest.fixture
def directory(tmp_path):
    write_token_set(tmp_path / "set", DOCUMENTS, vocab_size=100, end_of_text_id=99, tokenizer_hash="t")
    return tmp_path / "set"


def test_the_files_hold_what_the_layout_says(directory):
    assert (directory / "a-000.bin").read_bytes() == b"\5\0\6\0\7\0\xff\xff\x08\0\xff\xff"
    assert np.frombuffer((directory / "a-000.ends").read_bytes(), "<u8").tolist() == [0, 4, 6]


def test_documents_are_numbered_through_all_shards(directory):
    tokens = TokenSet.open(directory)
    assert [tokens.document(i).tolist() for i in range(3)] == [[5, 6, 7], [8], [9, 2]]
    assert (tokens.num_documents, tokens.num_tokens, [s.first_document for s in tokens.shards]) == (3, 6, [0, 2, 2])
    with pytest.raises(IndexError):
        tokens.document(3)


@pytest.mark.parametrize(
    ("vocab_size", "dtype", "separator"), [(65_534, "uint16", 65_535), (65_535, "uint32", 2**32 - 1), (151_936, "uint32", 2**32 - 1)]
)
def test_the_vocabulary_size_decides_the_width_of_ids(tmp_path, vocab_size, dtype, separator):
    tokens = write_token_set(tmp_path, {"a": [[vocab_size - 1, 0]]}, vocab_size=vocab_size, end_of_text_id=0)
    assert (tokens.dtype.name, tokens.separator) == (dtype, separator)
    assert tokens.document(0).tolist() == [vocab_size - 1, 0]
    assert tokens.shards[0].ids[-1] == separator


def test_the_data_id_is_of_the_content_and_not_of_names(tmp_path):
    first = write_token_set(tmp_path / "one", {"a": [[1]], "b": [[2]]}, vocab_size=10, end_of_text_id=0)
    renamed = write_token_set(tmp_path / "two", {"x": [[1]], "y": [[2]]}, vocab_size=10, end_of_text_id=0)
    other = write_token_set(tmp_path / "three", {"a": [[1]], "b": [[3]]}, vocab_size=10, end_of_text_id=0)
    assert first.data_id == renamed.data_id != other.data_id


def test_a_shard_that_was_not_committed_leaves_nothing(tmp_path):
    vocabulary = Vocabulary(100, 99, "")
    with TokenShardWriter(tmp_path, "a-000", vocabulary) as writer:
        writer.append(join_documents([[1, 2]], vocabulary))
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_writer_left_is_removed_even_if_the_name_looks_like_a_pattern(tmp_path):
    for name in (".a[1]-000.bin.host.7.tmp", "a[1]-000.bin", "a1-000.bin"):
        (tmp_path / name).write_bytes(b"x")
    with TokenShardWriter(tmp_path, "a[1]-000", Vocabulary(100, 99, "")):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["a1-000.bin"]


def test_an_id_that_the_vocabulary_does_not_have_is_refused(tmp_path):
    with pytest.raises(UserError, match="id 10 in a vocabulary of 10"):
        write_token_set(tmp_path, {"a": [[1, 10]]}, vocab_size=10, end_of_text_id=0)
    assert list(tmp_path.iterdir()) == []


def test_a_truncated_shard_is_named(directory):
    (directory / "a-000.bin").write_bytes(b"\5\0")
    with pytest.raises(UserError, match=r"a-000\.bin holds 2 bytes, its record says 12 bytes.*delete .*a-000\.json"):
        TokenSet.open(directory)


def test_a_record_that_contradicts_its_files_is_named(directory):
    _edit(directory / "a-000.json", tokens=5)
    _reseal(directory, tokens=7)
    with pytest.raises(UserError, match=r"a-000\.bin holds 12 bytes; 5 tokens in 2 documents take 14"):
        TokenSet.open(directory)


def test_offsets_that_do_not_end_where_the_ids_do_are_named(directory):
    (directory / "a-000.ends").write_bytes(np.array([0, 4, 9], "<u8").tobytes())
    with pytest.raises(UserError, match=r"a-000\.ends goes from 0 to 9, expected 0 to 6"):
        TokenSet.open(directory)


def test_shards_of_two_tokenizers_do_not_mix(directory):
    _edit(directory / "c-000.json", tokenizer_hash="other")
    _reseal(directory)
    with pytest.raises(UserError, match=r"c-000\.json has tokenizer_hash 'other', the set's manifest 't'"):
        TokenSet.open(directory)


def test_a_manifest_whose_totals_are_wrong_is_refused(directory):
    _edit(directory / "manifest.json", documents=4)
    with pytest.raises(UserError, match=r"says 4 documents, its shards' records 3"):
        TokenSet.open(directory)


def _edit(path, **changes):
    records.write_json(path, records.with_checksum({**records.read_json(path), **changes}))


def _reseal(directory, **changes):
    shards = [records.read_json(directory / f"{stem}.json") for stem in DOCUMENTS]
    _edit(directory / "manifest.json", data_id=records.data_id(shards), **changes)
