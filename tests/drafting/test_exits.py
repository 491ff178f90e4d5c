"""DEL's formulas, by hand and by its card's values; an exit that moves with the traffic."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_specplus.drafting.exits import (
    MEMORY,
    ExitChoice,
    ExitStatistics,
    best_exit,
    tokens_per_layer,
)


def test_the_exit_with_most_tokens_per_layer():
    """DEL's worked values: of 32 layers, 60 % right after 8 and 85 % after 16."""
    assert tokens_per_layer(0.6, 8, 32, 3) == pytest.approx(2.176 / 56)
    assert tokens_per_layer(0.85, 16, 32, 3) == pytest.approx(3.186625 / 80)
    assert tokens_per_layer(0.85, 16, 32, 0) == 1 / 32
    for drafted, best in ((1, 8), (17, 16)):  # the late exit gains by long drafts
        choice = ExitChoice([8, 16], 32, drafted)
        choice.observe(np.array([60, 88]), 100)
        assert choice.best == best


def test_the_choice_is_the_best_of_all_pairs():
    rng = np.random.default_rng(0)
    exits = [3, 7, 12, 20]
    for _ in range(50):
        right = rng.random(4)
        table = {
            (layers, drafted): tokens_per_layer(share, layers, 24, drafted)
            for share, layers in zip(right, exits, strict=True)
            for drafted in range(18)
        }
        assert best_exit(right, exits, 24, 17) == max(table, key=table.get)


def test_of_equals_the_shallow_exit_and_the_short_draft():
    assert best_exit(np.zeros(3), [4, 8, 12], 16, 5) == (4, 0)
    assert best_exit(np.array([1.0, 1.0]), [4, 8], 16, 5) == (4, 5)
    # The late one is as good at its best, and no better.
    right = np.array([0.5, 1.0])
    assert tokens_per_layer(0.5, 1, 4, 0) == tokens_per_layer(1.0, 4, 4, 3)
    assert best_exit(np.array([0.0, 1.0]), [1, 4], 4, 3)[0] == 1
    assert best_exit(right, [1, 4], 4, 3)[0] == 1


def test_an_exit_of_which_nothing_is_known_is_not_chosen_for_its_drafts():
    assert best_exit(np.array([np.nan, 0.9]), [4, 8], 16, 5)[0] == 8
    assert best_exit(np.array([np.nan, np.nan]), [4, 8], 16, 5) == (4, 0)


def test_an_exit_is_forgiven_old_mistakes():
    choice = ExitChoice([8, 16], 32, 4)
    choice.observe(np.array([0, 90]), 100)
    assert choice.best == 16
    for _ in range(60):
        choice.observe(np.array([95, 95]), 100)
    assert choice.best == 8


def test_the_averages_by_hand():
    """Three right, then two of four."""
    statistics = ExitStatistics(1)
    assert np.isnan(statistics.right).all()
    statistics.observe(np.ones((3, 1), bool), np.full((3, 1), 0.9))
    assert np.isnan(statistics.tau).all()  # none was wrong yet
    right = np.array([True, True, False, False])[:, None]
    statistics.observe(right, np.array([0.8, 0.6, 0.5, 0.1])[:, None])
    matched, missed = MEMORY * 3 + 2, 2.0
    assert statistics.right[0] == pytest.approx(matched / (matched + missed))
    sure = (MEMORY * 2.7 + 1.4) / matched
    assert statistics.tau[0] == pytest.approx((sure + 0.6 / 2) / 2)


def test_a_copy_is_another():
    statistics = ExitStatistics(2)
    statistics.observe(np.ones((2, 2), bool), np.ones((2, 2)))
    other = statistics.copy()
    other.observe(np.zeros((9, 2), bool), np.ones((9, 2)))
    assert statistics.right.tolist() == [1.0, 1.0]
    assert (other.right < 1).all()


def test_the_exit_moves_with_the_traffic():
    """Code, which the first layers know; then dialogue, which takes more of them."""
    exits, layers, most = [4, 8, 12], 16, 6
    rng = np.random.default_rng(0)
    statistics = ExitStatistics(3)

    def serve(shares: tuple[float, ...], rounds: int) -> int:
        for _ in range(rounds):
            chosen, _ = best_exit(statistics.right, exits, layers, most)
            right = rng.random((most + 1, 3)) < shares
            # Up to the first that the chosen exit drafted wrong.
            wrong = np.flatnonzero(~right[:, exits.index(chosen)])
            seen = right[: wrong[0] + 1 if len(wrong) else most + 1]
            statistics.observe(seen, np.where(seen, 0.9, 0.5))
        return best_exit(statistics.right, exits, layers, most)[0]

    assert serve((0.9, 0.92, 0.95), 60) == 4
    assert serve((0.1, 0.8, 0.85), 60) == 8
    assert serve((0.9, 0.92, 0.95), 60) == 4
