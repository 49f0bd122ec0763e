"""What mixing shards costs when reading: batches of the epoch's order beside plain reading of one shard after the other.

    python -m bench.reading_rate --json bench/results/reading_rate.json                      # 4 GB in the current directory
    python -m bench.reading_rate --directory /nvme/me --megabytes 50000 --device cuda

Makes an activation set of random rows, two layers of width 768 in bfloat16, and reads an epoch of it in turn both ways, dropped
from the page cache (`cold`) and held in it (`warm`). Plain reading fills each batch in memory of its own by one read after the
other, in a thread that is four batches ahead: nothing can be simpler. Hashes are not checked, which costs both the same. The
figures are positions a second, the median of the rounds, and the median of a round's ratios; on a machine that others use too, the
ratio of processor times says more than that of the rates.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from bench.shared_reading import D_MODEL, LAYERS, drop_from_page_cache, make_set
from pipeline.activations.prefetch import prefetched
from pipeline.activations.shard_file import ShardFile
from pipeline.activations.shards import SHARD_FORMAT, ActivationSet, layout_of
from pipeline.activations.source import ActivationBatch
from pipeline.records import committed_shards

BATCH_POSITIONS = 8192
AHEAD = 4


def mixed(directory: Path, device: torch.device) -> Iterator[ActivationBatch]:
    """An epoch as training reads it."""
    activations = ActivationSet.open(directory, device, prefetch_batches=AHEAD, check_hashes=False)
    return activations.batches(batch_positions=BATCH_POSITIONS, epoch=1, cursor=0)


def plain(directory: Path, device: torch.device) -> Iterator[ActivationBatch]:
    """The same rows from front to back; batches don't cross shards."""
    for batch in prefetched(_front_to_back(directory, pinned=device.type == "cuda"), AHEAD):
        yield ActivationBatch(*(column.to(device, non_blocking=True) for column in batch))


def _front_to_back(directory: Path, *, pinned: bool) -> Iterator[ActivationBatch]:
    for stem, record in committed_shards(directory, SHARD_FORMAT).items():
        shard, num_rows = ShardFile(directory / f"{stem}.safetensors", layout_of(record)), record["num_positions"]
        for start in range(0, num_rows, BATCH_POSITIONS):
            count = min(BATCH_POSITIONS, num_rows - start)
            acts_BLD = torch.empty((count, len(LAYERS), D_MODEL), dtype=torch.bfloat16, pin_memory=pinned)
            batch = ActivationBatch(acts_BLD, *(torch.empty(count, dtype=torch.int64, pin_memory=pinned) for _ in range(3)))
            shard.read(start, start + count, batch)
            yield batch
        shard.close()


def rates_of(batches: Iterator[ActivationBatch], device: torch.device) -> tuple[float, float]:
    """Over the whole epoch, its first batch included: positions a second, and a second of processor time."""
    began, processor_began, num_positions = time.perf_counter(), time.process_time(), 0
    for batch in batches:
        num_positions += len(batch.tokens_B)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return num_positions / (time.perf_counter() - began), num_positions / (time.process_time() - processor_began)


def measure(directory: Path, device: torch.device, rounds: int) -> dict[str, dict[str, float]]:
    ways: dict[str, Callable[[Path, torch.device], Iterator[ActivationBatch]]] = {"plain": plain, "mixed": mixed}
    found = {}
    for state in ("cold", "warm"):
        rates: dict[str, list[tuple[float, float]]] = {"plain": [], "mixed": []}
        for number in range(rounds):
            # In turn the other way first: what else the machine does weighs on both alike.
            for way in ("plain", "mixed") if number % 2 == 0 else ("mixed", "plain"):
                if state == "cold":
                    drop_from_page_cache(directory)
                rates[way].append(rates_of(ways[way](directory, device), device))
        pairs = list(zip(rates["plain"], rates["mixed"], strict=True))
        found[state] = {way: statistics.median(rate for rate, _ in values) for way, values in rates.items()}
        found[state] |= {"ratio": statistics.median(mixed[0] / plain[0] for plain, mixed in pairs)}
        found[state] |= {"ratio_of_processor_seconds": statistics.median(plain[1] / mixed[1] for plain, mixed in pairs)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path(), help="on the disk to be measured")
    parser.add_argument("--megabytes", type=int, default=4000, help="size of the activation set; should fit into memory for `warm`")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu", help="where batches go: cpu or cuda")
    parser.add_argument("--json", type=Path, help="where the result goes")
    options = parser.parse_args()
    device = torch.device(options.device)
    with tempfile.TemporaryDirectory(dir=options.directory) as temporary:
        num_bytes = make_set(Path(temporary) / "set", options.megabytes * 10**6)
        found = measure(Path(temporary) / "set", device, options.rounds)
    gigabytes = 1e-9 * len(LAYERS) * D_MODEL * 2
    for state, rates in found.items():
        each = ", ".join(f"{way} {rates[way] / 1e6:.2f} M positions/s ({rates[way] * gigabytes:.2f} GB/s)" for way in ("plain", "mixed"))
        print(
            f"{state}: {each}; mixed is {rates['ratio']:.2f} times as fast, "
            f"for {rates['ratio_of_processor_seconds']:.2f} times the processor time"
        )
    if options.json is not None:
        machine = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
        facts = {"command": "python -m bench.reading_rate " + " ".join(sys.argv[1:]), "date": time.strftime("%Y-%m-%d")}
        facts |= {"machine": f"{os.cpu_count()} cores, {machine}; torch {torch.__version__}", "set_bytes": num_bytes}
        facts |= {"load_average_5_min": round(os.getloadavg()[1], 1)}
        options.json.write_text(json.dumps(facts | {"rounds": options.rounds, "positions_a_second": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
