"""Building a datastore: tokenise, sort, append; interruptible at any moment.

Text is gathered up to a shard, sorted, and appended to the files; only then the manifest
names it. Whatever a crash leaves behind the named bytes is cut off by the next run, which
goes on after the last piece of text the manifest knows.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np

from vllm_specplus.retrieval import datastore
from vllm_specplus.retrieval.corpus import Corpus, Piece
from vllm_specplus.retrieval.datastore import (
    FIRST,
    ORDER,
    TOKENS,
    CorpusLog,
    DatastoreError,
    Manifest,
    Shard,
    read_manifest,
    tokenizer_fingerprint,
    write_manifest,
)

#: Tokens per shard: bounds a build's memory (1.5 GB at its peak, Python included, and
#: about 50 bytes for each token more).
SHARD_TOKENS = 1 << 24
#: Characters tokenised per call, about. The tokenizer works on the pieces in parallel,
#: and takes some hundred bytes for every token until it is done.
BATCH = 1 << 22


def sort_backwards(tokens: np.ndarray) -> np.ndarray:
    """Positions of ``tokens`` uint [n] sorted by the text read backwards from them.

    uint32 [n]. Computed by libdivsufsort over the big-endian bytes of the reversed text:
    bytes then sort as tokens do, and suffixes that begin inside a token are dropped.
    """
    from pydivsufsort import divsufsort

    width = 2 if tokens.dtype.itemsize == 2 else 3
    reversed_text = np.ascontiguousarray(tokens[::-1])
    if width == 2:
        text = reversed_text.astype(">u2").view(np.uint8)
    else:  # ids and the separator fit three bytes, by their low ends
        text = reversed_text.astype(">u4").view(np.uint8).reshape(-1, 4)[:, 1:].reshape(-1)
    suffixes = divsufsort(np.ascontiguousarray(text))
    starts = suffixes[suffixes % width == 0] // width
    return (len(tokens) - 1 - starts).astype(np.uint32)


def first_positions(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """uint32 [V + 1]: how many of ``tokens`` have an id below 0, 1, ... V."""
    counts = np.bincount(tokens[tokens < vocab_size], minlength=vocab_size)
    return np.concatenate(([0], np.cumsum(counts))).astype(np.uint32)


def build(
    path: Path,
    corpus: Corpus,
    tokenizer,
    tokenizer_name: str,
    vocab_size: int,
    shard_tokens: int = SHARD_TOKENS,
    progress: Callable[[int, int], None] = lambda size, tokens: None,
) -> Manifest:
    """Make (or finish) the datastore ``path`` out of ``corpus``.

    ``tokenizer``: Hugging Face; ``vocab_size``: the model's, which may exceed the
    tokenizer's; ``progress`` gets bytes of input and tokens done since its last call.
    Resumes what an earlier call with the same corpus has begun. DatastoreError when the
    folder holds something else, OSError when it cannot be written.
    """
    if vocab_size > 0xFFFFFF:
        raise DatastoreError(f"vocabularies beyond {0xFFFFFF} ids are not supported")
    path.mkdir(parents=True, exist_ok=True)
    fresh = Manifest(
        tokenizer=tokenizer_fingerprint(tokenizer),
        tokenizer_name=tokenizer_name,
        vocab_size=vocab_size,
    )
    with _alone(path):
        manifest = _begin(path, fresh)
        return _store(path, manifest, corpus, tokenizer, shard_tokens, progress)


def _begin(path: Path, fresh: Manifest) -> Manifest:
    """The manifest to go on from: the one there is, if it is for the same model."""
    if (path / datastore.MANIFEST).exists():
        manifest = read_manifest(path)
        if (manifest.tokenizer, manifest.vocab_size) != (fresh.tokenizer, fresh.vocab_size):
            raise DatastoreError(
                f"datastore {str(path)!r} was built with another tokenizer "
                f"({manifest.tokenizer_name}): use that one, or another folder"
            )
    else:
        ours = (TOKENS, ORDER, FIRST, f"{datastore.MANIFEST}.part")
        foreign = [p.name for p in path.iterdir() if p.name not in ours]
        if foreign:
            raise DatastoreError(
                f"{str(path)!r} is not empty and not a datastore (it holds {foreign[0]}): "
                f"name an empty or new folder"
            )
        manifest = fresh
        write_manifest(path, manifest)
    return manifest


def add(
    path: Path,
    corpus: Corpus,
    tokenizer,
    shard_tokens: int = SHARD_TOKENS,
    progress: Callable[[int, int], None] = lambda size, tokens: None,
) -> Manifest:
    """Append ``corpus`` to the datastore ``path``; what is stored is not touched."""
    manifest = read_manifest(path)
    datastore.check_target(manifest, str(path), tokenizer, manifest.vocab_size)
    with _alone(path):
        manifest = read_manifest(path)  # now that nobody changes it
        return _store(path, manifest, corpus, tokenizer, shard_tokens, progress)


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


def _store(path, manifest, corpus, tokenizer, shard_tokens, progress) -> Manifest:
    log = _log_of(path, manifest, corpus)
    if log.complete:
        raise DatastoreError(
            f"datastore {str(path)!r} holds {log.description} already, unchanged: nothing to do"
        )
    _cut_unfinished(path, manifest)
    pieces = corpus.pieces()
    for piece in islice(pieces, log.pieces):
        progress(piece.size, 0)
    for shard in _shards(pieces, manifest, tokenizer, shard_tokens, progress):
        manifest, log = _append(path, manifest, log, *shard)
    manifest = _with_log(manifest, log.model_copy(update={"complete": True}))
    write_manifest(path, manifest)
    return manifest


def _log_of(path: Path, manifest: Manifest, corpus: Corpus) -> CorpusLog:
    """The manifest's entry of this corpus; a new one for a new corpus."""
    fingerprint = corpus.fingerprint()
    for log in manifest.corpora:
        if log.fingerprint == fingerprint:
            return log
    unfinished = [log for log in manifest.corpora if not log.complete]
    if unfinished:
        raise DatastoreError(
            f"datastore {str(path)!r} is unfinished: {unfinished[0].description} was interrupted "
            f"(finish it with the same command as before) or has changed since (build anew in "
            f"another folder)"
        )
    return CorpusLog(
        fingerprint=fingerprint, description=corpus.description, pieces=0, complete=False
    )


