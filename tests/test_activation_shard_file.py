"""The layout of a shard file, by hand and through the plain safetensors library."""

import pytest
import safetensors.torch
import torch

from pipeline import records
from pipeline.activations.shard_file import ShardFile, ShardFileWriter, ShardLayout
from pipeline.activations.source import ActivationBatch


def rows(start, stop):
    """Rows that tell where they belong: row r has activations 8 r to 8 r + 7."""
    acts_BLD = torch.arange(8 * start, 8 * stop).reshape(stop - start, 2, 4).to(torch.bfloat16)
    numbers_B = torch.arange(start, stop)
    return ActivationBatch(acts_BLD, numbers_B + 100, numbers_B + 70_000, numbers_B + 65_000)


def write(path, layout, parts):
    with open(path, "wb") as file:
        writer = ShardFileWriter(file, layout)
        for part in parts:
            writer.append(part)
        return writer.finish()


def test_the_layout_worked_by_hand(tmp_path):
    layout = ShardLayout(3, 2, 4, torch.bfloat16, torch.uint16)
    assert layout.offsets() == {"act": 4096, "document": 4144, "token": 4156, "position": 4162}
    assert layout.file_bytes() == 4168
    write(tmp_path / "a.safetensors", layout, [rows(0, 3)])
    content = (tmp_path / "a.safetensors").read_bytes()
    assert len(content) == 4168
    assert int.from_bytes(content[:8], "little") == 4088
    assert content[4144:4156] == b"".join((70_000 + number).to_bytes(4, "little") for number in range(3))
    assert content[4156:4162] == b"".join((100 + number).to_bytes(2, "little") for number in range(3))
    assert content[4162:] == b"".join((65_000 + number).to_bytes(2, "little") for number in range(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("token_dtype", [torch.uint16, torch.uint32])
@pytest.mark.parametrize("num_rows", [0, 1, 7])
def test_safetensors_reads_what_was_written(tmp_path, dtype, token_dtype, num_rows):
    layout = ShardLayout(num_rows, 2, 4, dtype, token_dtype)
    wanted = rows(0, num_rows)
    wanted = wanted._replace(acts_BLD=wanted.acts_BLD.to(dtype))
    write(tmp_path / "a.safetensors", layout, [wanted])
    found = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert found["act"].equal(wanted.acts_BLD)
    assert found["act"].dtype == dtype
    assert found["token"].dtype == token_dtype
    for name, column in (("token", wanted.tokens_B), ("document", wanted.documents_B), ("position", wanted.positions_B)):
        assert found[name].long().equal(column)


def test_the_hash_is_of_the_whole_file_however_it_was_cut(tmp_path):
    layout = ShardLayout(7, 2, 4, torch.bfloat16, torch.uint16)
    hashes = {write(tmp_path / f"{n}", layout, [rows(0, n), rows(n, 7)]) for n in range(8)}
    assert hashes == {records.hash_file(tmp_path / "3")}


def test_any_rows_are_read_into_memory_that_is_given(tmp_path):
    layout = ShardLayout(7, 2, 4, torch.bfloat16, torch.uint16)
    write(tmp_path / "a.safetensors", layout, [rows(0, 7)])
    file = ShardFile(tmp_path / "a.safetensors", layout)
    for start in range(8):
        for stop in range(start, 8):
            into = ActivationBatch(*(torch.empty_like(column) for column in rows(start, stop)))
            file.read(start, stop, into)
            assert all(found.equal(wanted) for found, wanted in zip(into, rows(start, stop), strict=True))
    file.close()


def test_a_shard_with_fewer_rows_than_promised_is_never_finished(tmp_path):
    with pytest.raises(RuntimeError, match="2 rows were written, the header says 3"):
        write(tmp_path / "a", ShardLayout(3, 2, 4, torch.bfloat16, torch.uint16), [rows(0, 2)])
