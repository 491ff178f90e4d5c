"""Writing a datastore's files: sort and append shards, merge them, tidy up.

Everything is written behind what the manifest names, or into files that it does not name, and made
durable; only then a new manifest replaces it. Whatever a crash leaves is cut off by the next
writer.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vllm_specplus.retrieval.datastore import (
    DIGEST,
    DOCUMENTS,
    FIRST,
    INDEX,
    MANIFEST,
    ORDER,
    TOKENS,
    VERSION,
    Manifest,
    Partial,
    Shard,
    blocks,
    check_sizes,
    check_sum,
)

#: The digest of a document whose text is not known.
UNKNOWN = 0
#: The files :data:`INDEX` may be of any generation.
_OURS = re.compile(rf"({TOKENS}|{DOCUMENTS}|(order|first)(\.\d+)?\.bin|{MANIFEST}(\.part)?)")


@dataclass(frozen=True, slots=True)
class Text:
    """What is stored as one shard."""

    tokens: np.ndarray
    """uint16 or uint32 [n]"""
    digests: list[int]
    """Of the documents that end in it."""
    partial: Partial | None
    """The document that does not."""


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


def foreign(path: Path) -> str | None:
    """Name of something in the folder ``path`` that no datastore has."""
    return next((p.name for p in path.iterdir() if not _OURS.fullmatch(p.name)), None)


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Replace the manifest, durably: a crash leaves the old one or the new one."""
    part = path / f"{MANIFEST}.part"
    with open(part, "w", encoding="utf-8") as file:
        file.write(manifest.model_dump_json(indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    part.replace(path / MANIFEST)


def prepared(path: Path, manifest: Manifest, identity: str) -> Manifest:
    """The manifest to write on from: what a writer was interrupted in is cut off, and a datastore
    of version 1 is made one of this version, with ``identity`` and no known documents."""
    if manifest.version < VERSION:
        unknown = {DOCUMENTS: np.full(manifest.num_documents, UNKNOWN, np.uint64)}
        (path / DOCUMENTS).unlink(missing_ok=True)
        _write(path, manifest, unknown)
        shards = []
        for shard in manifest.shards:
            empty = np.full(shard.documents, UNKNOWN, np.uint64)
            sums = shard.sha256 | {DOCUMENTS: hashlib.sha256(empty.data).hexdigest()}
            shards.append(shard.model_copy(update={"sha256": sums}))
        update = {"version": VERSION, "id": identity, "shards": shards}
        manifest = manifest.model_copy(update=update)
        write_manifest(path, manifest)
    sizes = manifest.sizes()
    named = {MANIFEST, *(manifest.file(name) for name in sizes)}
    for file in path.iterdir():
        if file.name not in named and _OURS.fullmatch(file.name):
            file.unlink()
    for name, size in sizes.items():
        with open(path / manifest.file(name), "ab") as file:
            file.truncate(size)
    return manifest


def append(path: Path, manifest: Manifest, text: Text) -> Manifest:
    """Sort and store one shard; only a complete one is named by the manifest."""
    digests = np.array(text.digests, np.uint64)
    parts = {TOKENS: text.tokens, DOCUMENTS: digests, **_index(text.tokens, manifest.vocab_size)}
    shard = _placed(manifest, len(text.tokens), len(digests), parts)
    _write(path, manifest, parts)
    update = {"shards": [*manifest.shards, shard], "partial": text.partial}
    manifest = manifest.model_copy(update=update)
    write_manifest(path, manifest)
    return manifest


def first_to_merge(sizes: Sequence[int], most: int) -> int:
    """The first of the last shards, of ``sizes`` tokens, that are to become one of at most
    ``most``; ``len(sizes)`` if none are.

    A shard is merged once those behind it hold as much: what is sorted again gets into a shard of
    at least twice the size, so that a token is sorted log2 times, and the sizes of what remains
    fall by more than half, shard by shard.
    """
    first, behind = len(sizes), 0
    for number in reversed(range(len(sizes))):
        if behind + sizes[number] > most:
            break
        if sizes[number] <= behind:
            first = number
        behind += sizes[number]
    return first


def merge(path: Path, manifest: Manifest, most: int) -> Manifest:
    """Merge the last shards if :func:`first_to_merge` says so, and tidy up if it is time to.

    DatastoreError if what is stored of them is damaged: it must not get a new checksum.
    """
    shards = manifest.shards
    first = first_to_merge([shard.tokens for shard in shards], most)
    if first == len(shards):
        return manifest
    stored = {
        TOKENS: np.frombuffer(_checked(path, manifest, TOKENS, first), manifest.dtype),
        DOCUMENTS: np.frombuffer(_checked(path, manifest, DOCUMENTS, first), np.uint64),
    }
    index = _index(stored[TOKENS], manifest.vocab_size)
    merged = _placed(manifest, len(stored[TOKENS]), len(stored[DOCUMENTS]), stored | index)
    _write(path, manifest, index)
    manifest = manifest.model_copy(update={"shards": [*shards[:first], merged]})
    write_manifest(path, manifest)
    return tidied(path, manifest)


def tidied(path: Path, manifest: Manifest) -> Manifest:
    """Copy the index without parts that are nobody's once these are more than half of it."""
    used = sum(size for name in INDEX for _, size in manifest.parts(name))
    sizes = manifest.sizes()
    if sum(sizes[name] for name in INDEX) <= 2 * used:
        return manifest
    old = [path / manifest.file(name) for name in INDEX]
    shards, place = [], 0
    for number, shard in enumerate(manifest.shards):
        shards.append(shard.model_copy(update={"order_at": place, "first_row": number}))
        place += shard.tokens
    update = {"generation": manifest.generation + 1, "shards": shards}
    new = manifest.model_copy(update=update)
    for name in INDEX:
        with (
            open(path / manifest.file(name), "rb") as source,
            open(path / new.file(name), "wb") as copy,
        ):
            for part in manifest.parts(name):
                for block in blocks(source, *part):
                    copy.write(block)
            copy.flush()
            os.fsync(copy.fileno())
    write_manifest(path, new)
    for file in old:
        file.unlink()  # who has it open keeps it
    return new


def _index(tokens: np.ndarray, vocab_size: int) -> dict[str, np.ndarray]:
    return {ORDER: sort_backwards(tokens), FIRST: first_positions(tokens, vocab_size)}


def _placed(manifest: Manifest, tokens: int, documents: int, parts: dict[str, np.ndarray]) -> Shard:
    """A shard whose parts of the index come behind all others."""
    sizes = manifest.sizes()
    return Shard(
        tokens=tokens,
        documents=documents,
        order_at=sizes[ORDER] // 4,
        first_row=sizes[FIRST] // manifest.row_bytes,
        sha256={name: hashlib.sha256(part.data).hexdigest() for name, part in parts.items()},
    )


def _checked(path: Path, manifest: Manifest, name: str, first: int) -> bytes:
    """The parts of the shards from ``first`` on, whose checksums are right."""
    found = []
    with open(path / manifest.file(name), "rb") as file:
        for number, part in enumerate(manifest.parts(name)[first:], first):
            stored = b"".join(blocks(file, *part))
            check_sum(path, manifest, name, number, hashlib.sha256(stored).hexdigest())
            found.append(stored)
    return b"".join(found)


def _write(path: Path, manifest: Manifest, parts: dict[str, np.ndarray]) -> None:
    """Append to files, durably."""
    for name, part in parts.items():
        with open(path / manifest.file(name), "ab") as file:
            file.write(part.data)
            file.flush()
            os.fsync(file.fileno())


def known_documents(path: Path, manifest: Manifest) -> np.ndarray:
    """uint64 [documents] digests of what is stored; of version 1 none is known.

    DatastoreError if a file of the datastore is shorter than it should be.
    """
    if manifest.shards:
        check_sizes(path, manifest)
    size = manifest.sizes().get(DOCUMENTS, 0)
    if not size:
        return np.empty(0, np.uint64)
    return np.fromfile(path / DOCUMENTS, np.uint64, size // DIGEST)
