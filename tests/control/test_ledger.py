"""What requests have paid: seconds spent beside those of plain decoding, token by token."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_specplus.control.ledger import FEWEST, Ledger


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


def test_what_is_usual_is_the_median_request_of_the_same_age():
    """A prompt is read in every third step: those of two tokens have met one, or none."""
    ledger = Ledger()
    for i in range(FEWEST + 4):
        name = f"r{i}"
        for known in range(6, 12):
            ledger.produced([name], i32(known), i32(5))
            ledger.took(1.0, 1.0, 3.0 if i % 4 and known == 7 else 0.0)
        if i < FEWEST - 1:
            assert ledger.accounts([name]).usual.tolist() == [0.0]
        ledger.forget(name)
    # With one token more, and nothing known of older ones.
    for known, usual in ((6, 1 * 4.0), (7, 2 * 2.5), (8, 3 * 2.5), (9, 4 * 1.75), (30, 25 * 1.75)):
        ledger.produced(["new"], i32(known), i32(5))
        ledger.took(1.0, 1.0, 0.0)
        assert ledger.accounts(["new"]).usual.tolist() == [usual]
