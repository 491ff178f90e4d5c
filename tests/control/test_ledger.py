"""What requests have paid: seconds spent beside those of plain decoding, token by token."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_specplus.control.ledger import (
    COMPARED_EVERY,
    FEWEST,
    FIRST,
    HIGHEST,
    LOWEST,
    Ledger,
)


def i32(*values):
    return np.array(values, np.int32)


def accounts(ledger, *names):
    account = ledger.accounts(names)
    return [*zip(account.tokens, account.spent, account.plain, strict=True)]


def test_a_request_pays_from_its_second_token_on():
    ledger = Ledger()
    prompts = i32(5, 5)
    ledger.produced(["a", "b"], i32(6, 5), prompts)  # a's first token; b still reads
    ledger.took(1.0, 0.5, 0.0)
    assert accounts(ledger, "a", "b") == [(0, 0, 0), (0, 0, 0)]
    ledger.produced(["a", "b"], i32(9, 6), prompts)  # three tokens; b's first
    ledger.took(1.0, 0.5, 0.0)
    assert accounts(ledger, "a", "b") == [(3, 1.0, 1.5), (0, 0, 0)]
    ledger.produced(["b", "a"], i32(7, 10), prompts)  # another order
    ledger.took(1.0, 0.5, 0.0)
    assert accounts(ledger, "a", "b") == [(4, 2.0, 2.0), (1, 1.0, 0.5)]


def test_a_step_is_booked_once_and_only_to_who_is_there():
    ledger = Ledger()
    ledger.produced(["a", "b"], i32(6, 6), None)
    ledger.produced(["a", "b"], i32(7, 7), None)
    ledger.forget("b")
    ledger.took(1.0, 1.0, 0.0)
    ledger.took(1.0, 1.0, 0.0)  # a step that nobody spoke of
    assert accounts(ledger, "a", "b", "nobody") == [(1, 1.0, 1.0), (0, 0, 0), (0, 0, 0)]
    ledger.forget("a")
    assert accounts(ledger, "a") == [(0, 0, 0)]


def test_steps_that_nobody_looked_at_are_booked_with_the_next_one():
    """c comes meanwhile, and its time is not known; nobody gains in the step of prompts alone."""
    ledger, prompts = Ledger(), i32(5, 5)
    ledger.produced(["a", "b"], i32(6, 6), prompts)
    ledger.took(9.0, 9.0, 0.0)
    for _ in range(3):
        ledger.took(1.5, 1.0, 0.25)
    ledger.produced(["a", "c"], i32(10, 7), prompts)
    assert accounts(ledger, "a") == [(0, 0, 0)]
    ledger.took(1.5, 1.0, 0.25)
    assert accounts(ledger, "a", "b", "c") == [(4, 6.0, 5.0), (0, 0, 0), (0, 0, 0)]
    ledger.produced(["a", "c"], i32(11, 8), prompts)
    ledger.took(1.5, 1.0, 0.25)
    assert accounts(ledger, "a", "c") == [(5, 7.5, 6.25), (1, 1.5, 1.25)]


def test_a_request_that_sits_out_a_step_pays_nothing():
    """It is preempted, and reads its text again."""
    ledger = Ledger()
    for known in (6, 7):
        ledger.produced(["a"], i32(known), i32(5))
        ledger.took(1.0, 1.0, 0.0)
    ledger.produced(["a"], i32(7), i32(5))
    ledger.took(1.0, 1.0, 0.0)
    assert accounts(ledger, "a") == [(1, 1.0, 1.0)]


def test_for_as_many_tokens_as_many_prompts_are_read():
    """Everybody gains four tokens a step, and a prompt is read in each: undrafted, one in four."""
    ledger = Ledger()
    for known in range(6, 1000, 4):
        ledger.produced(["a", "b"], i32(known, known), None)
        ledger.took(1.5, 1.0, 0.8)
    before = ledger.accounts(["a"]).plain[0]
    ledger.produced(["a", "b"], i32(known + 4, known + 4), None)
    ledger.took(1.5, 1.0, 0.8)
    assert ledger.accounts(["a"]).plain[0] - before == pytest.approx(4 * (1.0 + 0.2), rel=1e-3)


def answered(ledger: Ledger, name: str, seconds: list[float], prompts: list[float], plain=1.0):
    """A request whose tokens behind the first took so many ``seconds`` each, of which ``prompts``
    were others' prompts; undrafted it would have taken ``plain`` and these."""
    ledger.produced([name], i32(6), i32(5))
    ledger.took(1.0, 1.0, 0.0)
    for known, (took, reading) in enumerate(zip(seconds, prompts, strict=True), start=7):
        ledger.produced([name], i32(known), i32(5))
        ledger.took(took, plain, reading)
    ledger.forget(name)


