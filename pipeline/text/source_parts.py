"""The parts of one source that are done, and the writing of those that are not.

A part is done when every split has its record. Both records say the same of the part's lines, and each says how many of
the part's documents are here and how many elsewhere, in the other split:

    lines = documents + documents_elsewhere + empty + rejected
"""

import re
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pipeline import records
from pipeline.config.errors import UserError
from pipeline.config.text_files import Source
from pipeline.config.tokenize_text import TokenizeConfig
from pipeline.records import Record
from pipeline.text import encoder_difference
from pipeline.text.chunk_encoder import EncodedChunk
from pipeline.text.rejects import RejectFiles
from pipeline.text.text_lines import REASONS
from pipeline.text.text_source import PartEnd
from pipeline.tokens import SHARD_FORMAT, TokenShardWriter, Vocabulary


class SourceParts:
    """Which parts of a source are done."""

    def __init__(self, config: TokenizeConfig, source: Source) -> None:
        self.source = source
        self.rejects = RejectFiles(config.output / "rejects", source.name)
        self.directories = list(config.outputs().values())
        distrusted = encoder_difference.noted(config.output) is not None
        found = [_committed(directory, source.name, distrusted=distrusted) for directory in self.directories]
        self.done: dict[int, Record] = {part: found[0][part] for part in sorted(set(found[0]).intersection(*found[1:]))}
        """The first split's record of each part that is done."""

    def stem(self, part: int) -> str:
        return f"{self.source.name}-{part:03d}"

    def are_complete(self) -> bool:
        """Whether nothing is left to do. Raises `UserError` if the file has another size than the one that was read."""
        last = max(self.done, default=-1)
        if last < 0 or not self.done[last]["source"]["is_last"] or len(self.done) != last + 1:
            return False
        made_of = self.done[last]["provenance"]
        same_form = Path(made_of["source"]).suffix == self.source.path.suffix
        if same_form and made_of["source_bytes"] != self.source.num_bytes:
            raise UserError(
                f"{self.source.path} holds {self.source.num_bytes:,} bytes, but {made_of['source_bytes']:,} when it was tokenized: "
                "the file changed; choose another output, or restore the file"
            )
        return True

    def check_unchanged(self, part: int, end: PartEnd) -> None:
        """Raises `UserError` if a part that is done, now read past, is not the text that it was made of."""
        if self.done[part]["source"] != end._asdict():
            raise UserError(
                f"{self.source.path} is not the text that {self.directories[0] / self.stem(part)} was made of: the file changed; "
                "choose another output, or restore the file"
            )


def _committed(directory: Path, source: str, *, distrusted: bool) -> dict[int, Record]:
    """The records of a source's shards in `directory`, by part. `distrusted`: those that gigatoken made are withdrawn."""
    names = [path.name for path in directory.iterdir()] if directory.exists() else []
    matches = [match for name in names if (match := re.fullmatch(rf"({re.escape(source)}-(\d{{3,}}))\.json", name))]
    found = {int(match[2]): (match[1], records.read_shard(directory, match[1], SHARD_FORMAT)) for match in matches}
    withdrawn = encoder_difference.withdraw(directory, found) if distrusted else set()
    return {part: record for part, (_, record) in found.items() if part not in withdrawn}


class PartWriter:
    """Writes one part: its shard in every split and its rejected lines. No shard of it stays unless it is committed."""

    def __init__(self, config: TokenizeConfig, parts: SourceParts, part: int, vocabulary: Vocabulary, provenance: Record) -> None:
        self._config, self._parts, self._part, self._vocabulary, self._provenance = config, parts, part, vocabulary, provenance
        self._counts: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()
        self._open, self._reject_file = ExitStack(), ExitStack()

    def __enter__(self) -> "PartWriter":
        stem = self._parts.stem(self._part)
        records.remove_leftovers(self._parts.rejects.directory, f"{stem}.jsonl")
        self._writers = [self._open.enter_context(TokenShardWriter(d, stem, self._vocabulary)) for d in self._parts.directories]
        self._open.push(self._reject_file)
        self._rejects = self._reject_file.enter_context(records.atomic_file(self._parts.rejects.part(self._part)))
        return self

    def __exit__(self, *exc: Any) -> None:
        self._open.__exit__(*exc)

    def append(self, encoded: EncodedChunk) -> None:
        # Without a validation split there is one writer, and nothing in encoded.validation.
        for writer, documents in zip(self._writers, (encoded.train, encoded.validation), strict=False):
            writer.append(documents)
        self._rejects.write(encoded.rejects)
        self._reasons += encoded.reasons
        self._counts += encoded.counts()

    def commit(self, end: PartEnd) -> None:
        """Makes the part exist. Raises `UserError` if too many of the source's lines up to its end give no document."""
        # The side file comes first and stays even if there are too many bad lines: it is what says why.
        self._reject_file.close()
        self._check_bad_fraction()
        for writer in self._writers:
            facts = self._facts(writer.num_documents, end)
            accounted = writer.num_documents + facts["documents_elsewhere"] + facts["empty"] + facts["rejected"]
            assert facts["lines"] == accounted, f"{self._parts.stem(self._part)}: {facts['lines']} lines, {accounted} accounted for"
            provenance = {"source": str(self._parts.source.path), "source_bytes": self._parts.source.num_bytes, **self._provenance}
            record = writer.commit(facts, provenance)
            self._parts.done.setdefault(self._part, record)

    def _facts(self, num_documents: int, end: PartEnd) -> Record:
        return {
            "documents_elsewhere": self._counts["documents"] - num_documents,
            "lines": end.num_lines,
            "empty": self._counts["empty"],
            **({"blank": self._counts["blank"]} if self._counts["blank"] else {}),
            "rejected": self._counts["rejected"],
            "rejected_by_reason": {reason: self._reasons[reason] for reason in REASONS if self._reasons[reason]},
            "text_field": self._config.text_field,
            "special_text": self._config.tokenizer.special_text,
            "source": end._asdict(),
        }

    def _check_bad_fraction(self) -> None:
        known = [record for part, record in self._parts.done.items() if part < self._part]
        blank = self._counts["blank"] + sum(record.get("blank", 0) for record in known)
        lines = self._counts["lines"] + sum(record["lines"] for record in known) - blank
        bad = self._reasons.total() + sum(record["empty"] + record["rejected"] for record in known) - blank
        if bad <= self._config.max_bad_fraction * lines:
            return
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self._reasons.most_common())
        found = f"(in part {self._part}: {reasons}); see {self._parts.rejects.part(self._part)}"
        if bad == lines:
            raise UserError(
                f"{self._parts.source.path}: none of {lines:,} lines gives a document {found}; give JSON lines with the text in the field "
                f"{self._config.text_field!r}, or set text_field"
            )
        raise UserError(
            f"{self._parts.source.path}: {bad:,} of {lines:,} lines give no document, more than max_bad_fraction "
            f"{self._config.max_bad_fraction:g} {found}, then mend the file or raise max_bad_fraction"
        )
