"""The stage `count`: documents and tokens of token sets, recounted from the ids themselves.

Every separator has to stand where the offsets say, there may be no other, and no id may be outside the vocabulary; the
counts have to be those of records and manifest, and the bytes those that were written. Runs at the speed of memory, or of the disk.
"""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from rich.console import Console
from rich.table import Table

from pipeline import records
from pipeline.config.count_tokens import CountConfig
from pipeline.config.errors import UserError
from pipeline.run import Run
from pipeline.tokens import TokenSet, TokenShard

# 256 KiB of uint16, so that a block and its comparisons stay in a core's cache: 4.0 GB/s on one core, against 2.8 to 3.9 with
# half to four times as much; read or memory-mapped made no difference from a local disk.
BLOCK_IDS = 1 << 17
BLOCKS_A_REPORT = 256


class Count(NamedTuple):
    documents: int
    tokens: int


def run(config: CountConfig, run: Run) -> dict[str, Any]:
    """Recounts each split, prints the table and writes `counts.json`. Raises `UserError` where anything disagrees."""
    sets = {split: TokenSet.open(directory) for split, directory in config.inputs().items()}
    for split, tokens in sets.items():
        run.bind_input(split, tokens.data_id)
    counted = count_sets(sets, run)
    result = {split: _result(sets[split], shards) for split, shards in counted.items()}
    run.say(render_table(counted))
    records.write_json(run.directory / "counts.json", result)
    return {split: {key: value for key, value in counts.items() if key != "files"} for split, counts in result.items()}


def count_sets(sets: dict[str, TokenSet], run: Run) -> dict[str, dict[str, Count]]:
    """What each shard of each set holds, by its stem."""
    total = sum(len(shard.ids) for tokens in sets.values() for shard in tokens.shards)
    done = 0
    counted: dict[str, dict[str, Count]] = {}
    for split, tokens in sets.items():
        counted[split] = {}
        for shard in tokens.shards:
            counted[split][shard.stem] = count_shard(tokens, shard, run, done, total)
            done += len(shard.ids)
    run.report("ids", done, total, unit="ids", done=True)
    return counted


def count_shard(tokens: TokenSet, shard: TokenShard, run: Run, ids_before: int, total_ids: int) -> Count:
    """Counts one shard's separators, and checks them and the ids against offsets, vocabulary and record."""
    path = tokens.directory / f"{shard.stem}.bin"
    separators = np.asarray(shard.ends[1:], np.int64) - 1
    in_order = bool((np.diff(separators, prepend=-1) > 0).all())
    num_ids, num_separators, num_outside, num_in_place = 0, 0, 0, 0
    flags = np.empty(BLOCK_IDS, bool)
    hasher = xxhash.xxh3_128()
    for number, ids in enumerate(_blocks(path, shard.ids.dtype)):
        found = flags[: len(ids)]
        num_outside += int(np.count_nonzero(np.greater_equal(ids, tokens.vocab_size, out=found)))
        num_separators += int(np.count_nonzero(np.equal(ids, tokens.separator, out=found)))
        first, last = np.searchsorted(separators, (num_ids, num_ids + len(ids))) if in_order else (0, 0)
        num_in_place += int(np.count_nonzero(found[separators[first:last] - num_ids]))
        num_ids += len(ids)
        hasher.update(ids.data)
        if number % BLOCKS_A_REPORT == 0:
            run.check_stop()
            run.report("ids", ids_before + num_ids, total_ids, unit="ids")
    mend = f"the shard is damaged; delete {tokens.directory / shard.stem}.json and run tokenize again, it redoes only that shard"
    if num_separators != shard.num_documents:
        raise UserError(f"{path} holds {num_separators:,} documents, its record says {shard.num_documents:,}: {mend}")
    if num_outside != num_separators:
        raise UserError(f"{path} holds {num_outside - num_separators:,} ids outside the vocabulary of {tokens.vocab_size:,}: {mend}")
    if num_in_place != num_separators:
        raise UserError(f"{path.with_suffix('.ends')} points beside the separators of {path.name}: {mend}")
    hashes = {path: hasher.hexdigest(), path.with_suffix(".ends"): records.hash_file(path.with_suffix(".ends"))}
    for file, content_hash in hashes.items():
        if content_hash != shard.record["files"][file.name]["xxh3_128"]:
            raise UserError(f"{file} does not have the bytes that were written (its hash differs): {mend}")
    return Count(num_separators, num_ids - num_separators)


def _blocks(path: Path, dtype: np.dtype[Any]) -> Iterator[np.ndarray]:
    """The file's numbers, `BLOCK_IDS` at a time; each block overwrites the one before it."""
    block = np.empty(BLOCK_IDS, dtype)
    with open(path, "rb", buffering=0) as file:
        while num_bytes := file.readinto(block.data):
            yield block[: num_bytes // dtype.itemsize]


def by_source(shards: dict[str, Count]) -> dict[str, tuple[int, Count]]:
    """Number of shards and their sum for each source file: shard `lib-003` is the fourth part of `lib`."""
    sources: dict[str, tuple[int, Count]] = {}
    for stem, count in shards.items():
        source = stem.rpartition("-")[0] or stem
        number, sum_so_far = sources.get(source, (0, Count(0, 0)))
        sources[source] = (number + 1, _sum([sum_so_far, count]))
    return sources


def render_table(counted: dict[str, dict[str, Count]]) -> str:
    """The table of source files and totals, as text."""
    table = Table("split", "file")
    for heading in ("shards", "documents", "tokens", "tokens/document"):
        table.add_column(heading, justify="right")
    for split, shards in counted.items():
        for source, (number, count) in by_source(shards).items():
            table.add_row(split, source, *_cells(number, count))
        table.add_row(split, "total", *_cells(len(shards), _sum(shards.values())), style="bold", end_section=True)
    if len(counted) > 1:
        everything = [count for shards in counted.values() for count in shards.values()]
        table.add_row("all", "total", *_cells(len(everything), _sum(everything)), style="bold")
    text = io.StringIO()
    Console(file=text, width=110).print(table)
    return text.getvalue().rstrip()


def _cells(num_shards: int, count: Count) -> list[str]:
    mean = count.tokens / count.documents if count.documents else 0.0
    return [f"{num_shards:,}", f"{count.documents:,}", f"{count.tokens:,}", f"{mean:,.1f}"]


def _sum(counts: Any) -> Count:
    pairs = list(counts)
    return Count(sum(count.documents for count in pairs), sum(count.tokens for count in pairs))


def _result(tokens: TokenSet, shards: dict[str, Count]) -> dict[str, Any]:
    """A set's entry in `counts.json`. Raises `UserError` if the manifest says otherwise."""
    total = _sum(shards.values())
    if total != (tokens.num_documents, tokens.num_tokens):
        raise UserError(
            f"{tokens.directory / records.MANIFEST} says {tokens.num_documents:,} documents and {tokens.num_tokens:,} tokens, the ids "
            f"give {total.documents:,} and {total.tokens:,}: the manifest is damaged; delete it and run tokenize again"
        )
    files = {
        source: {**count._asdict(), "shards": {s: c._asdict() for s, c in shards.items() if (s.rpartition("-")[0] or s) == source}}
        for source, (_, count) in by_source(shards).items()
    }
    return {"data_id": tokens.data_id, **total._asdict(), "num_shards": len(shards), "files": files}
