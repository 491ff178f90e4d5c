"""A draft model of another tokenizer than the target's: it drafts the tokens that both have.

A token is the bytes it stands for, however its tokenizer writes them. Drafts are lossless whatever
made them, if it is known what they were drawn from: the draft's logits go to the places of the
target's tokens, those that only the target has get none, and nodes are drawn from the distribution
over what is left. The text is read token by token: as the draft's token of the same bytes, or as
the draft's longest ones that spell it. That is not how the draft's tokenizer would divide it, which
costs acceptance, but texts that only grow stay so, and nothing is read twice.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vllm_specplus.drafting.model import DraftModelError, own_tokenizer
from vllm_specplus.strict import quoted

#: Fewer shared tokens draft nothing worth a pass.
LEAST = 100
#: How byte-level tokenizers write a space, and those of SentencePiece.
_BYTE_LEVEL_SPACE, _PIECE_SPACE = "\u0120", "\u2581"


@dataclass(frozen=True, slots=True)
class Spellings:
    """What the tokens of a tokenizer stand for."""

    texts: dict[int, bytes]
    special: frozenset[int]
    """Ids of marks, whose texts are names: nothing is spelled with them."""
    first: int | None
    """The mark in front of a text."""
    last: int | None
    """The mark behind a text."""

    @classmethod
    def of(cls, tokenizer: Any) -> Spellings:
        """Of a Hugging Face tokenizer."""
        vocabulary = tokenizer.get_vocab()
        added = getattr(tokenizer, "added_tokens_decoder", {})
        table = _bytes_of_characters() if _BYTE_LEVEL_SPACE in vocabulary else None

        def text_of(written: str, token: int) -> bytes:
            if token in added:
                return written.encode("utf-8", "surrogatepass")
            return _piece(written) if table is None else _byte_level(written, table)

        texts = {token: text_of(written, token) for written, token in vocabulary.items()}
        special = frozenset(tokenizer.all_special_ids)
        return cls(texts, special, tokenizer.bos_token_id, tokenizer.eos_token_id)


def _piece(token: str) -> bytes:
    """The bytes of a token as SentencePiece writes it."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            pass
    return token.replace(_PIECE_SPACE, " ").encode("utf-8", "surrogatepass")


def _byte_level(token: str, table: dict[str, int]) -> bytes:
    """The bytes of a token in which every character is one."""
    try:
        return bytes(table[character] for character in token)
    except KeyError:  # none of theirs
        return token.encode("utf-8", "surrogatepass")


def _bytes_of_characters() -> dict[str, int]:
    """GPT-2's characters for bytes: printable ones are themselves, others follow from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + i): byte for i, byte in enumerate(others)}


class SharedTokens:
    """Which tokens a target and its draft share, and how the draft reads the target's."""

    def __init__(
        self, target: Spellings, draft: Spellings, target_size: int, rows: int, predicted: int
    ):
        """``target_size``: ids of the target; ``rows``: of the draft's embedding; ``predicted``:
        how many of these, the first ones, its output layer has."""
        self._size = target_size
        ids_of: dict[bytes, int] = {}
        for token, text in sorted(draft.texts.items()):
            if text and token < rows:
                ids_of.setdefault(text, token)
        spelling = {text: token for text, token in ids_of.items() if token not in draft.special}
        shared: dict[int, int] = {}  # of each one of the draft, the target's
        read: list[list[int]] = [[] for _ in range(target_size + 1)]  # the last one is for others'
        marks = {target.last: draft.last, target.first: draft.first}
        longest = max(map(len, spelling), default=0)
        for token, text in sorted(target.texts.items()):
            if token >= target_size or not text:
                continue
            own = ids_of.get(text)
            if own is not None and own < predicted:
                shared.setdefault(own, token)
            if own is None and (mark := marks.get(token)) is not None and mark < rows:
                own = mark
            read[token] = _spelled(text, spelling, longest) if own is None else [own]
        self._lengths = np.array([len(ids) for ids in read])
        self._starts = np.cumsum(self._lengths) - self._lengths
        self._spelled = np.array([each for ids in read for each in ids], np.int32)
        self._draft_ids = torch.tensor(list(shared), dtype=torch.int64)
        self._target_ids = torch.tensor(list(shared.values()), dtype=torch.int64)
        self._in_draft = torch.zeros(target_size, dtype=torch.int64)
        self._in_draft[self._target_ids] = self._draft_ids

    def __len__(self) -> int:
        """How many tokens may be drafted."""
        return len(self._draft_ids)

    def to(self, device: torch.device) -> SharedTokens:
        """Put what is used there on the draft's device; returns itself."""
        self._draft_ids, self._target_ids, self._in_draft = (
            each.to(device) for each in (self._draft_ids, self._target_ids, self._in_draft)
        )
        return self

    def read(self, text: np.ndarray) -> np.ndarray:
        """How the draft reads a ``text`` int32 [n] of the target's: int32 [m] of its own tokens."""
        known = np.where((text >= 0) & (text < self._size), text, self._size)
        lengths = self._lengths[known]
        before = np.cumsum(lengths) - lengths
        at = np.repeat(self._starts[known] - before, lengths) + np.arange(lengths.sum())
        return self._spelled[at]

    def nodes(self, tokens: torch.Tensor) -> torch.Tensor:
        """The draft's ids of the target's ``tokens`` int64 [...]; of those that it does not have,
        and which nothing draws, some id."""
        return self._in_draft[tokens]

    def logits(self, logits: torch.Tensor) -> torch.Tensor:
        """The draft's ``logits`` float32 [..., predicted] by the target's ids, float32 [..., V]."""
        places = logits.new_full((*logits.shape[:-1], self._size), -torch.inf)
        places[..., self._target_ids] = logits[..., self._draft_ids]
        return places


def _spelled(text: bytes, ids_of: dict[bytes, int], longest: int) -> list[int]:
    """The longest tokens, from the left on, that make ``text``; bytes that none begins with are
    left out."""
    ids, at = [], 0
    while at < len(text):
        ends: Iterable[int] = range(min(at + longest, len(text)), at, -1)
        end = next((end for end in ends if text[at:end] in ids_of), None)
        if end is None:
            at += 1
            continue
        ids.append(ids_of[text[at:end]])
        at = end
    return ids


def share(
    folder: str, target_tokenizer: Any, target_size: int, rows: int, predicted: int
) -> SharedTokens:
    """What a target and the draft in ``folder`` share; the rest as :class:`SharedTokens` has it.

    DraftModelError, with a sentence, if that is too little to draft.
    """
    name = f"draft model {quoted(folder)}"
    if target_tokenizer is None:
        raise DraftModelError(
            f"{name} shares tokens by what they stand for, and the target is served without a "
            f"tokenizer, which would tell: remove --skip-tokenizer-init, or 'vocabulary'"
        )
    own, theirs = Spellings.of(own_tokenizer(folder)), Spellings.of(target_tokenizer)
    shared = SharedTokens(theirs, own, target_size, rows, predicted)
    if len(shared) < LEAST:
        raise DraftModelError(
            f"{name} and the target share {len(shared)} tokens, and {LEAST} are the least: use a "
            f"draft whose tokenizer is more like the target's"
        )
    return shared
