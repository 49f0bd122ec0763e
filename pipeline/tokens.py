"""Token sets: the ids of many documents in a few flat files, opened without reading them.

    tokens/demo/train/
      lib-000.bin     little-endian uint16 (uint32 for vocabularies of 65,535 and more) without header: whole documents,
                      each followed by the separator, the dtype's greatest value, which no id reaches
      lib-000.ends    uint64[documents + 1], first 0: document d is bin[ends[d] : ends[d+1] - 1], bin[ends[d+1] - 1] its separator
      lib-000.json    the shard's record     manifest.json  the set's

Two documents [5, 6, 7] and [8] are `5 6 7 65535 8 65535` in the .bin and `0 4 6` in the .ends. The end-of-text id can't
separate documents, since it also occurs inside them; the separator never reaches a model (see `pipeline.contexts`).
"""

import contextlib
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline import records
from pipeline.config.errors import UserError
from pipeline.records import Record
from pipeline.run import Run

SET_FORMAT, SHARD_FORMAT = "token-set/1", "token-shard/1"
ENDINGS = ("bin", "ends")

Ids = npt.NDArray[Any]
Ends = npt.NDArray[np.uint64]


class Vocabulary(NamedTuple):
    """What a token set records of its tokenizer."""

    size: int
    """One more than the greatest id."""
    end_of_text_id: int
    tokenizer_hash: str
    """Of the tokenizer's content; empty where no tokenizer made the ids."""

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype("<u2" if self.size < 65_535 else "<u4")

    @property
    def separator(self) -> int:
        return int(np.iinfo(self.dtype).max)

    def facts(self) -> Record:
        """The entries of a shard's record and of a manifest that say how to read the ids."""
        return {
            "dtype": self.dtype.name,
            "separator": self.separator,
            "vocab_size": self.size,
            "end_of_text_id": self.end_of_text_id,
            "tokenizer_hash": self.tokenizer_hash,
        }


class BeginningOfText(NamedTuple):
    """What a token set's manifest says of the token that a model may want before every text; the set itself holds none.

    It stands in the manifest alone, so the data id is the same as that of a set made before this was recorded.
    """

    id: int | None
    """None if the tokenizer has no such token."""
    is_added: bool | None
    """Whether the tokenizer's own call puts it there; None in a set that was made before this was recorded."""

    def facts(self) -> Record:
        return {"beginning_of_text_id": self.id, "adds_beginning_of_text": self.is_added}


class TokenShard(NamedTuple):
    stem: str
    ids: Ids
    """Memory-mapped, separators included."""
    ends: Ends
    """Memory-mapped, [num_documents + 1]."""
    num_documents: int
    first_document: int
    """Index in the set of the shard's first document."""
    record: Record


