"""A datastore on disk: tokenised documents and the order that makes them searchable.

A folder, whose files only grow, except the manifest, which is replaced whole::

    manifest.json   what is stored, for which tokenizer, checksums; says what counts
    tokens.bin      uint16 or uint32 [N] token ids; every document ends in a separator
    documents.bin   uint64 [documents] digest of each document's text, in the order they end
    order.bin       uint32 [.] positions, a part for each shard, see below
    first.bin       uint32 [., V + 1] where each token's positions begin in a shard's part

The text is cut into *shards*, each sorted on its own, so that a build needs bounded
memory and more text is appended without touching what is there. ``order`` sorts the
positions of a shard by the text read *backwards* from them (position itself, the token
before it, and so on): a suffix array of the reversed text. REST (arXiv 2311.08252) sorts
forwards and tries the context's last 16, 15, ... 2 tokens one after the other; backwards, the
longest match is found by one binary search, since it is a prefix of the reversed context.

A look-up asks every shard, so shards are merged as they come (``writer.py``): their text lies
side by side already, a merged shard gets a new part of ``order`` and a row of ``first`` behind the
others, and parts that no shard has any more go when they are as much as the others: by copies
under the next *generation*'s names (``order.1.bin``), since somebody may be reading the old ones.

Readers map the files and never write: any number of processes share one copy in memory.
Bytes behind what the manifest names belong to an unfinished append and are ignored.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, TypeVar

import numpy as np
from pydantic import Field, ValidationError

from vllm_specplus.files import is_file
from vllm_specplus.strict import StrictModel, quoted

FORMAT = "vllm-specplus datastore"
#: 2 has digests of documents, and shards whose parts lie anywhere in their files.
VERSION = 2
MANIFEST = "manifest.json"
TOKENS, DOCUMENTS, ORDER, FIRST = "tokens.bin", "documents.bin", "order.bin", "first.bin"
#: What the shards' orders are made of: can be made anew from the others, and is when they merge.
INDEX = (ORDER, FIRST)
#: Bytes of a document's digest. Of ten million documents two differ and are taken for one with a
#: probability of 3e-6.
DIGEST = 8
#: Bytes read at a time.
BLOCK = 1 << 24

Count = Annotated[int, Field(ge=0, lt=1 << 48)]
T = TypeVar("T")


class DatastoreError(ValueError):
    """The datastore cannot be used; the message is one sentence for the user."""


class Shard(StrictModel):
    tokens: Annotated[int, Field(ge=1, lt=1 << 31)]
    """Tokens in the shard, separators included."""
    documents: Count
    """Documents that end in the shard."""
    order_at: Count
    """Where its part of ``order`` begins."""
    first_row: Count
    """Its row of ``first``."""
    sha256: dict[str, str]
    """File name (of generation 0) -> checksum of the shard's part of it."""


class Partial(StrictModel):
    """A long document of which only the beginning is stored yet."""

    digest: Annotated[int, Field(ge=0, lt=1 << 64)]
    pieces: Annotated[int, Field(ge=1)]
    """Pieces of its text (``corpus.Piece``) that are stored."""


class CorpusLog(StrictModel):
    """One run of ``build`` or ``add``."""

    inputs: str
    """Names the inputs (``Corpus.inputs``): what was interrupted is gone on with by the same."""
    description: str
    complete: bool


class Manifest(StrictModel):
    format: str = FORMAT
    version: int = VERSION
    id: str = ""
    """Tells datastores apart, whatever is added to them."""
    tokenizer: str
    """Fingerprint of the tokenizer, see :func:`tokenizer_fingerprint`."""
    tokenizer_name: str
    vocab_size: Annotated[int, Field(ge=2, lt=1 << 31)]
    generation: Count = 0
    """Of the files :data:`INDEX`."""
    shards: list[Shard] = Field(default_factory=list)
    partial: Partial | None = None
    corpora: list[CorpusLog] = Field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def num_documents(self) -> int:
        return sum(shard.documents for shard in self.shards)

    @property
    def dtype(self) -> np.dtype:
        """Of the tokens: the smallest with room for a separator beyond the vocabulary."""
        return np.dtype("<u2" if self.vocab_size <= 0xFFFF else "<u4")

    @property
    def separator(self) -> int:
        """Ends every document; no token of any vocabulary, never drafted."""
        return int(np.iinfo(self.dtype).max)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row of ``first``."""
        return 4 * (self.vocab_size + 1)

    def file(self, name: str) -> str:
        """What the file ``name`` is called in this generation."""
        if self.generation and name in INDEX:
            return f"{name.removesuffix('.bin')}.{self.generation}.bin"
        return name

    def names(self) -> tuple[str, ...]:
        """Names (of generation 0) of the files there are; version 1 had no digests."""
        return (TOKENS, *((DOCUMENTS,) if self.version > 1 else ()), *INDEX)

    def parts(self, name: str) -> list[tuple[int, int]]:
        """Where each shard's part of the file ``name`` begins, and its size, in bytes."""
        if name == ORDER:
            return [(4 * shard.order_at, 4 * shard.tokens) for shard in self.shards]
        if name == FIRST:
            return [(self.row_bytes * shard.first_row, self.row_bytes) for shard in self.shards]
        # One behind the other.
        found, begin = [], 0
        for shard in self.shards:
            size = DIGEST * shard.documents
            if name == TOKENS:
                size = self.dtype.itemsize * shard.tokens
            found.append((begin, size))
            begin += size
        return found

    def sizes(self) -> dict[str, int]:
        """Name -> bytes up to the end of the datastore's last part of the file."""
        ends = {name: [sum(part) for part in self.parts(name)] for name in self.names()}
        return {name: max(each, default=0) for name, each in ends.items()}

    def read_bytes(self) -> int:
        """Bytes of all parts of all files: what :func:`verify` reads."""
        return sum(size for name in self.names() for _, size in self.parts(name))


