"""The stage `tokenize`: JSON-lines files to two token sets, train and validation.

Each part of a source (see `pipeline.text.text_source`) becomes one shard in each set. The two records of a part say the same of its
lines, and each says how many of its documents are here and how many elsewhere, in the other set:

    lines = documents + documents_elsewhere + empty + rejected

A special token written out in a text, such as `<|endoftext|>`, becomes the special token, as the tokenizer does by default, or
ordinary text with `special_text: text` (see `pipeline.text.tokenizer`). Between documents stands the separator, never a token.

Where gigatoken is found wrong on a text, nothing that it made counts any more: see `pipeline.text.encoder_difference`.

Task i of n takes the sources i, i + n, ... in the order of their names; whoever finds every part done writes the manifests.
"""

import itertools
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pipeline import records
from pipeline.config.errors import UserError
from pipeline.config.text_files import Source, TextFile, find_sources
from pipeline.config.text_kinds import faults_of
from pipeline.config.tokenize_text import TokenizeConfig
from pipeline.records import Record
from pipeline.run import BYTES, Run
from pipeline.text import encoder_difference
from pipeline.text.chunk_encoder import ChunkSettings, EncoderPool
from pipeline.text.encoders import choose_encoder
from pipeline.text.running_check import EncoderDiffers
from pipeline.text.source_parts import PartWriter, SourceParts
from pipeline.text.text_lines import LineParser
from pipeline.text.text_source import Chunk, PartEnd, read_chunks
from pipeline.text.tokenizer import TokenizerDefinition, load_tokenizer
from pipeline.tokens import SHARD_FORMAT, seal

SAMPLE_BYTES = 1 << 18


def run(config: TokenizeConfig, run: Run) -> dict[str, Any]:
    """Tokenizes this task's sources, and seals the sets if no part is missing then."""
    started = time.monotonic()
    sources = find_sources(config.sources)
    mine = sources[run.task :: run.num_tasks]
    if faults := faults_of(mine):
        raise UserError("; ".join(faults))
    tokenizer = load_tokenizer(
        config.tokenizer.name,
        revision=config.tokenizer.revision,
        special_text=config.tokenizer.special_text,
        end_of_text=config.tokenizer.end_of_text,
    )
    run.bind_input("tokenizer", tokenizer.vocabulary.tokenizer_hash, tokenizer.files)
    for directory in config.outputs().values():
        recipe = {"stage": config.stage, "settings": config.identity(), "inputs": {"tokenizer": tokenizer.vocabulary.tokenizer_hash}}
        records.claim(directory, recipe)
    for remark in tokenizer.remarks:
        run.say(remark)
    work = _Work(config, run, tokenizer, mine)
    try:
        work.tokenize_all()
    except EncoderDiffers as difference:
        encoder_difference.note(config.output, difference)
        if config.encoder != "auto":
            raise UserError(f"{difference}; set encoder: auto and start it again, it makes again what gigatoken made") from None
        run.say(f"{difference}; what it made in {config.output} is withdrawn and made again")
        work = _Work(config, run, tokenizer, mine)
        work.tokenize_all()
    manifests = seal_if_complete(config, sources, tokenizer)
    if manifests is None:
        run.say(f"task {run.task} of {run.num_tasks} is done; parts of other tasks are not, so the sets are not sealed yet")
    for split, manifest in (manifests or {}).items():
        counts = "  ".join(f"{count:,} {key}" for key, count in _totals(manifest).items())
        run.say(f"{split}: {counts}  data id {manifest['data_id'][:12]}")
    return {
        "sealed": manifests is not None,
        "sources": len(mine),
        "encoder": work.encoder,
        "seconds": round(time.monotonic() - started, 1),
        "this_run": {key: work.totals[key] for key in ("lines", "documents", "tokens", "empty", "rejected")},
        "sets": {split: {"data_id": m["data_id"], **_totals(m)} for split, m in (manifests or {}).items()},
    }


