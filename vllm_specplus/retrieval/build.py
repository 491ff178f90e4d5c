"""Building a datastore: read, tokenise, store; interruptible at any moment.

A document is known by a digest of its text and is stored once for each time that it is in the
corpus, whatever was stored before: the same command again adds nothing, an interrupted one goes on,
and of a corpus that has changed only what is new is added. Text is gathered up to a shard; while
the next one is read, another thread sorts it, writes it and merges it with earlier ones
(``writer.py``).
"""

from __future__ import annotations

import fcntl
import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from vllm_specplus.retrieval import datastore, writer
from vllm_specplus.retrieval.corpus import Corpus, Piece
from vllm_specplus.retrieval.datastore import (
    CorpusLog,
    DatastoreError,
    Manifest,
    Partial,
    read_manifest,
    tokenizer_fingerprint,
)
from vllm_specplus.retrieval.writer import Text

#: Tokens per shard, and of shards that are merged: bounds a build's memory (1.5 GB at its peak,
#: Python included, and about 50 bytes for each token more).
SHARD_TOKENS = 1 << 24
#: Characters tokenised per call, about. The tokenizer works on the pieces in parallel,
#: and takes some hundred bytes for every token until it is done.
BATCH = 1 << 22

Progress = Callable[[int, int], None]


def _silent(size: int, tokens: int) -> None:
    """Nobody wants to know."""


def build(
    path: Path, corpus: Corpus, tokenizer, tokenizer_name: str, vocab_size: int,
    shard_tokens: int = SHARD_TOKENS, progress: Progress = _silent, append: bool = False,
) -> Manifest:  # fmt: skip
    """Make (or finish) the datastore ``path`` out of ``corpus``.

    ``tokenizer``: Hugging Face; ``vocab_size``: the model's, which may exceed the
    tokenizer's; ``progress`` gets bytes of input and tokens done since its last call.
    Resumes what an earlier call with the same inputs has begun. ``append``: what a finished
    datastore does not hold yet is added to it. DatastoreError when the folder holds something
    else, or other text and not ``append``; OSError when it cannot be written.
    """
    if vocab_size > 0xFFFFFF:
        raise DatastoreError(f"vocabularies beyond {0xFFFFFF} ids are not supported")
    path.mkdir(parents=True, exist_ok=True)
    fresh = Manifest(
        id=uuid.uuid4().hex,
        tokenizer=tokenizer_fingerprint(tokenizer),
        tokenizer_name=tokenizer_name,
        vocab_size=vocab_size,
    )
    with _alone(path):
        manifest = _begin(path, fresh)
        return _store(path, manifest, corpus, tokenizer, shard_tokens, progress, append)


def _begin(path: Path, fresh: Manifest) -> Manifest:
    """The manifest to go on from: the one there is, if it is for the same model."""
    if os.path.lexists(path / datastore.MANIFEST):
        manifest = read_manifest(path)
        if (manifest.tokenizer, manifest.vocab_size) != (fresh.tokenizer, fresh.vocab_size):
            raise DatastoreError(
                f"datastore {str(path)!r} was built with another tokenizer "
                f"({manifest.tokenizer_name}): use that one, or another folder"
            )
    else:
        if foreign := writer.foreign(path):
            raise DatastoreError(
                f"{str(path)!r} is not empty and not a datastore (it holds {foreign}): "
                f"name an empty or new folder"
            )
        manifest = fresh
        writer.write_manifest(path, manifest)
    return manifest


