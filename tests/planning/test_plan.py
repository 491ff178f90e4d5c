"""The plan: the best number of levels, from where on it pays, what decided, what fits."""

from __future__ import annotations

import functools
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from tests.planning.shapes import LLAMA_8B, LLAMA_70B, config
from vllm_specplus.control import memory
from vllm_specplus.planning import plan, rounds
from vllm_specplus.planning.acceptance import KNOWN, expected, expected_overlapped
from vllm_specplus.planning.devices import DEVICES
from vllm_specplus.planning.plan import MOST_LEVELS, OVERLAPPED, Wanted, answer, room, rows

WANTED = Wanted(LLAMA_70B, LLAMA_8B, DEVICES["A100-80GB"], 8)


@pytest.mark.parametrize(
    ("rate", "levels", "tokens"), [(0.7, 3, 2.533), (0.7, 5, 2.941), (0.9, 5, 4.686), (1, 4, 5)]
)
def test_tokens_of_a_round(rate, levels, tokens):
    assert expected(rate, levels) == pytest.approx(tokens, abs=5e-4)


@pytest.mark.parametrize(("rate", "levels"), [(0.6, 1), (0.6, 5), (0.9, 4)])
def test_tokens_of_overlapped_rounds_by_playing_them(rate, levels):
    """PEARL token by token: pre-verify until a first token is right, then blocks."""
    rng, tokens, played, following = random.Random(1), 0, 60_000, False
    for _ in range(played):
        wanted = levels if following else 1
        right = next((i for i in range(wanted) if rng.random() >= rate), wanted)
        tokens += right if right == wanted else right + 1
        following = right == wanted
    assert expected_overlapped(rate, levels) == pytest.approx(tokens / played, rel=0.02)


def test_drafts_that_are_always_or_never_right():
    assert expected_overlapped(1.0, 5) == 5
    assert expected_overlapped(0.0, 5) == 1


def test_overlapping_hides_the_shorter_of_drafting_and_verifying():
    found = {row.placement: row for row in rows(WANTED) if row.method == "draft_tree"}
    row = found[OVERLAPPED]
    draft = rounds.one_device(WANTED.machine, LLAMA_8B, WANTED.load, 1, row.levels).total
    verify = rounds.verified(WANTED.machine, LLAMA_70B, WANTED.load, row.levels - 1, 8).total
    assert row.draft.total + row.verify.total == pytest.approx(max(draft, verify))
    assert row.ratio > found["one device"].ratio


def test_known_rates_are_those_of_their_sources():
    """MoESD has 0.55 of 5 tokens, issue 20780 3.32 with 5 levels, Spec-Bench 2.32 with 4."""
    assert expected(KNOWN["draft_tree"].rate, 4) == pytest.approx(0.55 * 5, rel=0.02)
    assert expected(KNOWN["eagle_tree"].rate, 5) == pytest.approx(3.32, rel=0.02)
    assert expected(KNOWN["block_tree"].rate, 4) == pytest.approx(2.32, rel=0.02)


def test_every_row_has_its_best_number_of_levels():
    """By trying all, without what the plan shares."""
    machine, load = WANTED.machine, WANTED.load
    plain = rounds.step(machine, LLAMA_70B, load, 8).total
    found = {(row.method, row.placement): row for row in rows(WANTED)}
    for (method, place), row in found.items():
        if place not in rounds.PLACEMENTS or method not in ("draft_tree", "easyspec"):
            continue
        speeds = {}
        for levels in range(1, MOST_LEVELS + 1):
            draft = rounds.PLACEMENTS[place](machine, LLAMA_8B, load, 8, levels).total
            verify = rounds.verified(machine, LLAMA_70B, load, levels, 8).total
            speeds[levels] = sum(0.7**i for i in range(levels + 1)) * plain / (draft + verify)
        assert row.ratio == pytest.approx(max(speeds.values()))
        assert speeds[row.levels] == max(speeds.values())


def test_from_where_on_a_method_pays():
    @functools.cache
    def ratios(rate: float) -> dict[tuple[str, str], float]:
        found = rows(replace(WANTED, acceptance=rate))
        return {(row.method, row.placement): row.ratio for row in found}

    for row in rows(WANTED):
        name = row.method, row.placement
        assert ratios(row.pays_from)[name] >= 1 > ratios(row.pays_from - 0.01)[name]


def test_what_never_pays_says_so():
    load = replace(WANTED, requests=4096, draft=None)
    assert any(row.pays_from is None for row in rows(load))


def test_the_answer_names_what_decided():
    lines = answer(rows(replace(WANTED, acceptance=0.8)))
    told = {line.split(":")[0]: line for line in lines[1:]}
    assert set(told) == {"tensor parallel", "EasySpec A", "EasySpec B", OVERLAPPED}
    assert "decided by, per level: weights -" in told["EasySpec B"]
    assert "messages +" in told["EasySpec B"]
    assert "so it pays while it keeps" in told["EasySpec B"]


def test_one_gpu_has_one_place_for_a_draft_and_a_plan_without_a_draft_none():
    one = replace(WANTED, target=LLAMA_8B, draft=replace(LLAMA_8B, layers=4), ranks=1)
    places = {r.placement for r in rows(one) if r.method == "draft_tree"}
    assert places == {"one device", OVERLAPPED}
    assert not any(r.method == "easyspec" for r in rows(one))
    alone = rows(replace(WANTED, draft=None))
    assert {row.method for row in alone}.isdisjoint({"draft_tree", "easyspec"})
    assert answer(alone)[0].startswith("Best: eagle_tree")


def test_a_busy_machine_gains_less():
    ratios = [max(r.ratio for r in rows(replace(WANTED, requests=n))) for n in (1, 64, 1024)]
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[-1] < 1.1 < ratios[0]


def test_memory_is_that_of_the_doctor():
    wanted = replace(WANTED, requests=64, context=2048)
    dims = memory.ModelDimensions.from_config(config(LLAMA_70B), 8)
    keys = 2 * 2 * 32 * 8 * 128 * 64 * 2048
    beside = LLAMA_70B.weight_bytes // 8 + LLAMA_8B.weight_bytes + keys
    given = int(80 * 2**30 * plan.MEMORY_SHARE)
    assert room(wanted, config(LLAMA_70B)) == memory.plan(dims, given - beside, 2048, 64)


def test_weights_that_do_not_fit():
    with pytest.raises(ValueError, match=r"the weights take .* raise --tp, or name another --gpu"):
        room(replace(WANTED, ranks=1), config(LLAMA_70B))


def test_the_error_that_is_printed_is_that_of_the_result():
    path = Path(__file__).parents[2] / "benchmarks/results/plan/check.json"
    found = json.loads(path.read_text())
    assert pytest.approx(found["measured_here"]["median_error"], abs=5e-4) == plan.ERROR_HERE
    assert pytest.approx(found["published"]["median_error"], abs=5e-4) == plan.ERROR_PUBLISHED
