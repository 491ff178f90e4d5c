"""Questions that nothing learns from, so that figures measured on them mean something.

``held_out.json`` lists them: by the ids of their data set, and by hashes of runs of words of their
first turn, so that a copy with other ids, or a question inside a chat template or a longer text, is
found too. No question's text is in the list. ``scripts/held_out.py`` writes it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from vllm_specplus.training.errors import TrainingError
from vllm_specplus.training.texts import Text, prompt_id

LIST = Path(__file__).with_name("held_out.json")
#: Words of a run: as many as the shortest question listed has.
RUN = 8


def words(text: str) -> list[str]:
    """The words of a text without case, punctuation and compatibility forms."""
    return re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())


def hashed(run: Sequence[str]) -> str:
    """16 hexadecimal digits of some words in their order."""
    return hashlib.sha256(" ".join(run).encode()).hexdigest()[:16]


def runs_of(text: str) -> set[str]:
    """Hashes of all runs of :data:`RUN` words in a text."""
    found = words(text)
    return {hashed(found[i : i + RUN]) for i in range(len(found) - RUN + 1)}


def fingerprint(text: str) -> list[str]:
    """Hashes of two runs of a question, in its middle and at its end; of a shorter one, which only
    the same question as a whole is taken for, of all its words."""
    found = words(text)
    if len(found) < RUN:
        return [hashed(found)]
    middle = (len(found) - RUN) // 2
    return sorted({hashed(found[middle : middle + RUN]), hashed(found[-RUN:])})


@dataclass(frozen=True)
class HeldOut:
    """Questions that nothing learns from."""

    ids: frozenset[str]
    """Their ids, where a row has them as Spec-Bench does (``question_id`` beside ``turns``)."""
    hashes: frozenset[str]
    prompts: frozenset[str] = frozenset()
    """Hashes of their tokens (:func:`texts.prompt_id`), where a run knows those."""

    def holds(self, text: str) -> bool:
        """Is one of them the text, or in it?"""
        return hashed(words(text)) in self.hashes or not self.hashes.isdisjoint(runs_of(text))

    def and_also(self, questions: Iterable[str], prompts: Iterable[str] = ()) -> HeldOut:
        """These and others, by their texts, and their tokens' hashes."""
        more = {each for question in questions for each in fingerprint(question)}
        return HeldOut(self.ids, self.hashes | more, self.prompts | set(prompts))


@functools.cache
def committed() -> HeldOut:
    """The list that comes with the package."""
    rows = json.loads(LIST.read_text(encoding="utf-8"))["questions"]
    hashes = {each for row in rows for each in row["runs"]}
    return HeldOut(frozenset(row["id"] for row in rows), frozenset(hashes))


class Gate:
    """What every text passes before anything is learnt from it."""

    def __init__(
        self, held_out: HeldOut, decode: Callable[[Sequence[int]], str] | None, console: Console
    ):
        """``decode``: tokens -> text; without a tokenizer only prompts of known tokens are
        recognised. ``console`` is told what does not pass."""
        self._held_out, self._decode, self._console = held_out, decode, console
        self._passed: set[Text] = set()

    def admit(self, texts: Sequence[Text]) -> list[Text]:
        """The texts that hold no question of the list; TrainingError if there are none."""
        kept = [text for text in texts if text in self._passed or not self._holds(text)]
        self._passed.update(kept)
        if left_out := len(texts) - len(kept):
            self._console.print(
                f"{left_out} of {len(texts)} texts hold questions that are held out, and are left "
                f"out"
            )
        if not kept:
            raise TrainingError(
                "all texts hold questions that are held out (training/held_out.json), nothing is "
                "left to learn from: bring others with --data"
            )
        return kept

    def _holds(self, text: Text) -> bool:
        if prompt_id(text.tokens[: text.start]) in self._held_out.prompts:
            return True
        return self._decode is not None and self._held_out.holds(self._decode(text.tokens))
