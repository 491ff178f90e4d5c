"""Noticing what happens to a datastore's files while they are served.

They are mapped, and another process may cut, overwrite or replace them. A file that shrank would
end the process at the next look-up, one that was overwritten would draft nonsense for ever, and one
that was replaced by renaming would never be served. An append changes none of the bytes that are
mapped, and none of the manifest's identity.
"""

from __future__ import annotations

import hashlib
import os
import time
from typing import BinaryIO

from vllm_specplus.retrieval.datastore import (
    MANIFEST,
    Datastore,
    DatastoreError,
    read_manifest,
    too_short,
)
from vllm_specplus.strict import quoted

#: Blocks of a file, evenly over it, that are compared once it has changed, and their bytes.
SAMPLES, SAMPLE = 256, 4096
#: Seconds after which the manifest is looked at again.
INTERVAL_S = 1.0


class Watch:
    """Watches one open datastore; microseconds per step."""

    def __init__(self, store: Datastore):
        self._store = store
        sizes = store.manifest.sizes()
        # Name, file, bytes that are mapped.
        self._files = [(name, file, sizes[name]) for name, file in store.files.items()]
        self._changed = [_changed(file) for _, file, _ in self._files]
        self._samples = [_sample(file, size) for _, file, size in self._files]
        self._broken: DatastoreError | None = None
        self._looked_at = time.monotonic()
        self._manifest = self._stamp()

    def check(self) -> DatastoreError | None:
        """Raise DatastoreError if what is mapped may not be read (any more); return one, once, if
        something else is at its place now, while what was opened is still good."""
        if self._broken is not None:
            raise self._broken
        for number, (name, file, size) in enumerate(self._files):
            found = os.fstat(file.fileno())
            if found.st_size < size:
                file_name = self._store.manifest.file(name)
                raise too_short(self._store.path, file_name, found.st_size, size)
            if found.st_ctime_ns != self._changed[number]:
                self._look_closer(number, found.st_ctime_ns)
        now = time.monotonic()
        if now - self._looked_at < INTERVAL_S:
            return None
        self._looked_at = now
        return self._replaced()

    def _look_closer(self, number: int, changed: int) -> None:
        name, file, size = self._files[number]
        if _sample(file, size) != self._samples[number]:
            self._broken = DatastoreError(
                f"datastore {quoted(self._store.path)}: "
                f"{self._store.manifest.file(name)} was overwritten while it is served: nothing "
                f"is drafted from it any more; start the engine again"
            )
            raise self._broken
        self._changed[number] = changed

    def _stamp(self) -> tuple[int, int] | None:
        try:
            found = os.stat(self._store.path / MANIFEST)
        except OSError:
            return None
        return found.st_ino, found.st_ctime_ns

    def _replaced(self) -> DatastoreError | None:
        stamp = self._stamp()
        if stamp == self._manifest:
            return None
        self._manifest = stamp
        ours = self._store.manifest
        try:
            theirs = read_manifest(self._store.path)
        except DatastoreError:
            there = "was removed or damaged"
        else:
            # A datastore of version 1 has no identity; it gets one when it is added to.
            if not ours.id or theirs.id == ours.id:
                return None
            there = "was replaced"
        return DatastoreError(
            f"datastore {quoted(self._store.path)} {there} while it is served: what was opened is "
            f"drafted from until the engine starts again"
        )


def _changed(file: BinaryIO) -> int:
    return os.fstat(file.fileno()).st_ctime_ns


def _sample(file: BinaryIO, size: int) -> bytes:
    """Digest of blocks of a file's first ``size`` bytes. Read, not mapped: that is safe whatever
    happens to the file."""
    digest = hashlib.blake2b()
    last = max(size - SAMPLE, 0)
    for number in range(SAMPLES):
        begin = number * last // (SAMPLES - 1)
        digest.update(os.pread(file.fileno(), min(SAMPLE, size), begin))
        if size <= SAMPLE:
            break
    return digest.digest()
