"""Texts that a draft learns from, and the file a run keeps them in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from vllm_specplus.training.errors import TrainingError

WRITERS = ("target", "draft", "traffic", "given")
#: Of a token about which nobody has said anything.
UNKNOWN = -1


@dataclass(frozen=True)
class Text:
    """A prompt and what was written behind it."""

    id: str
    """Stable: the question's id, or a hash of the prompt."""
    tokens: tuple[int, ...]
    start: int
    """Index of the first token that a model wrote; the prompt is before it."""
    writer: str
    """One of :data:`WRITERS`; "given" means that nobody knows."""
    labels: tuple[int, ...] = ()
    """What somebody said of each token: 1 right, 0 wrong, -1 nothing. Empty: of none."""

    def cut(self, length: int) -> Text:
        """The first ``length`` tokens."""
        if len(self.tokens) <= length:
            return self
        return Text(
            self.id, self.tokens[:length], min(self.start, length), self.writer,
            self.labels[:length],
        )  # fmt: skip


def prompt_id(tokens: Sequence[int]) -> str:
    """An id for a prompt that has none: 16 hexadecimal digits of its tokens."""
    return hashlib.sha256(",".join(map(str, tokens)).encode()).hexdigest()[:16]


def to_line(text: Text) -> str:
    """The text as a line of JSON, without its end."""
    row = asdict(text)
    if not text.labels:
        del row["labels"]
    return json.dumps(row)


def from_row(row: dict) -> Text:
    """The text of a row that :func:`to_line` wrote; KeyError, TypeError or ValueError else."""
    tokens = tuple(row["tokens"])
    return Text(row["id"], tokens, row["start"], row["writer"], tuple(row.get("labels", ())))


def load_texts(path: Path) -> list[Text]:
    """The texts of a file that a run has kept; TrainingError if it was changed since."""
    texts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            texts.append(from_row(json.loads(line)))
        except (KeyError, TypeError, ValueError):
            raise TrainingError(
                f"{path}, line {number} is no text of a run: remove the file to have it written "
                f"again"
            ) from None
    return texts
