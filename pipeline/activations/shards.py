"""Activation sets on disk: shards of shuffled rows, which training mixes as it reads (see `epoch_order`).

    activations/demo/
      000000.safetensors  000000.json      a generation of the order (see `order`), and its record
      000001.safetensors  000001.json      layout of the files: see `shard_file`
      manifest.json                        layers, order, and the mean and scale of each layer

Shapes: B positions in a batch, L layers read, D model width.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch

from pipeline import records
from pipeline.activations.block_reader import BlockReader
from pipeline.activations.epoch_order import EpochOrder
from pipeline.activations.left_out import added, num_left_out
from pipeline.activations.order import Numbers
from pipeline.activations.prefetch import prefetched
from pipeline.activations.shard_file import ShardFile, ShardLayout
from pipeline.activations.source import ActivationBatch, LayerStatistics, Provenance
from pipeline.config.activation_source import Shuffle
from pipeline.config.errors import UserError
from pipeline.records import Record

SET_FORMAT, SHARD_FORMAT = "activation-set/1", "activation-shard/1"
SHARED_FACTS = (
    "layers",
    "d_model",
    "dtype",
    "token_dtype",
    "tokens_data_id",
    "tokenizer_hash",
    "language_model_hash",
    "language_models",
    "context_tokens",
    "drop_positions",
    "beginning_of_text_id",
    "outlier_norms",
    "exclude_token_ids",
    "seed",
)
"""What the records of all shards of a set and its manifest have in common. How contexts begin, several models and what is left out are
only there where there is something to say."""

DEFAULT_SHUFFLE = Shuffle()
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "uint16": torch.uint16, "uint32": torch.uint32}


def layout_of(record: Record) -> ShardLayout:
    """The layout of the shard that `record` describes."""
    shape = record["num_positions"], len(record["layers"]), record["d_model"]
    return ShardLayout(*shape, DTYPES[record["dtype"]], DTYPES[record["token_dtype"]], num_left_out(record))


class ActivationSet:
    """An `ActivationSource` on disk; made by `open`."""

    def __init__(
        self,
        directory: Path,
        manifest: Record,
        shards: Mapping[str, Record],
        device: torch.device,
        *,
        shuffle: Shuffle,
        prefetch_batches: int,
        check_hashes: bool,
    ) -> None:
        self.directory = directory
        self.data_id: str = manifest["data_id"]
        self.layers: list[str] = manifest["layers"]
        self.d_model: int = manifest["d_model"]
        self.num_positions: int = manifest["num_positions"] + num_left_out(manifest)
        self.dtype = DTYPES[manifest["dtype"]]
        self.seed: int = manifest["seed"]
        self.provenance = Provenance.from_facts(manifest | {"tokens_id": manifest["tokens_data_id"]})
        self.statistics = LayerStatistics.from_json(manifest["statistics"])
        self._device = device
        self._shuffle = shuffle
        self._prefetch_batches = prefetch_batches
        self._records = list(shards.values())
        self._stems = list(shards)
        self._checked = set() if check_hashes else set(range(len(shards)))
        """Shards that need no check of their hashes, any more or at all."""
        self._layouts = [layout_of(record) for record in shards.values()]
        self._rows: Numbers = np.array([layout.num_rows + layout.num_left_out for layout in self._layouts], np.int64)
        """Positions of each shard, those left out counted: the order is theirs."""

    @classmethod
    def open(
        cls,
        directory: Path,
        device: torch.device,
        *,
        shuffle: Shuffle = DEFAULT_SHUFFLE,
        prefetch_batches: int = 4,
        check_hashes: bool = True,
    ) -> "ActivationSet":
        """The set in `directory`, its batches to be on `device`, with formats, sizes and data id checked.

        With `check_hashes` a shard's rows come only after its hash was found right. `UserError` names what is wrong.
        """
        manifest, shards = records.read_data_set(directory, SET_FORMAT, SHARD_FORMAT)
        for stem, record in shards.items():
            _check_record(directory, stem, record, manifest)
        found = sum(record["num_positions"] for record in shards.values())
        if found != manifest["num_positions"]:
            raise UserError(
                f"{directory / records.MANIFEST} says {manifest['num_positions']:,} positions, its shards hold {found:,}: the manifest is "
                "damaged; delete it and run the cache stage again, it writes the manifest anew"
            )
        return cls(directory, manifest, shards, device, shuffle=shuffle, prefetch_batches=prefetch_batches, check_hashes=check_hashes)

    def batches(self, *, batch_positions: int, epoch: int, cursor: int) -> Iterator[ActivationBatch]:
        """See `ActivationSource`. Batches are read ahead by threads and, for a GPU, copied to it beside the computation."""
        order = EpochOrder(self._rows, self._shuffle, seed=self.seed, epoch=epoch)
        read = self._read(order, batch_positions, cursor)
        if self._device.type != "cuda":
            return prefetched(read, self._prefetch_batches)
        return _received(prefetched(_sent(read, self._device), self._prefetch_batches))

    def _read(self, order: EpochOrder, batch_positions: int, cursor: int) -> Iterator[ActivationBatch]:
        """The batches on the CPU, in page-locked memory if they go to a GPU."""
        with BlockReader(order, open_shard=self._open_shard, empty=self._empty, check=self._check) as reader:
            yield from reader.batches(batch_positions, cursor)

    def _open_shard(self, generation: int) -> ShardFile:
        return ShardFile(self.directory / f"{self._stems[generation]}.safetensors", self._layouts[generation])

    def _check(self, generation: int) -> None:
        """Rehashes a shard unless that was done before."""
        if generation not in self._checked:
            records.check_hashes(self.directory, self._stems[generation], self._records[generation])
            self._checked.add(generation)

    def _empty(self, num_rows: int) -> ActivationBatch:
        pinned = self._device.type == "cuda"
        acts_BLD = torch.empty((num_rows, len(self.layers), self.d_model), dtype=self.dtype, pin_memory=pinned)
        return ActivationBatch(acts_BLD, *(torch.empty(num_rows, dtype=torch.int64, pin_memory=pinned) for _ in range(3)))


def _sent(batches: Iterator[ActivationBatch], device: torch.device) -> Iterator[tuple[ActivationBatch, torch.cuda.Event]]:
    """Each batch on the device, and the event that its copy is complete; copies have a CUDA stream of their own."""
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    for batch in batches:
        with torch.cuda.stream(stream):
            # The allocator of page-locked memory knows of the copy, so the batch in it may be dropped before the copy is done.
            on_device = ActivationBatch(*(column.to(device, non_blocking=True) for column in batch))
            copied = stream.record_event()
        yield on_device, copied


def _received(sent: Iterator[tuple[ActivationBatch, torch.cuda.Event]]) -> Iterator[ActivationBatch]:
    """The batches, in order with what the consumer computes: its CUDA stream waits for the copy, the process does not."""
    for batch, copied in sent:
        stream = torch.cuda.current_stream(batch.acts_BLD.device)
        stream.wait_event(copied)
        for column in batch:
            column.record_stream(stream)
        yield batch


def _check_record(directory: Path, stem: str, record: Record, manifest: Record) -> None:
    for key in SHARED_FACTS:
        found, expected = record.get(key), manifest.get(key)
        if found != expected:
            raise UserError(f"{directory / stem}.json has {key} {found!r}, the set's manifest {expected!r}: two sets are mixed")
    size, held = layout_of(record).file_bytes(), record["files"][f"{stem}.safetensors"]["bytes"]
    if held != size:
        raise UserError(
            f"{directory / stem}.safetensors holds {held:,} bytes, its record's {record['num_positions']:,} positions take {size:,}: "
            f"the shard is damaged; delete {directory / stem}.json and run the cache stage again, it redoes only that shard"
        )


def seal(directory: Path, shards: Mapping[str, Record], statistics: LayerStatistics) -> Record:
    """Writes the manifest of a set whose shards are all committed, and gives it."""
    first = next(iter(shards.values()))
    # The factor that brings the centered layer to a mean squared norm of D.
    scale_L = (first["d_model"] / statistics.mean_squared_centered_norm_L).sqrt()
    for layer, scale in zip(first["layers"], scale_L.tolist(), strict=True):
        if not math.isfinite(scale):
            raise UserError(
                f"{directory}: the activations of {layer} are the same at all of its {statistics.num_positions:,} positions (0 of a "
                "context does not count), so they have no scale; cache more positions, or another layer"
            )
    num_positions = sum(record["num_positions"] for record in shards.values())
    facts = {key: first[key] for key in SHARED_FACTS if key in first} | {"num_positions": num_positions}
    if "left_out" in first:
        facts |= {"left_out": added([record["left_out"] for record in shards.values()])}
    facts |= {"scale": scale_L.tolist(), "statistics": statistics.to_json()}
    return records.write_manifest(directory, SET_FORMAT, dict(shards), facts)
