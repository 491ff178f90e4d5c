"""A datastore on disk: tokenised documents and the order that makes them searchable.

A folder with four files, all append-only except the manifest, which is replaced whole::

    manifest.json   what is stored, for which tokenizer, checksums; says what counts
    tokens.bin      uint16 or uint32 [N] token ids; every document ends in a separator
    order.bin       uint32 [N] positions, shard by shard, see below
    first.bin       uint32 [shards, V + 1] where each token's positions begin in ``order``

The text is cut into *shards*, each sorted on its own, so that a build needs bounded
memory and more text is appended without touching what is there. ``order`` sorts the
positions of a shard by the text read *backwards* from them (position itself, the token
before it, and so on): a suffix array of the reversed text. REST (arXiv 2311.08252) sorts
forwards and tries the context's last 16, 15, ... 2 tokens one after the other; backwards, the
longest match is found by one binary search, since it is a prefix of the reversed context.

Readers map the files and never write: any number of processes share one copy in memory.
Bytes behind what the manifest names belong to an unfinished append and are ignored.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, BinaryIO

import numpy as np
from pydantic import Field, ValidationError

from vllm_specplus.strict import StrictModel, quoted

FORMAT = "vllm-specplus datastore"
VERSION = 1
MANIFEST = "manifest.json"
TOKENS, ORDER, FIRST = "tokens.bin", "order.bin", "first.bin"

Count = Annotated[int, Field(ge=0)]


class DatastoreError(ValueError):
    """The datastore cannot be used; the message is one sentence for the user."""


class Shard(StrictModel):
    tokens: Annotated[int, Field(ge=1, lt=1 << 31)]
    """Tokens in the shard, separators included."""
    documents: Count
    """Documents that end in the shard."""
    sha256: dict[str, str]
    """File name -> checksum of the shard's part of it."""


class CorpusLog(StrictModel):
    """One run of ``build`` or ``add``: enough to resume it where it stopped."""

    fingerprint: str
    """Of the inputs: names, sizes and times of change of the files, and how they are read."""
    description: str
    pieces: Count
    """Pieces of text already stored."""
    complete: bool


class Manifest(StrictModel):
    format: str = FORMAT
    version: int = VERSION
    tokenizer: str
    """Fingerprint of the tokenizer, see :func:`tokenizer_fingerprint`."""
    tokenizer_name: str
    vocab_size: Annotated[int, Field(ge=2, lt=1 << 31)]
    shards: list[Shard] = Field(default_factory=list)
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

    def sizes(self) -> dict[str, int]:
        """File name -> bytes that belong to the datastore."""
        return {name: self.bytes_before(name, len(self.shards)) for name in (TOKENS, ORDER, FIRST)}

    def bytes_before(self, name: str, shard: int) -> int:
        """Where ``shard`` begins in file ``name``."""
        if name == FIRST:
            return 4 * (self.vocab_size + 1) * shard
        width = self.dtype.itemsize if name == TOKENS else 4
        return width * sum(s.tokens for s in self.shards[:shard])


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
    """uint32 [N], positions within their shard."""
    first: np.ndarray
    """uint32 [shards, V + 1]."""
    starts: np.ndarray
    """int64 [shards + 1] first token of each shard."""

    @classmethod
    def open(cls, path: str | Path) -> Datastore:
        """Map the datastore in folder ``path``; DatastoreError says what is wrong with it.

        Checks names, versions and sizes; :func:`verify` reads every byte.
        """
        path = Path(path)
        manifest = read_manifest(path)
        if not manifest.shards:
            raise DatastoreError(
                f"datastore {quoted(path)} is empty: its build has not got far yet"
            )
        check_sizes(path, manifest)
        vocab, shards, count = manifest.vocab_size, len(manifest.shards), manifest.num_tokens
        starts = np.zeros(shards + 1, np.int64)
        np.cumsum([s.tokens for s in manifest.shards], out=starts[1:])
        files: dict[str, BinaryIO] = {}
        try:
            for name in (TOKENS, ORDER, FIRST):
                files[name] = open(path / name, "rb")  # noqa: SIM115  open as long as mapped
            return cls(
                path,
                manifest,
                files,
                _map(files[TOKENS], manifest.dtype, (count,)),
                _map(files[ORDER], np.dtype("<u4"), (count,)),
                _map(files[FIRST], np.dtype("<u4"), (shards, vocab + 1)),
                starts,
            )
        except (OSError, ValueError) as error:
            raise DatastoreError(f"datastore {quoted(path)} cannot be mapped: {error}") from error

    def check_intact(self) -> None:
        """Raise DatastoreError if a file has shrunk: reading a mapping beyond the end of
        its file would kill the process. Microseconds; once per step."""
        for (name, size), file in zip(self._sizes, self.files.values(), strict=True):
            found = os.fstat(file.fileno()).st_size
            if found < size:
                raise _too_short(self.path, name, found, size)

    @functools.cached_property
    def _sizes(self) -> list[tuple[str, int]]:
        return list(self.manifest.sizes().items())


def _map(file: BinaryIO, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    # As a plain array: indexing np.memmap itself costs microseconds.
    return np.asarray(np.memmap(file, dtype, "r", shape=shape))


def read_manifest(path: Path) -> Manifest:
    """The manifest of the datastore in folder ``path``; DatastoreError for anything else."""
    try:
        text = (path / MANIFEST).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DatastoreError(
            f"{quoted(path)} is not a datastore (no {MANIFEST}): make one with "
            f"`vllm-specplus datastore build`"
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)[:80]
        raise DatastoreError(f"datastore {quoted(path)} is not readable: {reason}") from error
    try:
        head = _Head.model_validate_json(text)
        if head.format != FORMAT:
            raise DatastoreError(f"{quoted(path)} is not a datastore of vllm-specplus")
        if head.version > VERSION:
            raise DatastoreError(
                f"datastore {quoted(path)} has format version {head.version}, this vllm-specplus "
                f"reads up to {VERSION}: update vllm-specplus"
            )
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise DatastoreError(
            f"datastore {quoted(path)} has a damaged {MANIFEST} ({where or 'not JSON'}): "
            f"build it again"
        ) from None


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
        try:
            found = os.stat(path / name).st_size
        except OSError as error:
            raise DatastoreError(f"datastore {quoted(path)}: {name}: {error.strerror}") from None
        if found < size:
            raise _too_short(path, name, found, size)


def _too_short(path: Path, name: str, found: int, size: int) -> DatastoreError:
    return DatastoreError(
        f"datastore {quoted(path)} is damaged: {name} has {found} bytes instead of {size}; "
        f"build it again"
    )


def verify(path: str | Path, progress: Callable[[int], None] = lambda n: None) -> Manifest:
    """Read every byte and compare the checksums; DatastoreError names what differs.

    ``progress`` is called with the number of bytes read since the last call.
    """
    path = Path(path)
    manifest = read_manifest(path)
    check_sizes(path, manifest)
    for name in manifest.sizes():
        with open(path / name, "rb") as file:
            for i, shard in enumerate(manifest.shards):
                left = manifest.bytes_before(name, i + 1) - manifest.bytes_before(name, i)
                digest = hashlib.sha256()
                while left:
                    block = file.read(min(left, 1 << 24))
                    if not block:
                        raise DatastoreError(f"datastore {quoted(path)}: {name} ends too early")
                    digest.update(block)
                    progress(len(block))
                    left -= len(block)
                if digest.hexdigest() != shard.sha256.get(name):
                    raise DatastoreError(
                        f"datastore {quoted(path)} is damaged: checksum of {name}, shard {i}, "
                        f"differs; build it again"
                    )
    return manifest


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
