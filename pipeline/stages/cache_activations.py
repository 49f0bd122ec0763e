"""cache: activations of a language model to shuffled shards on disk.

A shard is a generation of the order, so its bytes are the same whichever task makes it; task i of n makes shards i, i + n, ...
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pipeline import records
from pipeline.activations import shards
from pipeline.activations.buffer import RollingBuffer, one_generation
from pipeline.activations.harvest import Harvester
from pipeline.activations.layer_sums import LayerSums, counted, statistics_of
from pipeline.activations.left_out import LeftOut, left_out_sentences, num_left_out
from pipeline.activations.prefetch import prefetched
from pipeline.activations.shard_file import ShardFileWriter
from pipeline.activations.source import ActivationBatch
from pipeline.config.cache_activations import CacheConfig
from pipeline.config.errors import UserError
from pipeline.config.token_limit import notices, short_of
from pipeline.language_models import bind, identities, load_models
from pipeline.records import Record
from pipeline.run import Run, byte_size
from pipeline.tokens import TokenSet

# Rows copied, summed and written at a time. Part of the format: it fixes the order in which the sums are added.
ROWS_AT_A_TIME = 8192
# So many of these wait in memory to be written.
READ_AHEAD = 4
# Kept free beside the data: records, the manifest and whatever else the disk is used for meanwhile.
SPARE_BYTES = 64 << 20


def run(config: CacheConfig, run: Run) -> dict[str, Any]:
    """Makes this task's missing shards, and the manifest once every task's are there."""
    tokens = TokenSet.open(config.tokens)
    run.bind_input("tokens", tokens.data_id)
    if config.check_hashes:
        tokens.check_hashes(run)
    model = load_models(config)
    bind(model, run)
    harvester = Harvester(tokens, model, config, run.check_stop)
    limit = notices(config.max_tokens, harvester.order.num_positions, where=config.tokens, unit="positions")
    for remark in [*harvester.remarks, *limit]:
        run.say(remark)
    inputs: dict[str, Any] = {"tokens": tokens.data_id, **identities(model)}
    inputs |= _as_far_as_there(beginning_of_text_id=harvester.provenance.beginning_of_text_id)
    settings = {key: value for key, value in config.identity().items() if key != "beginning_of_text"}
    norms = _norms_of(config.output) or harvester.measured_norms(run.say)
    measured = {} if norms is None else {"outlier_norms": norms}
    decided = records.claim(config.output, {"stage": "cache", "settings": settings, "inputs": inputs}, measured=measured)
    harvester.leave_out(decided.get("outlier_norms"))
    for line in harvester.exclusion.sentences(config):
        run.say(line)
    cache = _Cache(config, harvester, run)
    cache.write_missing()
    return cache.seal_if_complete() | short_of(config.max_tokens, harvester.order.num_positions) | model.memory_used()


def _as_far_as_there(**facts: Any) -> Record:
    """Entries of a record; there is none of what is None."""
    return {key: value for key, value in facts.items() if value is not None}


def _norms_of(directory: Path) -> list[float] | None:
    """The norms of outliers that the recipe in `directory` names, if there is one that does."""
    if not (directory / records.RECIPE).exists():
        return None
    norms: list[float] | None = records.read_recipe(directory)["inputs"].get("outlier_norms")
    return norms


class _Cache:
    """The activation set while it is made."""

    def __init__(self, config: CacheConfig, harvester: Harvester, run: Run) -> None:
        self._config = config
        self._directory = config.output
        self._harvester = harvester
        self._order = harvester.order
        self._run = run

    def write_missing(self) -> None:
        """Writes every shard of this task that is not committed yet."""
        missing = [g for g in range(self._order.num_generations) if not self._is_committed(g)]
        mine = [g for g in missing if g % self._run.num_tasks == self._run.task]
        for generation in mine:
            records.remove_leftovers(self._directory, _stem(generation))
        self._check_disk(missing)
        done = sum(
            int(self._order.rows[g]) for g in range(self._run.task, self._order.num_generations, self._run.num_tasks) if g not in mine
        )
        total = done + sum(int(self._order.rows[g]) for g in mine)
        buffer = RollingBuffer(self._harvester, [one_generation(generation, self._order) for generation in mine])
        for generation in mine:
            for num_filled in buffer.fill():
                self._run.report("activations", done, total, unit="positions", note=f"{num_filled:,} in the buffer")
            done = self._write_shard(generation, buffer, done, total)
        self._run.report("activations", done, total, unit="positions", done=True)

    def _is_committed(self, generation: int) -> bool:
        """Whether the shard exists; `UserError` if its record does, but its file is damaged."""
        if not (self._directory / f"{_stem(generation)}.json").exists():
            return False
        records.read_shard(self._directory, _stem(generation), shards.SHARD_FORMAT)
        return True

    def _write_shard(self, generation: int, buffer: RollingBuffer, done: int, total: int) -> int:
        """Writes and commits one shard from a full buffer; gives the positions done with it."""
        facts = self._facts(generation, buffer.left_out)
        sums, written = LayerSums(*self._harvester.row_shape), 0
        name = f"{_stem(generation)}.safetensors"
        with records.atomic_file(self._directory / name) as file:
            writer = ShardFileWriter(file, shards.layout_of(facts))
            # The model computes in the thread that reads ahead, while this one hashes and writes.
            for rows in prefetched(self._taken(buffer, sums), READ_AHEAD):
                writer.append(rows)
                written += len(rows.tokens_B)
                self._run.report("activations", done + written, total, unit="positions")
                self._run.check_stop()
            content_hash = writer.finish(buffer.left_out.places)
        facts |= {"sums": sums.to_json()}
        provenance = {"language_model": self._harvester.model.name, "tokens": str(self._config.tokens), "torch": torch.__version__}
        provenance |= {"device": _device_name(self._harvester.model.device), "run": str(self._run.directory)}
        hashes = {name: content_hash}
        records.commit_shard(self._directory, _stem(generation), shards.SHARD_FORMAT, [name], facts, provenance, hashes)
        return done + int(self._order.rows[generation])

    def _taken(self, buffer: RollingBuffer, sums: LayerSums) -> Iterator[ActivationBatch]:
        """The rows of the generation in the buffer, on the CPU, added to `sums` on the way."""
        while buffer.num_left:
            rows = buffer.take(min(ROWS_AT_A_TIME, buffer.num_left))
            sums.add(counted(rows, self._config))
            yield ActivationBatch(*(column.cpu() for column in rows))

    def _facts(self, generation: int, left_out: LeftOut | None = None) -> Record:
        """What the record says of the shard's content; without `left_out` as if nothing were."""
        config, harvester = self._config, self._harvester
        return {
            "tokens_data_id": harvester.tokens.data_id,
            "tokenizer_hash": harvester.tokens.tokenizer_hash,
            "contexts": list(self._order.context_range(generation)),
            "num_positions": int(self._order.rows[generation]) - (0 if left_out is None else len(left_out.places)),
            "language_model_hash": harvester.model.hash,
            "layers": config.layers,
            "d_model": harvester.model.d_model,
            "dtype": next(iter(config.models.values())).dtype,
            "token_dtype": harvester.tokens.dtype.name,
            "context_tokens": config.context_tokens,
            "drop_positions": harvester.provenance.drop_positions,
            "seed": config.seed,
            "generation": generation,
            "model_batch_contexts": config.model_batch_contexts,
            **_as_far_as_there(
                beginning_of_text_id=harvester.provenance.beginning_of_text_id,
                language_models=harvester.provenance.language_models,
                outlier_norms=harvester.provenance.outlier_norms,
                exclude_token_ids=harvester.provenance.exclude_token_ids,
                left_out=None if harvester.exclusion.is_off or left_out is None else left_out.facts(),
            ),
        }

    def _check_disk(self, missing: list[int]) -> None:
        """Prints what all tasks together still have to write, and raises `UserError` if the disk does not hold it."""
        needed = sum(shards.layout_of(self._facts(generation)).file_bytes() for generation in missing)
        # What tasks beside this one have in hand already lies on the disk, and the leftover of a dead one will be replaced.
        in_hand = sum(_size(path) for path in self._directory.glob(".*.safetensors.*.tmp"))
        needed = max(needed - in_hand, 0)
        free = shutil.disk_usage(self._directory).free
        rows = int(self._order.rows[missing].sum()) if missing else 0
        self._run.say(
            f"{self._order.num_positions:,} positions in {self._order.num_generations:,} shards, {rows:,} positions to be written: "
            f"{byte_size(needed)} needed in {self._directory}, {byte_size(free)} free"
        )
        if needed and needed + SPARE_BYTES > free:
            raise UserError(
                f"{self._directory} needs {byte_size(needed + SPARE_BYTES)} more, but its disk has {byte_size(free)} free; free some, "
                "choose another output, set max_tokens lower, or train with activations.kind=stream, which needs no disk"
            )

    def seal_if_complete(self) -> dict[str, Any]:
        """Writes the manifest if every shard is committed, whoever made it; gives the stage's result."""
        stems = [_stem(generation) for generation in range(self._order.num_generations)]
        if not all(self._is_committed(generation) for generation in range(self._order.num_generations)):
            self._run.say(f"this task's shards are done; the set is sealed when those of all {self._run.num_tasks} tasks are")
            return {"complete": False, "output": str(self._directory)}
        made = {stem: records.read_shard(self._directory, stem, shards.SHARD_FORMAT) for stem in stems}
        statistics = statistics_of(record["sums"] for record in made.values())
        manifest = shards.seal(self._directory, made, statistics)
        size = sum(described["bytes"] for record in made.values() for described in record["files"].values())
        for line in left_out_sentences(manifest.get("left_out"), statistics, manifest["layers"]):
            self._run.say(line)
        self._run.say(f"{manifest['num_positions']:,} positions  {byte_size(size)}  data id {manifest['data_id'][:12]}  {self._directory}")
        result = {"complete": True, "output": str(self._directory), "data_id": manifest["data_id"], "shards": len(made)}
        result |= {"left_out": num_left_out(manifest)} if "left_out" in manifest else {}
        return result | {"positions": manifest["num_positions"], "bytes": size, "scale": manifest["scale"]}


def _stem(generation: int) -> str:
    return f"{generation:06d}"


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else os.uname().machine
