"""Source files become chunks of whole lines, the same whatever their compression and however they are read."""

import gzip
import itertools
import tracemalloc

import pytest
import xxhash
import zstandard
from token_fixtures import compressed

from pipeline.config.errors import UserError
from pipeline.config.text_files import TextFile, find_sources, source_name
from pipeline.text.text_source import LongLine, read_chunks

LINES = [b"x" * n for n in (3, 0, 20, 7, 1, 50, 2, 2, 9)]
TEXT = b"".join(line + b"\n" for line in LINES)


def chunks_of(text: bytes, *, block: int = 5, part: int = 1000, chunk: int = 10, line: int = 1000):
    blocks = (text[i : i + block] for i in range(0, len(text), block))
    return list(read_chunks(blocks, part_bytes=part, chunk_bytes=chunk, max_line_bytes=line))


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_every_compression_gives_the_text_with_several_members_as_one(tmp_path, ending):
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(compressed(TEXT, ending))
    assert b"".join(TextFile(path)) == TEXT


def test_zstd_frames_that_hold_no_text_are_skipped(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    skippable = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"abcd"
    path.write_bytes(skippable + zstandard.ZstdCompressor().compress(TEXT) + skippable + zstandard.ZstdCompressor().compress(TEXT))
    assert b"".join(TextFile(path)) == TEXT * 2


def test_zeros_after_a_gzip_member_are_padding(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(TEXT) + b"\0" * 100_000)
    assert b"".join(TextFile(path)) == TEXT


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_file_that_was_cut_off_is_an_error_and_not_a_shorter_text(tmp_path, ending):
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(compressed(TEXT, ending)[:-6])
    with pytest.raises(UserError, match=r"ends in the middle of its compressed data"):
        list(TextFile(path))


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_damaged_compressed_data_is_named(tmp_path, ending):
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(compressed(TEXT, ending) + b"not compressed")
    with pytest.raises(UserError, match=r"a\.jsonl\.\w+ is damaged near byte"):
        list(TextFile(path))


@pytest.mark.parametrize(("block", "chunk", "last_newline"), [*itertools.product([1, 7, 10_000], [1, 10, 10_000], [True, False])])
def test_chunks_are_the_text_in_whole_lines_with_their_numbers(block, chunk, last_newline):
    text = TEXT if last_newline else TEXT[:-1]
    chunks = chunks_of(text, block=block, chunk=chunk)
    assert b"".join(c.lines for c in chunks) == text
    for c in chunks:
        lines = c.lines.removesuffix(b"\n").split(b"\n")
        assert lines == LINES[c.first_line - 1 : c.first_line - 1 + len(lines)]
    assert [c.end is not None for c in chunks] == [False] * (len(chunks) - 1) + [True]
    end = chunks[-1].end
    assert end == (0, len(text), len(LINES), xxhash.xxh3_128_hexdigest(text), True)


def test_a_part_is_the_shortest_run_of_lines_of_its_size():
    # Lines with their ends take 4 1 21 8 2 51 3 3 10 bytes: at least 25 are reached by 4+1+21, then 8+2+51; 3+3+10 are left.
    ends = [c.end for c in chunks_of(TEXT, part=25) if c.end]
    assert [(end.first_byte, end.num_bytes, end.num_lines, end.is_last) for end in ends] == [
        (0, 26, 3, False),
        (26, 61, 3, False),
        (87, 16, 3, True),
    ]


@pytest.mark.parametrize(("block", "chunk", "line"), [*itertools.product([1, 6, 10_000], [1, 9, 10_000], [25, 10_000])])
def test_where_parts_end_depends_on_the_text_alone(block, chunk, line):
    wanted = [(c.part, c.end) for c in chunks_of(TEXT, part=30) if c.end]
    assert [(c.part, c.end) for c in chunks_of(TEXT, block=block, chunk=chunk, line=line, part=30) if c.end] == wanted


def test_a_text_that_ends_with_a_part_has_no_empty_part_after_it():
    assert [c.part for c in chunks_of(b"ab\ncd\n", part=3, chunk=3)] == [0, 1]


def test_an_empty_file_is_one_empty_part():
    assert [(c.part, c.lines, c.end.num_lines, c.end.is_last) for c in chunks_of(b"")] == [(0, b"", 0, True)]


def test_a_line_over_the_limit_is_never_held_and_keeps_its_number():
    blocks = itertools.chain([b"first\n"], (b"y" * 100_000 for _ in range(200)), [b"\nlast\n"])
    tracemalloc.start()
    found = list(read_chunks(blocks, part_bytes=10**9, chunk_bytes=500, max_line_bytes=3000))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000
    assert [(c.first_line, c.lines, c.long_line) for c in found] == [
        (1, b"first\n", None),
        (2, b"", LongLine(20_000_000, b"y" * 80)),
        (3, b"last\n", None),
    ]


def test_sources_are_found_by_glob_directory_and_path_in_the_order_of_names(tmp_path):
    for name in ("b.jsonl.zst", "a.jsonl", "c.json.gz", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    names = [s.name for s in find_sources([tmp_path])]
    assert names == ["a", "b", "c"] == [s.name for s in find_sources([tmp_path / "[bc].*", tmp_path / "a.jsonl", tmp_path / "*.jsonl"])]
    assert [source_name(path) for path in (tmp_path / "x.y.jsonl.gz", tmp_path / "00.jsonl.zst", tmp_path / "t")] == ["x.y", "00", "t"]


def test_a_pattern_without_a_match_and_a_name_taken_twice_are_named(tmp_path):
    with pytest.raises(UserError, match=r"none\*\.jsonl names no file"):
        find_sources([tmp_path / "none*.jsonl"])
    for name in ("a.jsonl", "a.jsonl.gz"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=r"a\.jsonl and .*a\.jsonl\.gz would both give shards named a-NNN"):
        find_sources([tmp_path])


def test_a_source_named_like_anothers_shard_is_refused(tmp_path):
    for name in ("a.jsonl", "a-000.b.jsonl"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=r"the file named a-000\.b would mix with the shards of a"):
        find_sources([tmp_path])
