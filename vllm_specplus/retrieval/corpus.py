"""What a datastore is built from: files, folders, JSON lines and parquet, as text.

A corpus is read in *pieces* in a fixed order. Long texts come in several of them, cut at line
ends, which bounds memory whatever the file. Each knows the digest of its whole document, by which
text that is stored already is recognised.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

#: Characters of text per piece, about.
PIECE = 1 << 20

READERS = {".jsonl": "json lines", ".ndjson": "json lines", ".parquet": "parquet"}


class CorpusError(ValueError):
    """The corpus cannot be read; the message is one sentence for the user."""


@dataclass(frozen=True, slots=True)
class Piece:
    text: str
    ends_document: bool
    size: int
    """Bytes of input it accounts for, for progress."""
    digest: int
    """64 bits of the SHA-256 of its document: of a text file's bytes, of other text as UTF-8."""
    number: int
    """Of the document's pieces."""


@dataclass(frozen=True)
class Corpus:
    """Files in the order they are read."""

    files: tuple[Path, ...]
    text_key: str
    """Field of JSON lines and column of parquet that holds the text."""

    @classmethod
    def find(cls, inputs: Sequence[Path], pattern: str, text_key: str) -> Corpus:
        """Files given by name, and files of folders that match the glob ``pattern``."""
        files: list[Path] = []
        for path in inputs:
            if path.is_dir():
                found = sorted(p for p in path.glob(pattern) if p.is_file())
                if not found:
                    raise CorpusError(f"no file in {str(path)!r} matches {pattern!r}")
                files += found
            elif path.is_file():
                files.append(path)
            else:
                raise CorpusError(f"{str(path)!r} is neither a file nor a folder")
        return cls(tuple(dict.fromkeys(files)), text_key)

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(path.stat().st_size for path in self.files)

    @property
    def description(self) -> str:
        first = str(self.files[0])
        return first if len(self.files) == 1 else f"{first} and {len(self.files) - 1} more files"

    def inputs(self) -> str:
        """Names the files and how they are read, whatever they hold."""
        digest = hashlib.sha256(f"{self.text_key}\0".encode())
        for path in self.files:
            digest.update(os.fsencode(path.resolve()) + b"\0")
        return digest.hexdigest()[:32]

    def pieces(self) -> Iterator[Piece]:
        """All text, always in the same order and the same pieces."""
        for path in self.files:
            match READERS.get(path.suffix):
                case "json lines":
                    yield from self._json_lines(path)
                case "parquet":
                    yield from self._parquet(path)
                case _:
                    yield from _text(path)

    def _json_lines(self, path: Path) -> Iterator[Piece]:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise CorpusError(f"{path}, line {number}: not valid JSON ({error})") from None
                yield from _split(self._text_of(row, f"{path}, line {number}"), len(line))

    def _parquet(self, path: Path) -> Iterator[Piece]:
        try:
            from datasets import load_dataset
        except ImportError:
            raise CorpusError(
                f"reading {path} needs the datasets library: pip install 'vllm-specplus[datastore]'"
            ) from None
        rows = load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        for number, row in enumerate(rows, start=1):
            text = self._text_of(row, f"{path}, row {number}")
            yield from _split(text, len(text))

    def _text_of(self, row, where: str) -> str:
        text = row.get(self.text_key) if isinstance(row, dict) else None
        if not isinstance(text, str):
            keys = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise CorpusError(
                f"{where}: no text under {self.text_key!r} (found: {keys}); name the right one "
                f"with --text-key"
            )
        return text


def _text(path: Path) -> Iterator[Piece]:
    """A text file is one document. Bytes that are not UTF-8 become replacement marks."""
    with open(path, "rb") as file:
        digest = _shortened(hashlib.file_digest(file, "sha256").digest())
    with open(path, encoding="utf-8", errors="replace") as file:
        number, text = 0, file.read(PIECE) + file.readline()
        while text:
            ahead = file.read(PIECE)
            if ahead:
                ahead += file.readline()
            yield Piece(text, not ahead, len(text), digest, number)
            number, text = number + 1, ahead


def _split(text: str, size: int) -> Iterator[Piece]:
    """One document as pieces; the last one accounts for its ``size``."""
    # JSON knows half surrogates, which have no UTF-8.
    digest = _shortened(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
    begin = number = 0
    while len(text) - begin > 2 * PIECE:
        end = text.find("\n", begin + PIECE) + 1 or begin + PIECE
        yield Piece(text[begin:end], False, 0, digest, number)
        begin, number = end, number + 1
    yield Piece(text[begin:], True, size, digest, number)


def _shortened(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "little")
