"""Rows that belong to requests: zeros at first and after them, others' left alone."""

from __future__ import annotations

import numpy as np

from vllm_specplus.control.slots import RequestSlots


def test_a_request_keeps_its_row_and_leaves_zeros():
    slots = RequestSlots((), (2,))
    a, b = slots.take("a"), slots.take("b")
    assert a != b
    assert slots.take("a") == a
    slots.arrays[0][[a, b]] = 1.0, 2.0
    slots.arrays[1][a] = 3.0
    assert slots.find(["b", "nobody", "a"]).tolist() == [b, -1, a]
    slots.forget("a")
    slots.forget("nobody")
    assert slots.find(["a", "b"]).tolist() == [-1, b]
    c = slots.take("c")
    assert slots.arrays[0][c] == 0.0
    assert not slots.arrays[1][c].any()
    assert slots.arrays[0][b] == 2.0


def test_rows_are_as_many_as_requests_live_at_once():
    slots = RequestSlots(())
    for i in range(100):
        slots.take(f"r{i}")
        slots.forget(f"r{i}")
    assert len(slots.arrays[0]) == 16
    rows = [slots.take(f"r{i}") for i in range(100)]
    assert len(set(rows)) == 100
    slots.arrays[0][rows] = np.arange(100)
    assert slots.arrays[0][slots.find(["r42"])] == 42
