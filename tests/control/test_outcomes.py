"""Calibration: what was expected against what came, and whose expectations they were."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_specplus.control.outcomes import Calibration
from vllm_specplus.control.salts import MOST_SALTS


def test_expectations_that_come_true_are_not_scaled():
    calibration = Calibration()
    assert calibration.factors(2).tolist() == [1.0, 1.0]
    for _ in range(50):
        calibration.observe(np.array([2.0, 1.0]), np.array([2, 1]))
    assert calibration.factors(1) == pytest.approx(1.0)


def test_too_high_expectations_are_scaled_as_the_formula_says():
    calibration = Calibration()
    expected = gained = 0.0
    for _ in range(5):
        calibration.observe(np.array([2.0, 0.0]), np.array([1, 7]))  # nothing expected: not asked
        expected, gained = 0.9 * expected + 2.0, 0.9 * gained + 1.0
    factor = (gained + 3.0) / (expected + 3.0)
    assert calibration.factors(3).tolist() == pytest.approx([factor] * 3)


def test_a_salt_does_not_learn_from_others():
    calibration, alone = Calibration(), Calibration()
    for _ in range(10):
        calibration.observe(np.array([3.0, 2.0, 2.0]), np.array([0, 1, 0]), ["a", "b", ""])
        alone.observe(np.array([2.0]), np.array([1]), ["b"])
    a, b, unsalted, new = calibration.factors(4, ["a", "b", "", "c"])
    assert b == alone.factors(1, ["b"])[0]
    assert a < b < new == 1.0
    assert unsalted != b


def test_salts_that_nothing_was_observed_of():
    assert Calibration().factors(3, ["a", "b", ""]).tolist() == [1.0, 1.0, 1.0]


def test_memory_is_bounded_whatever_the_number_of_salts():
    calibration = Calibration()
    for number in range(20_000):
        calibration.observe(np.array([3.0]), np.array([0]), [f"salt {number}"])
    assert len(calibration._sums.arrays[0]) <= 4 * MOST_SALTS
    assert calibration.factors(1, ["salt 0"]).tolist() == [1.0]  # forgotten
    assert calibration.factors(1, ["salt 19999"])[0] < 1.0
