"""How often a disk is read when several trainings on one node share an activation set: once, through the kernel's page cache.

    python bench/shared_reading.py                                   # 1 GB in the current directory, 1, 2, 4 and 8 readers
    python bench/shared_reading.py --directory /nvme/me --megabytes 20000 --readers 1 8 --apart 30

Makes an activation set of random rows, drops it from the page cache, and reads an epoch of it in several processes at once,
each as a training does: shards in the set's own order, which no setting of a training changes, with their hashes checked.
`from disk` is what the kernel fetched for all readers together (read_bytes of /proc/PID/io), in units of the set's size; a
file system in memory shows 0. Readers that drift apart by more than the memory left for the page cache read again:
`--apart` lets each start so many seconds after the one before.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from pipeline import records
from pipeline.activations import shards
from pipeline.activations.shard_file import ShardFileWriter
from pipeline.activations.source import ActivationBatch, LayerStatistics

LAYERS, D_MODEL, ROWS = ["transformer.h.7", "transformer.h.8"], 768, 16_384
BATCH_POSITIONS = 4096


def make_set(directory: Path, num_bytes: int) -> int:
    """Writes an activation set of about `num_bytes` random bytes, flushed to the disk; gives its size in bytes."""
    directory.mkdir()
    facts = {"layers": LAYERS, "d_model": D_MODEL, "dtype": "bfloat16", "token_dtype": "uint16", "tokens_data_id": "0" * 64}
    facts |= {"tokenizer_hash": "0" * 64, "language_model_hash": "0" * 64, "context_tokens": 1024, "drop_positions": [0], "seed": 0}
    facts |= {"num_positions": ROWS}
    generator = torch.Generator().manual_seed(0)
    total = 0
    while total < num_bytes:
        stem = f"{len(list(directory.glob('*.json'))):06d}"
        acts_BLD = torch.randn(ROWS, len(LAYERS), D_MODEL, generator=generator).bfloat16()
        index_B = torch.arange(ROWS)
        with records.atomic_file(directory / f"{stem}.safetensors") as file:
            writer = ShardFileWriter(file, shards.layout_of(facts))
            writer.append(ActivationBatch(acts_BLD, index_B % 50_000, index_B, index_B % 1024))
            content_hash = writer.finish()
        name = f"{stem}.safetensors"
        records.commit_shard(directory, stem, shards.SHARD_FORMAT, [name], facts, {}, {name: content_hash})
        total += (directory / name).stat().st_size
    written = records.committed_shards(directory, shards.SHARD_FORMAT)
    mean_LD, mean_squared_norm_L = torch.zeros(len(LAYERS), D_MODEL, dtype=torch.float64), torch.full((len(LAYERS),), float(D_MODEL))
    shards.seal(directory, written, LayerStatistics(mean_LD, mean_squared_norm_L, ROWS * len(written)))
    return total


def drop_from_page_cache(directory: Path) -> None:
    for path in directory.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_epoch(directory: Path) -> None:
    """Reads every row once and prints what the kernel fetched from the disk for this process, in bytes."""
    before = _bytes_from_disk()
    activations = shards.ActivationSet.open(directory, torch.device("cpu"))
    for _ in activations.batches(batch_positions=BATCH_POSITIONS, epoch=0, cursor=0):
        pass
    print(_bytes_from_disk() - before)


def _bytes_from_disk() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


def read_together(directory: Path, num_readers: int, apart_seconds: float) -> tuple[int, float]:
    """Bytes that all readers together caused to be read from the disk, and the seconds until the last was done."""
    drop_from_page_cache(directory)
    start = time.perf_counter()
    readers = []
    for number in range(num_readers):
        if number and apart_seconds:
            time.sleep(apart_seconds)
        readers.append(subprocess.Popen([sys.executable, __file__, "--read", str(directory)], stdout=subprocess.PIPE, text=True))
    texts = [reader.communicate()[0] for reader in readers]
    if any(reader.returncode for reader in readers):
        raise SystemExit("a reader failed; what it printed stands above")
    return sum(map(int, texts)), time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path(), help="on the disk to be measured")
    parser.add_argument("--megabytes", type=int, default=1000, help="size of the activation set")
    parser.add_argument("--readers", type=int, nargs="+", default=[1, 2, 4, 8], help="how many at once")
    parser.add_argument("--apart", type=float, default=0.0, help="seconds between the readers' starts")
    parser.add_argument("--json", action="store_true", help="a line of JSON a measurement")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read is not None:
        read_epoch(options.read)
        return
    with tempfile.TemporaryDirectory(dir=options.directory) as temporary:
        directory = Path(temporary) / "set"
        num_bytes = make_set(directory, options.megabytes * 10**6)
        for num_readers in options.readers:
            fetched, seconds = read_together(directory, num_readers, options.apart)
            if options.json:
                print(json.dumps({"readers": num_readers, "set_bytes": num_bytes, "bytes_from_disk": fetched, "seconds": seconds}))
            else:
                rate = num_readers * num_bytes / seconds / 1e6
                print(f"{num_readers} readers: from disk {fetched / num_bytes:.2f} x the set, {seconds:.1f} s, {rate:,.0f} MB/s together")


if __name__ == "__main__":
    main()
