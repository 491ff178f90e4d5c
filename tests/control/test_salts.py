"""What is learnt of acceptance stays within a cache salt."""

from __future__ import annotations

import numpy as np

from vllm_specplus.control import salts
from vllm_specplus.control.acceptance import AcceptanceEstimator
from vllm_specplus.control.salts import SaltRows
from vllm_specplus.step import Source

SOURCES = (Source("a", "a", 0.3), Source("b", "b", 0.6))


def i32(*values):
    return np.array(values, np.int32)


def learn(estimator, names, salts, right):
    """A node of source 0 per request, which was ``right`` or not."""
    count = len(names)
    text = np.array([[1, 2 if each else 3] for each in right], np.int32)
    return estimator.learn(
        np.full(count, 2, np.int32), np.full(count, -1, np.int32), np.zeros(count, np.int32),
        np.arange(count + 1, dtype=np.int32), np.ones(count, np.int32), names,
        np.arange(count, dtype=np.int32), text, np.full(count, 2, np.int32), salts,
    )  # fmt: skip


def test_salts_learn_apart():
    together, alone = AcceptanceEstimator(SOURCES), AcceptanceEstimator(SOURCES)
    for _ in range(30):
        assert learn(together, ["x", "y", "z"], ["a", "b", ""], [True, False, False]) == 3
        learn(alone, ["x"], None, [True])
    tables = together.tables(["x", "new", "new"], ["a", "a", "b"])
    assert (tables[:2] == alone.tables(["x", "new"])).all()
    assert tables[2, 0, 0] < 0.3 < tables[1, 0, 0]
    assert together.tables(["new"])[0, 0, 0] < 0.3


def test_20_000_salts_take_the_memory_of_some(monkeypatch):
    monkeypatch.setattr(salts, "MOST_SALTS", 16)
    estimator = AcceptanceEstimator(SOURCES)
    fresh = estimator.tables(["new"])
    for i in range(20_000):
        learn(estimator, ["r"], [f"salt {i}"], [True])
        estimator.forget("r")
    assert all(len(each) <= 32 for each in estimator._frequencies.arrays)
    assert (estimator.tables(["new"], ["salt 19999"]) != fresh).any()
    assert (estimator.tables(["new"], ["salt 0"]) == fresh).all()
    assert (estimator.tables(["new"]) == fresh).all()


def test_a_step_of_more_salts_than_are_kept_shares_no_row(monkeypatch):
    monkeypatch.setattr(salts, "MOST_SALTS", 2)
    rows, _ = SaltRows().of(["a", "b", "", "c", "d", "a"], 6)
    assert rows[2] == 0
    assert len(set(rows.tolist())) == 5
    assert rows[0] == rows[5]