@dataclass(frozen=True)
class Datastore:
    """A mapped datastore, ready to be searched (``retrieval/search.py``)."""

    path: Path
    manifest: Manifest
    files: dict[str, BinaryIO]
    """The open files behind the arrays; replacing a datastore by renaming leaves them be."""
    tokens: np.ndarray
    """uint16 or uint32 [N]."""
    order: np.ndarray
    """uint32 [.], positions within their shard."""
    first: np.ndarray
    """uint32 [., V + 1]."""
    shards: np.ndarray
    """int64 [shards, 4] first token of each, first behind it, where its part of ``order`` begins,
    and its row of ``first``."""

    @classmethod
    def open(cls, path: str | Path) -> Datastore:
        """Map the datastore in folder ``path``; DatastoreError says what is wrong with it.

        Checks names, versions and sizes; :func:`verify` reads every byte.
        """
        return _steadily(Path(path), functools.partial(cls._mapped, Path(path)))

    @classmethod
    def _mapped(cls, path: Path, manifest: Manifest) -> Datastore:
        if not manifest.shards:
            raise DatastoreError(
                f"datastore {quoted(path)} is empty: its build has not got far yet"
            )
        check_sizes(path, manifest)
        ends = np.cumsum([s.tokens for s in manifest.shards])
        shards = np.array(
            [
                (end - s.tokens, end, s.order_at, s.first_row)
                for s, end in zip(manifest.shards, ends.tolist(), strict=True)
            ],
            np.int64,
        )
        files: dict[str, BinaryIO] = {}
        sizes = manifest.sizes()
        places, rows = sizes[ORDER] // 4, sizes[FIRST] // manifest.row_bytes
        try:
            for name in (TOKENS, *INDEX):
                files[name] = open(path / manifest.file(name), "rb")  # noqa: SIM115  open as long as mapped
            return cls(
                path,
                manifest,
                files,
                _map(files[TOKENS], manifest.dtype, (manifest.num_tokens,)),
                _map(files[ORDER], np.dtype("<u4"), (places,)),
                _map(files[FIRST], np.dtype("<u4"), (rows, manifest.vocab_size + 1)),
                shards,
            )
        except (OSError, ValueError) as error:
            raise DatastoreError(f"datastore {quoted(path)} cannot be mapped: {error}") from error


