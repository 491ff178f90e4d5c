"""Pictures that wait to be fetched by a link."""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

#: What OpenAI's links live, and how much is kept for them.
SECONDS, MOST_BYTES = 3600.0, 256 << 20


class Kept(NamedTuple):
    content: bytes
    kind: str
    until: float


class PictureLinks:
    """In this process's memory, at most ``most_bytes``: the oldest go first. A name cannot be
    guessed, and whoever has it may fetch the picture."""

    def __init__(
        self, most_bytes: int = MOST_BYTES, seconds: float = SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ):  # fmt: skip
        self._most, self._seconds, self._clock = most_bytes, seconds, clock
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, pictures: list[bytes], kind: str) -> list[str]:
        """Names of ``pictures``, of format ``kind``; ValueError with one sentence if they are too
        large to be kept all at once."""
        size = sum(map(len, pictures))
        if size > self._most:
            raise ValueError(
                f"the pictures have {size} bytes, and {self._most} are kept for links: ask for "
                f"fewer, or for 'response_format' 'b64_json'"
            )
        self._drop(size)
        until, names = self._clock() + self._seconds, []
        for content in pictures:
            names.append(f"{secrets.token_urlsafe(24)}.{kind}")
            self._kept[names[-1]] = Kept(content, kind, until)
        self._bytes += size
        return names

    def get(self, name: str) -> Kept | None:
        """None: there never was one of this name, or it is gone."""
        self._drop(0)
        return self._kept.get(name)

    def _drop(self, wanted: int) -> None:
        """What is too old, and what has to give way to ``wanted`` bytes."""
        now = self._clock()
        while self._kept:
            oldest = next(iter(self._kept.values()))
            if oldest.until > now and self._bytes + wanted <= self._most:
                return
            self._kept.popitem(last=False)
            self._bytes -= len(oldest.content)
