"""What each request's tokens took, and what they would have taken undrafted.

Drafts make a step longer for everybody in it, and only those whose drafts come true get more
tokens for it: a request whose drafts fail pays for its neighbours' rows. How much it has paid is
what it took so far less what plain decoding would have taken for as many tokens.

Requests of different times are compared by how much longer they took than decoding alone, without
the prompts that others have read: load changes, and seconds with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vllm_specplus.control.slots import RequestSlots

#: Share of the newest step in the average of what a request gains by one.
GAIN_NEWEST = 0.05
#: Requests of one age that it is told from what is usual, at least and at most; ages are powers of
#: two in tokens.
FEWEST, MOST = 16, 128
AGES = 16
#: What is usual is a quantile, at first the median. It follows from the latest requests, after
#: every so many of which their tails are compared: what they took and would have taken undrafted,
#: at this quantile. A step down where they took longer, else up.
LOWEST, FIRST, HIGHEST = 0.0, 0.5, 0.8
LATEST, COMPARED_EVERY, TAIL = 256, 8, 0.95
DOWN, UP = 0.1, 0.025


@dataclass(frozen=True, slots=True)
class Accounts:
    """Of R requests, since their first token."""

    tokens: np.ndarray
    """float64 [R] tokens behind the first one."""
    spent: np.ndarray
    """float64 [R] seconds they took."""
    plain: np.ndarray
    """float64 [R] seconds plain decoding would have taken for them, as predicted."""
    alone: np.ndarray
    """float64 [R] the same if nobody had read a prompt."""
    usual: np.ndarray
    """float64 [R] how many times as long as alone plain decoding takes a request for as many
    tokens and one more, if it is as slow as may be; 0 as long as that is not known."""


class Ledger:
    """Keeps every running request's account; a step is booked when its duration is known, at the
    start of the next one."""

    def __init__(self) -> None:
        # Tokens known at the last step, tokens behind the first one, seconds spent, plain seconds,
        # those without prompts.
        self._slots = RequestSlots((), (), (), (), ())
        # Who gained how many tokens since the last booking; None: the step was not looked at.
        self._step: tuple[list[str], np.ndarray] | None = None
        self._unbooked = np.zeros(4)  # seconds, plain, prompts, steps
        self._gain = 1.0  # tokens per request and step
        self._ages = [_Age() for _ in range(AGES)]
        # Of the latest requests, how many times as long as alone: as they took, and undrafted.
        self._ended = np.zeros((2, LATEST))
        self._count = 0
        self._quantile = FIRST

    def produced(
        self, request_ids: Sequence[str], num_tokens: np.ndarray, num_prompt: np.ndarray | None
    ) -> None:
        """The running step, and those before it that were not looked at, have brought the requests
        to ``num_tokens`` int [R] tokens, of which ``num_prompt`` int [R] are their prompts' (None:
        all texts are past them)."""
        begun = num_tokens > num_prompt if num_prompt is not None else num_tokens > 0
        slots = np.array([self._slots.take(name) for name in request_ids], np.int32)
        known = self._slots.arrays[0]
        before = known[slots]
        gained = np.where((before > 0) & begun, num_tokens - before, 0).astype(np.int64)
        known[slots] = np.where(begun, num_tokens, 0)
        names = [name for name, count in zip(request_ids, gained.tolist(), strict=True) if count]
        self._step = names, gained[gained > 0]

    def took(self, seconds: float, plain: float, prompts: float) -> None:
        """A step took ``seconds``, all included; undrafted it would have taken ``plain``, and
        ``prompts`` more for reading prompts. It is booked once it is known who gained by it.

        Undrafted, as many prompts are read for as many tokens: by the tokens of a step, fewer.
        """
        self._unbooked += seconds, plain, prompts, 1
        if self._step is None:
            return
        (names, gained), self._step = self._step, None
        seconds, plain, prompts, steps = self._unbooked.tolist()
        self._unbooked[:] = 0
        if not names:
            return
        self._gain += GAIN_NEWEST * (float(gained.mean()) / steps - self._gain)
        slots = self._slots.find(names)
        here = slots >= 0
        slots, gained = slots[here], gained[here]
        _, tokens, spent, undrafted, alone = self._slots.arrays
        before = _age(tokens[slots])
        tokens[slots] += gained
        spent[slots] += seconds
        undrafted[slots] += gained * (plain + prompts / self._gain) / steps
        alone[slots] += gained * plain / steps
        after = _age(tokens[slots])
        for i in np.flatnonzero(after > before).tolist():
            self._ages[after[i]].add(undrafted[slots[i]] / alone[slots[i]], self._quantile)

    def accounts(self, request_ids: Sequence[str]) -> Accounts:
        """The requests' accounts up to the last step booked; zeros of those it does not know."""
        slots = self._slots.find(request_ids)
        known = slots >= 0
        tokens, spent, plain, alone = (
            np.where(known, array[slots], 0.0) for array in self._slots.arrays[1:]
        )
        usual = np.zeros(len(tokens))
        if self._count >= FEWEST:  # before any have ended, those that have come first are not usual
            of_ages = np.array([age.usual for age in self._ages])
            # Where too few have come to an age, what is known of a younger one has to do.
            known_ages = np.maximum.accumulate(np.where(of_ages > 0, np.arange(AGES), 0))
            usual = of_ages[known_ages[_age(tokens + 1)]]
        return Accounts(tokens, spent, plain, alone, usual)

    def forget(self, request_id: str) -> None:
        """The request is gone, and its account with it."""
        account = self.accounts([request_id])
        if account.tokens[0]:
            self._compare(np.array([account.spent[0], account.plain[0]]) / account.alone[0])
        self._slots.forget(request_id)

    def _compare(self, took_and_undrafted: np.ndarray) -> None:
        """Are the slow requests slower than they would be undrafted? Then less is admitted."""
        self._ended[:, self._count % LATEST] = took_and_undrafted
        self._count += 1
        if self._count >= FEWEST and self._count % COMPARED_EVERY == 0:
            latest = self._ended[:, : min(self._count, LATEST)]
            took, undrafted = np.quantile(latest, TAIL, axis=1)
            slower = took > undrafted
            self._quantile += -DOWN if slower else UP
            self._quantile = min(max(self._quantile, LOWEST), HIGHEST)


class _Age:
    """How many times as long as alone the latest requests would have taken, undrafted, when they
    came to one age."""

    def __init__(self) -> None:
        self.usual = 0.0
        """At some quantile; 0 while too few have come to that age."""
        self._times = np.empty(MOST)
        self._count = 0

    def add(self, times: float, quantile: float) -> None:
        self._times[self._count % MOST] = times
        self._count += 1
        if self._count >= FEWEST and self._count % COMPARED_EVERY == 0:
            self.usual = float(np.quantile(self._times[: min(self._count, MOST)], quantile))


def _age(tokens: np.ndarray) -> np.ndarray:
    """The age class int [R] of requests with ``tokens`` float64 [R] behind the first; -1: none."""
    return np.minimum(np.frexp(tokens)[1] - 1, AGES - 1)