def _map(file: BinaryIO, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    # As a plain array: indexing np.memmap itself costs microseconds.
    return np.asarray(np.memmap(file, dtype, "r", shape=shape))


def _steadily(path: Path, read: Callable[[Manifest], T]) -> T:
    """What ``read`` makes of the datastore's manifest, or, if it fails because a writer has moved
    on to another generation meanwhile, of the newer one."""
    manifest = read_manifest(path)
    while True:
        try:
            return read(manifest)
        except DatastoreError:
            newer = read_manifest(path)
            if newer.generation == manifest.generation:
                raise
            manifest = newer


def read_manifest(path: Path) -> Manifest:
    """The manifest of the datastore in folder ``path``; DatastoreError for anything else."""
    # Opening what is no file, such as a pipe, may wait for ever.
    if not is_file(path / MANIFEST):
        raise DatastoreError(
            f"{quoted(path)} is not a datastore (no file {MANIFEST}): make one with "
            f"`vllm-specplus datastore build`"
        )
    try:
        text = (path / MANIFEST).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or f"it is damaged: {str(error)[:80]}"
        raise DatastoreError(f"datastore {quoted(path)} is not readable: {reason}") from error
    try:
        head = _Head.model_validate_json(text)
        if head.format != FORMAT:
            raise DatastoreError(f"{quoted(path)} is not a datastore of vllm-specplus")
        if not 1 <= head.version <= VERSION:
            raise DatastoreError(
                f"datastore {quoted(path)} has format version {head.version}, this vllm-specplus "
                f"reads 1 to {VERSION}: "
                + ("update vllm-specplus" if head.version > VERSION else "build it again")
            )
        if head.version == 1:
            return Manifest.model_validate(_with_places(json.loads(text)))
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise DatastoreError(
            f"datastore {quoted(path)} has a damaged {MANIFEST} ({where or 'not JSON'}): "
            f"build it again"
        ) from None


def _with_places(content: dict[str, Any]) -> dict[str, Any]:
    """A manifest of version 1 with what version 2 adds, as far as it is what it should be: its
    shards' parts follow each other, and its logs named files by their times of change."""
    shards, logs, place = content.get("shards"), content.get("corpora"), 0
    if not isinstance(shards, list) or not isinstance(logs, list):
        return content
    placed = []
    for row, shard in enumerate(shards):
        size = shard.get("tokens") if isinstance(shard, dict) else None
        if not isinstance(size, int):
            return content
        placed.append(shard | {"order_at": place, "first_row": row})
        place += size
    kept = ("description", "complete")
    named = [
        {"inputs": ""} | {key: log[key] for key in kept if key in log}
        for log in logs
        if isinstance(log, dict)
    ]
    return content | {"shards": placed, "corpora": named}


class _Head(StrictModel, extra="ignore"):
    format: str
    version: int


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Replace the manifest, durably: a crash leaves the old one or the new one."""
    part = path / f"{MANIFEST}.part"
    with open(part, "w", encoding="utf-8") as file:
        file.write(manifest.model_dump_json(indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    part.replace(path / MANIFEST)


def check_sizes(path: Path, manifest: Manifest) -> None:
    """DatastoreError if a file is shorter than the manifest says."""
    for name, size in manifest.sizes().items():
        file = manifest.file(name)
        try:
            found = os.stat(path / file).st_size
        except OSError as error:
            raise DatastoreError(f"datastore {quoted(path)}: {file}: {error.strerror}") from None
        if found < size:
            raise too_short(path, file, found, size)


def too_short(path: Path, file: str, found: int, size: int) -> DatastoreError:
    """What to raise for a file of ``found`` bytes that should have ``size``."""
    return DatastoreError(
        f"datastore {quoted(path)} is damaged: {file} has {found} bytes instead of {size}; "
        f"build it again"
    )


def verify(path: str | Path, progress: Callable[[int], None] = lambda n: None) -> Manifest:
    """Read every byte and compare the checksums; DatastoreError names what differs.

    ``progress`` is called with the number of bytes read since the last call.
    """
    return _steadily(Path(path), lambda manifest: _verify(Path(path), manifest, progress))


def _verify(path: Path, manifest: Manifest, progress: Callable[[int], None]) -> Manifest:
    check_sizes(path, manifest)
    for name in manifest.names():
        with open(path / manifest.file(name), "rb") as file:
            for number, part in enumerate(manifest.parts(name)):
                digest = hashlib.sha256()
                for block in blocks(file, *part):
                    digest.update(block)
                    progress(len(block))
                check_sum(path, manifest, name, number, digest.hexdigest())
    return manifest


def blocks(file: BinaryIO, begin: int, size: int) -> Iterator[bytes]:
    """``size`` bytes of ``file`` from ``begin`` on, :data:`BLOCK` at a time; DatastoreError if
    it ends before."""
    file.seek(begin)
    while size:
        block = file.read(min(size, BLOCK))
        if not block:
            raise DatastoreError(f"datastore: {quoted(file.name)} ends too early")
        yield block
        size -= len(block)


def check_sum(path: Path, manifest: Manifest, name: str, number: int, found: str) -> None:
    """DatastoreError unless ``found`` is the checksum of shard ``number``'s part of a file."""
    if found != manifest.shards[number].sha256.get(name):
        raise DatastoreError(
            f"datastore {quoted(path)} is damaged: checksum of {name}, shard {number}, "
            f"differs; build it again"
        )


#: Tells tokenizers of equal vocabulary apart: spaces, digits, scripts, code, emoji.
_PROBE = (
    "def f(x):\n\treturn x**2  # Größe 3.14159\n\n  Il était une fois… 東京は夜 1234567 "
    "it's THE e\u0301nd 👩‍🚀 <|im_start|></s>\r\n"
)


def tokenizer_fingerprint(tokenizer) -> str:
    """Names a Hugging Face tokenizer by what it does: its vocabulary, and the ids of a
    text that mixes scripts, spaces and digits. The same wherever it was loaded from."""
    digest = hashlib.sha256()
    for text, token in sorted(tokenizer.get_vocab().items()):
        digest.update(f"{token}\0{text}\0".encode("utf-8", "surrogatepass"))
    ids = tokenizer.encode(_PROBE, add_special_tokens=False)
    digest.update(" ".join(map(str, ids)).encode())
    return digest.hexdigest()[:32]


def check_target(manifest: Manifest, path: str, tokenizer, vocab_size: int) -> None:
    """DatastoreError unless the datastore was built for this target.

    ``tokenizer``: the target's (Hugging Face), None where the engine has none; then the
    size of the vocabulary must do.
    """
    if manifest.vocab_size > vocab_size:
        raise DatastoreError(
            f"datastore {path!r} holds ids of a vocabulary of {manifest.vocab_size}, the model's "
            f"has {vocab_size}: build it with the model's tokenizer"
        )
    if tokenizer is not None and tokenizer_fingerprint(tokenizer) != manifest.tokenizer:
        raise DatastoreError(
            f"datastore {path!r} was built with another tokenizer ({manifest.tokenizer_name}): "
            f"build it with the model's, `vllm-specplus datastore build --tokenizer MODEL ...`"
        )