class _Work:
    """One task's sources, from text to committed shards."""

    def __init__(self, config: TokenizeConfig, run: Run, tokenizer: TokenizerDefinition, sources: list[Source]) -> None:
        self._config, self._run, self._tokenizer, self._sources = config, run, tokenizer, sources
        self._total_bytes = sum(source.num_bytes for source in sources)
        self._bytes_before = 0
        self.encoder: str | None = None
        self.totals: Counter[str] = Counter()
        """Lines, documents and so on that this run itself made, finished earlier ones not counted."""

    def tokenize_all(self) -> None:
        todo = []
        for source in self._sources:
            parts = SourceParts(self._config, source)
            if parts.are_complete():
                parts.rejects.join(len(parts.done))
                self._bytes_before += source.num_bytes
            else:
                todo.append(parts)
        if not todo:
            return
        settings = self._chunk_settings(todo[0].source)
        self.encoder = settings.encoder
        with EncoderPool(settings, self._config.processes or len(os.sched_getaffinity(0))) as pool:
            for parts in todo:
                self._tokenize_source(parts, pool)
                self._bytes_before += parts.source.num_bytes
        self._report(self._bytes_before, done=True)

    def _chunk_settings(self, first: Source) -> ChunkSettings:
        config = self._config
        known = encoder_difference.noted(config.output)
        sample = sample_texts(first, config)
        encoder = choose_encoder(self._tokenizer, config.encoder, sample, self._run.say, known_difference=known)
        return ChunkSettings(self._tokenizer, encoder, config.text_field, config.max_line_bytes, config.validation_fraction, config.seed)

    def _tokenize_source(self, parts: "SourceParts", pool: EncoderPool) -> None:
        """Commits the parts of one source that are missing; the others are read past and compared with their records."""
        text = TextFile(parts.source.path)
        assert self.encoder is not None
        provenance = self._tokenizer.provenance(self.encoder)
        for part, chunks in itertools.groupby(_read(text, self._config), key=lambda chunk: chunk.part):
            watched = _WatchedChunks(chunks, self._run)
            if part in parts.done:
                for _ in watched:
                    self._report(self._bytes_before + text.bytes_read)
                parts.check_unchanged(part, watched.part_end())
            else:
                with PartWriter(self._config, parts, part, self._tokenizer.vocabulary, provenance) as writer:
                    for encoded in pool.map(watched):
                        writer.append(encoded)
                        self.totals += encoded.counts()
                        self._report(self._bytes_before + text.bytes_read)
                    self._heed_difference()
                    writer.commit(watched.part_end())
        parts.rejects.join(len(parts.done))

    def _heed_difference(self) -> None:
        """Raises `EncoderDiffers` if another task found what this one is about to commit to be suspect."""
        found = encoder_difference.noted(self._config.output)
        if self.encoder == encoder_difference.FAST and found is not None:
            raise EncoderDiffers(found)

    def _report(self, num_bytes: int, *, done: bool = False) -> None:
        note = f"{self.totals['documents']:,} documents, {self.totals['tokens']:,} tokens"
        self._run.report("text", num_bytes, self._total_bytes, unit=f"{BYTES}files", done=done, note=note)


class _WatchedChunks:
    """The chunks of one part on their way to the workers: heeds a request to stop and keeps what the last one says of the part."""

    def __init__(self, chunks: Iterable[Chunk], run: Run) -> None:
        self._chunks, self._run = chunks, run
        self._end: PartEnd | None = None

    def __iter__(self) -> Iterator[Chunk]:
        for chunk in self._chunks:
            self._run.check_stop()
            self._end = chunk.end
            yield chunk

    def part_end(self) -> PartEnd:
        assert self._end is not None, "a part's last chunk carries its end"
        return self._end


def sample_texts(source: Source, config: TokenizeConfig) -> list[str]:
    """Texts from the beginning of a source, about 256 KiB; a long one is cut off."""
    chunk = next(iter(_read(TextFile(source.path), config, chunk_bytes=SAMPLE_BYTES)))
    return [text[:SAMPLE_BYTES] for text in LineParser(config.text_field, config.max_line_bytes).parse(chunk).texts]


def _read(text: TextFile, config: TokenizeConfig, chunk_bytes: int | None = None) -> Iterator[Chunk]:
    size = chunk_bytes or config.chunk_bytes
    return read_chunks(iter(text), part_bytes=config.part_bytes, chunk_bytes=size, max_line_bytes=config.max_line_bytes)


def seal_if_complete(config: TokenizeConfig, sources: list[Source], tokenizer: TokenizerDefinition) -> dict[str, Record] | None:
    """Writes the manifest of each split if every part of every source is committed, and gives them by split."""
    all_parts = [SourceParts(config, source) for source in sources]
    if not all(parts.are_complete() for parts in all_parts):
        return None
    stems = [parts.stem(part) for parts in all_parts for part in sorted(parts.done)]
    found: dict[str, dict[str, Record]] = {}
    for split, directory in config.outputs().items():
        found[split] = records.committed_shards(directory, SHARD_FORMAT)
        strays = sorted(found[split].keys() - set(stems))
        if strays:
            raise UserError(
                f"{directory} holds {', '.join(strays[:3])}{', ...' if len(strays) > 3 else ''}, made of files that sources no longer "
                "names; name them again, or delete these shards"
            )
    facts = {split: _facts(shards) for split, shards in found.items()}
    for split, directory in config.outputs().items():
        _check_holds_documents(directory, facts[split], config)
    made_by = tokenizer.facts()
    return {
        split: seal(config.outputs()[split], found[split], tokenizer.vocabulary, {"split": split, **made_by, **facts[split]})
        for split in found
    }


def _facts(shards: dict[str, Record]) -> Record:
    return {key: sum(record[key] for record in shards.values()) for key in ("lines", "documents_elsewhere", "empty", "rejected")}


def _check_holds_documents(directory: Path, facts: Record, config: TokenizeConfig) -> None:
    """Raises `UserError` for a set without a document: what reads it could only fail, or find nothing."""
    if facts["lines"] > facts["documents_elsewhere"] + facts["empty"] + facts["rejected"]:
        return
    again = f"choose another output or delete {config.output}"
    if elsewhere := facts["documents_elsewhere"]:
        raise UserError(
            f"{directory} would hold none of the {elsewhere:,} documents, so it is not sealed: the hash chose none of so few; set another "
            f"validation_fraction (0 makes no validation set) or seed, and {again}"
        )
    raise UserError(
        f"{directory} would hold no document, so it is not sealed: of {facts['lines']:,} lines {facts['empty']:,} are empty, "
        f"{facts['rejected']:,} rejected (see {config.output / 'rejects'}); name other sources, and {again}"
    )


def _totals(manifest: Record) -> Record:
    return {key: manifest[key] for key in ("documents", "tokens", "lines", "empty", "rejected")}