def add(
    path: Path, corpus: Corpus, tokenizer, shard_tokens: int = SHARD_TOKENS,
    progress: Progress = _silent,
) -> Manifest:  # fmt: skip
    """Append the documents of ``corpus`` that the datastore ``path`` does not hold yet."""
    manifest = read_manifest(path)
    datastore.check_target(manifest, str(path), tokenizer, manifest.vocab_size)
    with _alone(path):
        manifest = read_manifest(path)  # now that nobody changes it
        return _store(path, manifest, corpus, tokenizer, shard_tokens, progress, True)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One writer at a time; the lock goes with the process, however it ends."""
    folder = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DatastoreError(
                f"another process is writing datastore {str(path)!r}: wait until it has finished"
            ) from None
        yield
    finally:
        os.close(folder)


def _store(path, manifest, corpus, tokenizer, shard_tokens, progress, append) -> Manifest:
    if manifest.version == 1 and not all(log.complete for log in manifest.corpora):
        raise DatastoreError(
            f"datastore {str(path)!r} was begun by an older vllm-specplus: build it again in "
            f"another folder"
        )
    known = Known(writer.known_documents(path, manifest))
    pieces = new_pieces(corpus.pieces(), known, manifest.partial, progress)
    if not append:
        pieces = _allowed(path, manifest, corpus, pieces)
    manifest = writer.prepared(path, manifest, uuid.uuid4().hex)
    manifest = _with_log(manifest, corpus, complete=False)
    with ThreadPoolExecutor(1, "datastore") as background:
        written: Future[Manifest] | None = None
        for text in _texts(pieces, manifest, tokenizer, shard_tokens, progress):
            manifest = manifest if written is None else written.result()
            written = background.submit(_write, path, manifest, text, shard_tokens)
        manifest = manifest if written is None else written.result()
    manifest = _with_log(manifest, corpus, complete=True)
    writer.write_manifest(path, manifest)
    return manifest


def _write(path: Path, manifest: Manifest, text: Text, shard_tokens: int) -> Manifest:
    return writer.merge(path, writer.append(path, manifest, text), shard_tokens)


def _allowed(
    path: Path, manifest: Manifest, corpus: Corpus, pieces: Iterator[Piece]
) -> Iterator[Piece]:
    """``pieces``, if they may be stored without anybody saying that they are to be added."""
    unfinished = [log for log in manifest.corpora if not log.complete]
    if not manifest.corpora or any(log.inputs == corpus.inputs() for log in unfinished):
        return pieces
    first = next(pieces, None)
    if first is None:
        return iter(())
    if unfinished:
        raise DatastoreError(
            f"datastore {str(path)!r} is unfinished: {unfinished[0].description} was interrupted; "
            f"finish it with the same command as before, or say --append"
        )
    raise DatastoreError(
        f"datastore {str(path)!r} holds {manifest.corpora[-1].description}, and not all of "
        f"{corpus.description}: add that with --append, or name another folder"
    )


def _with_log(manifest: Manifest, corpus: Corpus, complete: bool) -> Manifest:
    """The manifest that says how far it has got with ``corpus``."""
    log = CorpusLog(inputs=corpus.inputs(), description=corpus.description, complete=complete)
    others = [other for other in manifest.corpora if other.inputs != log.inputs]
    return manifest.model_copy(update={"corpora": [*others, log]})


class Known:
    """The documents that are stored, each as often as it is."""

    def __init__(self, digests: np.ndarray):
        """``digests`` uint64 [n]"""
        self._digests, self._left = np.unique(digests, return_counts=True)

    def take(self, digest: int) -> bool:
        """Is one of them left that stands for a document of the corpus? It is not, then."""
        at = int(np.searchsorted(self._digests, np.uint64(digest)))
        if at == len(self._digests) or int(self._digests[at]) != digest or not self._left[at]:
            return False
        self._left[at] -= 1
        return True


def new_pieces(
    pieces: Iterable[Piece], known: Known, partial: Partial | None, progress: Progress
) -> Iterator[Piece]:
    """The ``pieces`` that are not stored yet; ``progress`` is told of those that are.

    ``partial``: the document that was stored last, up to a place within it; if it is the first of
    the new ones, it goes on there.
    """
    skipped = 0  # pieces of the current document, from its beginning
    for piece in pieces:
        if piece.number == 0:
            skipped = 0
            if known.take(piece.digest):
                skipped = 1 << 62
            else:
                if partial is not None and partial.digest == piece.digest:
                    skipped = partial.pieces
                partial = None
        if piece.number < skipped:
            progress(piece.size, 0)
        else:
            yield piece


def _texts(
    pieces: Iterator[Piece], manifest: Manifest, tokenizer, shard_tokens: int, progress: Progress
) -> Iterator[Text]:
    """One shard after the other.

    A shard takes whole pieces until it is full, so it may exceed ``shard_tokens`` by one.
    """
    end = np.array([manifest.separator], manifest.dtype)
    parts: list[np.ndarray] = []
    digests: list[int] = []
    size, partial = 0, manifest.partial
    for tokens, piece in _tokenised(pieces, manifest, tokenizer):
        if partial is not None and piece.number == 0:  # the rest of that one never comes
            parts.append(end)
            digests.append(writer.UNKNOWN)
        parts.append(tokens)
        partial = Partial(digest=piece.digest, pieces=piece.number + 1)
        if piece.ends_document:
            parts.append(end)
            digests.append(piece.digest)
            partial = None
        added = len(tokens) + piece.ends_document
        size += added
        progress(piece.size, added)
        if size >= shard_tokens:
            yield Text(np.concatenate(parts), digests, partial)
            parts, digests, size = [], [], 0
    if parts:
        yield Text(np.concatenate(parts), digests, partial)


def _tokenised(
    pieces: Iterable[Piece], manifest: Manifest, tokenizer
) -> Iterator[tuple[np.ndarray, Piece]]:
    for batch in _batches(pieces):
        encoded = tokenizer([p.text for p in batch], add_special_tokens=False, verbose=False)
        for piece, ids in zip(batch, encoded["input_ids"], strict=True):
            tokens = np.array(ids, np.int64)
            if len(tokens) and not 0 <= tokens.min() <= tokens.max() < manifest.vocab_size:
                raise DatastoreError(
                    f"the tokenizer makes id {tokens.max()}, beyond the vocabulary of "
                    f"{manifest.vocab_size}"
                )
            yield tokens.astype(manifest.dtype), piece


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
