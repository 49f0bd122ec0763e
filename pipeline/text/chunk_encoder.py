"""Chunks of lines to the ids of both splits, in this process or spread over several; the results don't depend on which."""

import json
import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import numpy as np
import xxhash

from pipeline.config.errors import UserError
from pipeline.text.encoders import EncodedTexts, EncoderName, make_encoder
from pipeline.text.text_lines import EMPTY, LineParser, Reject, drop_empty
from pipeline.text.text_source import Chunk
from pipeline.text.tokenizer import TokenizerDefinition
from pipeline.tokens import Documents, Vocabulary


class ChunkSettings(NamedTuple):
    """All that a worker needs to know."""

    tokenizer: TokenizerDefinition
    encoder: EncoderName
    text_field: str
    max_line_bytes: int
    validation_fraction: float
    seed: int


class EncodedChunk(NamedTuple):
    train: Documents
    validation: Documents
    num_lines: int
    reasons: Counter[str]
    """Lines that gave no document, by reason."""
    rejects: bytes
    """The same as JSON lines."""
    num_blank: int
    """Of the lines that gave no document, those of white space alone."""

    def counts(self) -> Counter[str]:
        """Lines, documents and tokens of both splits, and lines without a document; blank ones are empty ones too."""
        splits = (self.train, self.validation)
        return Counter(
            lines=self.num_lines,
            documents=sum(len(split.lengths) for split in splits),
            tokens=sum(int(split.lengths.sum()) for split in splits),
            empty=self.reasons[EMPTY],
            blank=self.num_blank,
            rejected=self.reasons.total() - self.reasons[EMPTY],
        )


class ChunkEncoder:
    """Encodes chunks in this process."""

    def __init__(self, settings: ChunkSettings) -> None:
        self._settings = settings
        self._parser = LineParser(settings.text_field, settings.max_line_bytes)
        self._encoder = make_encoder(settings.tokenizer, settings.encoder)

    def encode(self, chunk: Chunk) -> EncodedChunk:
        parsed = self._parser.parse(chunk)
        encoded = self._encoder.encode(parsed.texts)
        rejects = parsed.rejects
        is_empty = encoded.lengths == 0
        if is_empty.any():
            rejects = sorted(rejects + drop_empty(parsed, chunk, is_empty.tolist()))
        is_validation = np.array([is_held_out(t, self._settings.validation_fraction, self._settings.seed) for t in parsed.texts], bool)
        vocabulary = self._settings.tokenizer.vocabulary
        return EncodedChunk(
            _documents(encoded, ~is_validation & ~is_empty, vocabulary),
            _documents(encoded, is_validation & ~is_empty, vocabulary),
            parsed.num_lines,
            Counter(reject.reason for reject in rejects),
            b"".join(_json_line(reject) for reject in rejects),
            parsed.num_blank,
        )


def is_held_out(text: str, fraction: float, seed: int) -> bool:
    """Whether a text belongs to the validation split: decided by the text alone, so it stays when files are added."""
    return fraction > 0 and xxhash.xxh3_64_intdigest(text.encode(), seed=seed) < fraction * 2**64


def _documents(encoded: EncodedTexts, chosen: np.ndarray, vocabulary: Vocabulary) -> Documents:
    """The chosen texts' ids, each text followed by the separator."""
    ids = encoded.ids if chosen.all() else encoded.ids[np.repeat(chosen, encoded.lengths)]
    lengths = encoded.lengths[chosen]
    with_separators = np.empty(len(ids) + len(lengths), vocabulary.dtype)
    is_id = np.ones(len(with_separators), bool)
    is_id[np.cumsum(lengths + 1) - 1] = False
    with_separators[is_id] = ids
    with_separators[~is_id] = vocabulary.separator
    return Documents(with_separators, lengths, int(ids.max()) if len(ids) else -1)


def _json_line(reject: Reject) -> bytes:
    return json.dumps(reject._asdict(), ensure_ascii=False).encode() + b"\n"


class EncoderPool:
    """Encodes chunks over `processes` processes, giving the results in the chunks' order. Use it in a `with` block."""

    def __init__(self, settings: ChunkSettings, processes: int) -> None:
        self._processes = processes
        self._here = ChunkEncoder(settings) if processes == 1 else None
        self._executor = None
        if processes > 1:
            # spawn: a fork would copy the threads' locks of the tokenizer libraries, and hang on them now and then.
            context = multiprocessing.get_context("spawn")
            self._executor = ProcessPoolExecutor(processes, mp_context=context, initializer=_start_worker, initargs=(settings,))

    def __enter__(self) -> "EncoderPool":
        return self

    def __exit__(self, *exc: object) -> None:
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)

    def map(self, chunks: Iterable[Chunk]) -> Iterator[EncodedChunk]:
        """Reads on only as far as the workers need, so memory does not depend on how much text there is."""
        if self._executor is None:
            assert self._here is not None
            yield from map(self._here.encode, chunks)
            return
        waiting: deque[Future[EncodedChunk]] = deque()
        try:
            for chunk in chunks:
                waiting.append(_submit(self._executor, chunk))
                if len(waiting) > 2 * self._processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            # The executor ends the others with SIGTERM, which they ignore, and would wait for them for ever.
            for worker in multiprocessing.active_children():
                worker.kill()
            raise UserError(
                "a tokenizing process was killed, most often for want of memory; give the job more mem_gb or set fewer processes, "
                "and start it again: finished parts are kept"
            ) from error


def _submit(executor: ProcessPoolExecutor, chunk: Chunk) -> Future[EncodedChunk]:
    try:
        return executor.submit(_encode_in_worker, chunk)
    except ValueError as error:
        # A worker was being started while the executor closed its pipes, because another had been killed.
        raise BrokenProcessPool("closed while a worker was started") from error


_worker: ChunkEncoder | None = None


def _start_worker(settings: ChunkSettings) -> None:
    """Prepares a worker process: it leaves signals to its parent, and ends when the parent is gone, even by kill -9."""
    global _worker
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = ChunkEncoder(settings)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_in_worker(chunk: Chunk) -> EncodedChunk:
    assert _worker is not None
    return _worker.encode(chunk)