class TokenSet:
    """A sealed token set, memory-mapped. Made by `open`."""

    def __init__(self, directory: Path, manifest: Record, shards: list[TokenShard]) -> None:
        self.directory = directory
        self.shards = shards
        self.data_id: str = manifest["data_id"]
        self.vocab_size: int = manifest["vocab_size"]
        self.end_of_text_id: int = manifest["end_of_text_id"]
        self.tokenizer_hash: str = manifest["tokenizer_hash"]
        self.dtype = np.dtype(manifest["dtype"])
        self.separator: int = manifest["separator"]
        self.num_tokens: int = manifest["tokens"]
        """Separators not counted."""
        self.num_documents: int = manifest["documents"]
        self.max_id: int = max((shard.record["max_id"] for shard in shards), default=-1)
        """The greatest id of the documents, separators left out; -1 where there is none."""
        self.end_of_text: str | None = manifest.get("end_of_text")
        """The token that stands for separators, as text; None where it was not recorded."""
        self.beginning_of_text = BeginningOfText(manifest.get("beginning_of_text_id"), manifest.get("adds_beginning_of_text"))

    @classmethod
    def open(cls, directory: Path) -> "TokenSet":
        """The set in `directory`, with formats, sizes and data id checked; `UserError` names the file that is wrong."""
        manifest, shard_records = records.read_data_set(directory, SET_FORMAT, SHARD_FORMAT)
        for stem, record in shard_records.items():
            _check_record(directory, stem, record, manifest)
        for key in ("tokens", "documents"):
            found = sum(record[key] for record in shard_records.values())
            if found != manifest[key]:
                raise UserError(
                    f"{directory / records.MANIFEST} says {manifest[key]:,} {key}, its shards' records {found:,}: the manifest is "
                    "damaged; delete it and run tokenize again, it writes the manifest anew"
                )
        shards, first_document = [], 0
        for stem, record in shard_records.items():
            shards.append(_map_shard(directory, stem, record, first_document))
            first_document += record["documents"]
        return cls(directory, manifest, shards)

    def document(self, index: int) -> Ids:
        """The ids of document `index` of the set, counted over all shards, without its separator."""
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document {index} of {self.num_documents}")
        # Of the shards that start at or before `index` the last one holds it; empty shards start where the next one does.
        shard = self.shards[bisect_right(self.shards, index, key=lambda shard: shard.first_document) - 1]
        local = index - shard.first_document
        return shard.ids[int(shard.ends[local]) : int(shard.ends[local + 1]) - 1]

    def check_hashes(self, run: Run) -> None:
        """Rehashes every file, which takes about a second for 2 GB; `UserError` names one that is damaged."""
        for number, shard in enumerate(self.shards, 1):
            records.check_hashes(self.directory, shard.stem, shard.record, run.check_stop)
            run.report("check hashes", number, len(self.shards), unit="shards")


def _check_record(directory: Path, stem: str, record: Record, manifest: Record) -> None:
    """That the shard belongs to this set and its files hold as many numbers as its record says."""
    for key in ("dtype", "separator", "vocab_size", "end_of_text_id", "tokenizer_hash"):
        if record[key] != manifest[key]:
            raise UserError(
                f"{directory / stem}.json has {key} {record[key]!r}, the set's manifest {manifest[key]!r}: shards of two tokenizers "
                "are mixed; tokenize into a new directory"
            )
    wanted = {
        "bin": (record["tokens"] + record["documents"]) * np.dtype(record["dtype"]).itemsize,
        "ends": (record["documents"] + 1) * 8,
    }
    for ending, size in wanted.items():
        found = record["files"][f"{stem}.{ending}"]["bytes"]
        if found != size:
            raise UserError(
                f"{directory / stem}.{ending} holds {found:,} bytes; {record['tokens']:,} tokens in {record['documents']:,} documents "
                f"take {size:,}: the shard is damaged; delete {directory / stem}.json and run tokenize again, it redoes only that shard"
            )


def _map_shard(directory: Path, stem: str, record: Record, first_document: int) -> TokenShard:
    ids = map_numbers(directory / f"{stem}.bin", np.dtype(record["dtype"]).newbyteorder("<"))
    ends = map_numbers(directory / f"{stem}.ends", np.dtype("<u8"))
    if ends[0] != 0 or ends[-1] != len(ids):
        raise UserError(
            f"{directory / stem}.ends goes from {ends[0]:,} to {ends[-1]:,}, expected 0 to {len(ids):,}: the file is damaged; "
            f"delete {directory / stem}.json and run tokenize again, it redoes only that shard"
        )
    return TokenShard(stem, ids, ends, record["documents"], first_document, record)


