"""What each request's tokens took, and what they would have taken undrafted.

Drafts make a step longer for everybody in it, and only those whose drafts come true get more
tokens for it: a request whose drafts fail pays for its neighbours' rows. How much it has paid is
what it took so far less what plain decoding would have taken for as many tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vllm_specplus.control.slots import RequestSlots

#: Share of the newest step in the average of what a request gains by one.
GAIN_NEWEST = 0.05


@dataclass(frozen=True, slots=True)
class Accounts:
    """Of R requests, since their first token."""

    tokens: np.ndarray
    """float64 [R] tokens behind the first one."""
    spent: np.ndarray
    """float64 [R] seconds they took."""
    plain: np.ndarray
    """float64 [R] seconds plain decoding would have taken for them, as predicted."""


class Ledger:
    """Keeps every running request's account; a step is booked when its duration is known, at the
    start of the next one."""

    def __init__(self) -> None:
        # Tokens known at the last step, tokens behind the first one, seconds spent, plain seconds.
        self._slots = RequestSlots((), (), (), ())
        self._step: tuple[list[str], np.ndarray] = [], np.empty(0, np.int64)
        self._gain = 1.0  # tokens per request and step

    def produced(
        self, request_ids: Sequence[str], num_tokens: np.ndarray, num_prompt: np.ndarray | None
    ) -> None:
        """The running step has brought the requests to ``num_tokens`` int [R] tokens, of which
        ``num_prompt`` int [R] are their prompts' (None: all texts are past them)."""
        begun = num_tokens > num_prompt if num_prompt is not None else num_tokens > 0
        slots = np.array([self._slots.take(name) for name in request_ids], np.int32)
        known = self._slots.arrays[0]
        before = known[slots]
        gained = np.where((before > 0) & begun, num_tokens - before, 0).astype(np.int64)
        known[slots] = np.where(begun, num_tokens, 0)
        names = [name for name, count in zip(request_ids, gained.tolist(), strict=True) if count]
        self._step = names, gained[gained > 0]

    def took(self, seconds: float, plain: float, prompts: float) -> None:
        """That step took ``seconds``, all included, of which ``prompts`` were for reading prompts;
        undrafted and without prompts it would have taken ``plain``.

        Undrafted, as many prompts are read for as many tokens: by the tokens of a step, fewer.
        """
        names, gained = self._step
        self._step = [], np.empty(0, np.int64)
        if not names:
            return
        self._gain += GAIN_NEWEST * (float(gained.mean()) - self._gain)
        slots = self._slots.find(names)
        here = slots >= 0
        slots, gained = slots[here], gained[here]
        _, tokens, spent, undrafted = self._slots.arrays
        tokens[slots] += gained
        spent[slots] += seconds
        undrafted[slots] += gained * (plain + prompts / self._gain)

    def accounts(self, request_ids: Sequence[str]) -> Accounts:
        """The requests' accounts up to the last step booked; zeros of those it does not know."""
        slots = self._slots.find(request_ids)
        known = slots >= 0
        return Accounts(*(np.where(known, array[slots], 0.0) for array in self._slots.arrays[1:]))

    def forget(self, request_id: str) -> None:
        """The request is gone, and its account with it."""
        self._slots.forget(request_id)