def usual(ledger: Ledger, tokens: int) -> float:
    """Seconds, of a request with ``tokens`` tokens behind its first, one alone taking 1."""
    ledger.produced(["new"], i32(6), i32(5))
    ledger.took(1.0, 1.0, 0.0)
    if tokens:
        ledger.produced(["new"], i32(6 + tokens), i32(5))
        ledger.took(1.0, 1.0, 0.0)
    account = ledger.accounts(["new"])
    ledger.forget("new")
    return float(account.usual[0] * (account.alone[0] + 1.0))


def test_what_is_usual_is_told_from_requests_of_the_same_age():
    """Beside every second one a prompt is read, at its first token; there are too few at first."""
    ledger = Ledger()
    for i in range(FEWEST - 1):
        answered(ledger, f"r{i}", [4.0, 1.0, 1.0, 1.0], [3.0, 0.0, 0.0, 0.0])
    assert usual(ledger, 0) == 0.0
    answered(ledger, "one more", [4.0, 1.0, 1.0, 1.0], [3.0, 0.0, 0.0, 0.0])
    # With one token more; of older ones, as many seconds per token as of the oldest known.
    for tokens, seconds in ((0, 4.0), (1, 2 * 2.5), (2, 3 * 2.5), (3, 4 * 1.75), (24, 25 * 1.75)):
        assert usual(ledger, tokens) == seconds


def test_less_is_usual_where_the_slow_ones_have_become_slower():
    """Half of them would have taken 4 seconds per token undrafted, the others 1; then those that
    are slow anyway take a tenth longer."""
    ledger = Ledger()
    for i in range(40 * COMPARED_EVERY):
        reading = 3.0 if i % 2 else 0.0
        answered(ledger, f"r{i}", [1.0 + reading] * 2, [reading] * 2)
        if i < FEWEST - 1:
            assert ledger._quantile == FIRST
    assert ledger._quantile == HIGHEST
    assert usual(ledger, 1) == pytest.approx(2 * 4.0, rel=0.01)
    for i in range(40 * COMPARED_EVERY):
        reading = 3.0 if i % 2 else 0.0
        answered(ledger, f"s{i}", [1.0 + 1.1 * reading] * 2, [reading] * 2)
    assert ledger._quantile == LOWEST
    assert usual(ledger, 1) == pytest.approx(2 * 1.0, rel=0.01)
    for i in range(80 * COMPARED_EVERY):  # and no longer
        reading = 3.0 if i % 2 else 0.0
        answered(ledger, f"t{i}", [1.0 + reading] * 2, [reading] * 2)
    assert ledger._quantile == HIGHEST


def test_what_is_usual_does_not_hang_on_the_load():
    """Steps become four times as short: what took twice as long as alone still does."""
    ledger = Ledger()
    for i in range(FEWEST):
        answered(ledger, f"r{i}", [8.0, 8.0], [4.0, 4.0], plain=4.0)
    assert usual(ledger, 1) == pytest.approx(2 * 2.0)


def test_who_comes_first_is_not_usual():
    """As many prompts as in a burst, before anybody has ended."""
    ledger = Ledger()
    names = [f"r{i}" for i in range(2 * FEWEST)]
    for known in (6, 7):
        ledger.produced(names, np.full(len(names), known, np.int32), None)
        ledger.took(9.0, 1.0, 8.0)
    assert not ledger.accounts(names).usual.any()