def map_numbers(path: Path, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """The file at `path` as an array that is read when touched; an empty file can't be mapped and gives an empty array."""
    if path.stat().st_size == 0:
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r")


class Documents(NamedTuple):
    """Whole documents, as a shard stores them."""

    ids: Ids
    """Of the set's dtype, with each document's separator."""
    lengths: npt.NDArray[np.int64]
    """Of each document, without its separator."""
    max_id: int
    """The greatest id, separators left out; -1 where there is none."""


class TokenShardWriter:
    """Writes one shard; nothing of it exists until `commit`. Use it in a `with` block, which drops what was not committed."""

    def __init__(self, directory: Path, stem: str, vocabulary: Vocabulary) -> None:
        records.remove_leftovers(directory, stem)
        self.directory, self.stem, self.vocabulary = directory, stem, vocabulary
        self.num_tokens, self.num_documents, self.max_id = 0, 0, -1
        self._files = contextlib.ExitStack()
        self._ids, self._ends = (self._files.enter_context(records.atomic_file(directory / f"{stem}.{e}")) for e in ENDINGS)
        self._ends.write(np.zeros(1, "<u8").tobytes())

    def __enter__(self) -> "TokenShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._files.__exit__(kind or _Dropped, error or _Dropped(), trace)

    def append(self, documents: Documents) -> None:
        """Adds whole documents. Raises `UserError` for an id that the vocabulary does not have."""
        ids, lengths, max_id = documents
        if max_id >= self.vocabulary.size:
            raise UserError(f"{self.directory / self.stem}: id {max_id:,} in a vocabulary of {self.vocabulary.size:,}; check the tokenizer")
        self.max_id = max(self.max_id, max_id)
        self._ids.write(np.ascontiguousarray(ids).data)
        ends = self.num_tokens + self.num_documents + np.cumsum(lengths + 1)
        self._ends.write(ends.astype("<u8").data)
        self.num_tokens += int(lengths.sum())
        self.num_documents += len(lengths)

    def commit(self, facts: Record, provenance: Record) -> Record:
        """Puts the files in place and writes the record: the shard exists from here on."""
        self._files.close()
        counts = {"tokens": self.num_tokens, "documents": self.num_documents, "max_id": self.max_id}
        names = [f"{self.stem}.{ending}" for ending in ENDINGS]
        content = {**self.vocabulary.facts(), **counts, **facts}
        return records.commit_shard(self.directory, self.stem, SHARD_FORMAT, names, content, provenance)


class _Dropped(Exception):
    """Makes `atomic_file` throw away a file whose shard was never committed."""


def join_documents(documents: Iterable[Sequence[int] | Ids], vocabulary: Vocabulary) -> Documents:
    """Documents as a writer takes them, from the ids of each."""
    arrays = [np.asarray(document, np.int64) for document in documents]
    joined = [part for array in arrays for part in (array, [vocabulary.separator])]
    ids = np.concatenate(joined) if joined else np.empty(0, np.int64)
    max_id = max((int(array.max()) for array in arrays if len(array)), default=-1)
    return Documents(ids.astype(vocabulary.dtype), np.array([len(array) for array in arrays], np.int64), max_id)


def seal(directory: Path, shards: dict[str, Record], vocabulary: Vocabulary, facts: Record) -> Record:
    """Writes the manifest of a set whose shards are all committed, and gives it."""
    totals = {key: sum(record[key] for record in shards.values()) for key in ("tokens", "documents")}
    return records.write_manifest(directory, SET_FORMAT, shards, {**vocabulary.facts(), **totals, **facts})


def write_token_set(
    directory: Path,
    shards: Mapping[str, Iterable[Sequence[int] | Ids]],
    *,
    vocab_size: int,
    end_of_text_id: int,
    tokenizer_hash: str = "",
    facts: Record | None = None,
) -> TokenSet:
    """Writes documents that are ids already (a list of documents by shard name) as a sealed set, and opens it.

    facts : further entries of the manifest.
    """
    vocabulary = Vocabulary(vocab_size, end_of_text_id, tokenizer_hash)
    made = {}
    for stem, documents in shards.items():
        with TokenShardWriter(directory, stem, vocabulary) as writer:
            writer.append(join_documents(documents, vocabulary))
            made[stem] = writer.commit({}, {})
    seal(directory, made, vocabulary, facts or {})
    return TokenSet.open(directory)
