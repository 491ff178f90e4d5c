"""Every cut of a text is seen, and nothing else, against a copy of the texts."""

from __future__ import annotations

import numpy as np

from vllm_specplus.engine.text_versions import TextVersions


def look(versions: TextVersions, **texts: tuple[int, int]) -> list[int]:
    lengths, prompts = np.array(list(texts.values()), np.int32).T
    return versions.look(list(texts), lengths, prompts).tolist()


def test_growth_keeps_the_version_and_cuts_change_it():
    versions = TextVersions()
    assert look(versions, a=(10, 10), b=(4, 4)) == [0, 1]
    assert look(versions, b=(5, 4), a=(10, 10)) == [1, 0]  # in another order, one has sat out
    assert look(versions, a=(12, 10)) == [0]
    assert look(versions, a=(11, 10)) == [2]  # shorter
    assert look(versions, a=(15, 14)) == [3]  # a session's next turn
    versions.forget("b")
    assert look(versions, b=(5, 4)) == [4]  # another request of that name


def history(rng: np.random.Generator, after: bool) -> tuple[int, int]:
    """Runs a session whose texts grow by steps and are cut now and then, and looks at it before
    and (``after``) behind each step; returns (cuts that were not seen, versions)."""
    versions, missed = TextVersions(), 0
    text = rng.integers(0, 9, 5).tolist()
    prompt, computed, seen = len(text), 0, {}

    def check():
        nonlocal missed
        (version,) = look(versions, a=(len(text), prompt))
        if version in seen and text[: len(seen[version])] != seen[version]:
            missed += 1
        seen[version] = list(text)

    for _ in range(60):
        kind = rng.integers(12)
        if kind == 0 and computed >= prompt:  # a turn: what is not computed goes
            text = text[:computed] + rng.integers(0, 9, rng.integers(0, 4)).tolist()
            prompt = len(text)
        elif kind == 1 and len(text) > prompt:  # output that is computed anew
            text = text[: int(rng.integers(prompt, len(text)))]
            computed = min(computed, len(text) - 1)
        elif kind == 2:  # preempted: its tokens stay
            computed = 0
        check()
        computed = len(text)
        text = text + rng.integers(0, 9, rng.integers(1, 5)).tolist()
        if after:
            check()
    return missed, len(seen)


def test_no_cut_is_missed():
    rng = np.random.default_rng(0)
    outcomes = [history(rng, True) for _ in range(200)]
    assert sum(missed for missed, _ in outcomes) == 0
    assert sum(count for _, count in outcomes) < 200 * 60 / 3, "versions change without need"
    # Who looks only before each step has never seen what a step appends: nothing is missed.
    assert sum(history(rng, False)[0] for _ in range(200)) == 0


def test_a_version_by_length_alone_misses_turns(monkeypatch):
    """The negative control: without the prompt's length, turns pass unseen."""
    stock = TextVersions.look
    monkeypatch.setattr(
        TextVersions, "look", lambda self, names, lengths, _: stock(self, names, lengths, 0 * _)
    )
    rng = np.random.default_rng(0)
    assert sum(history(rng, True)[0] for _ in range(200)) > 0