def _with_log(manifest: Manifest, log: CorpusLog) -> Manifest:
    others = [other for other in manifest.corpora if other.fingerprint != log.fingerprint]
    return manifest.model_copy(update={"corpora": [*others, log]})


def _cut_unfinished(path: Path, manifest: Manifest) -> None:
    """Drop what an interrupted run appended but did not get to name."""
    if manifest.shards:
        datastore.check_sizes(path, manifest)
    for name, size in manifest.sizes().items():
        with open(path / name, "ab") as file:
            file.truncate(size)


def _shards(
    pieces: Iterator[Piece], manifest: Manifest, tokenizer, shard_tokens: int, progress
) -> Iterator[tuple[np.ndarray, int, int]]:
    """(tokens, documents, pieces) of one shard after the other.

    A shard takes whole pieces until it is full, so it may exceed ``shard_tokens`` by one.
    """
    parts: list[np.ndarray] = []
    size = documents = count = 0
    for tokens, piece in _tokenised(pieces, manifest, tokenizer):
        parts.append(tokens)
        size += len(tokens)
        documents += piece.ends_document
        count += 1
        progress(piece.size, len(tokens))
        if size >= shard_tokens:
            yield np.concatenate(parts), documents, count
            parts, size, documents, count = [], 0, 0, 0
    if size:
        yield np.concatenate(parts), documents, count


def _tokenised(
    pieces: Iterable[Piece], manifest: Manifest, tokenizer
) -> Iterator[tuple[np.ndarray, Piece]]:
    end = np.array([manifest.separator], manifest.dtype)
    for batch in _batches(pieces):
        encoded = tokenizer([p.text for p in batch], add_special_tokens=False, verbose=False)
        for piece, ids in zip(batch, encoded["input_ids"], strict=True):
            tokens = np.array(ids, np.int64)
            if len(tokens) and not 0 <= tokens.min() <= tokens.max() < manifest.vocab_size:
                raise DatastoreError(
                    f"the tokenizer makes id {tokens.max()}, beyond the vocabulary of "
                    f"{manifest.vocab_size}"
                )
            tokens = tokens.astype(manifest.dtype)
            yield (np.concatenate((tokens, end)) if piece.ends_document else tokens), piece


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


def _append(
    path: Path,
    manifest: Manifest,
    log: CorpusLog,
    tokens: np.ndarray,
    documents: int,
    pieces: int,
) -> tuple[Manifest, CorpusLog]:
    """Sort and store one shard; only a complete one is named by the manifest."""
    parts = {
        TOKENS: tokens,
        ORDER: sort_backwards(tokens),
        FIRST: first_positions(tokens, manifest.vocab_size),
    }
    for name, array in parts.items():
        with open(path / name, "ab") as file:
            file.write(array.data)
            file.flush()
            os.fsync(file.fileno())
    shard = Shard(
        tokens=len(tokens),
        documents=documents,
        sha256={name: hashlib.sha256(array.data).hexdigest() for name, array in parts.items()},
    )
    log = log.model_copy(update={"pieces": log.pieces + pieces})
    manifest = manifest.model_copy(update={"shards": [*manifest.shards, shard]})
    manifest = _with_log(manifest, log)
    write_manifest(path, manifest)
    return manifest, log
