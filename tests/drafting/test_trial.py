"""Placements are tried at the start: what is measured, and what follows from it."""

from __future__ import annotations

import pytest
import torch

from tests.drafting.sharded import in_threads, model_of, plan_of
from tests.drafting.test_drafting import save_draft
from vllm_specplus.drafting import trial
from vllm_specplus.drafting.division import PLACEMENTS
from vllm_specplus.drafting.trial import Rounds, choose, followed, possible, try_all


def measured(**milliseconds: float) -> dict[str, dict[int, Rounds]]:
    """The same for every load."""
    return {
        name: {load: Rounds(each / 1e3, each / 5e3) for load in trial.LOADS}
        for name, each in milliseconds.items()
    }


ROUNDS = {"one_device": 30, "attentions": 25, "attentions_and_mlps": 15, "tensor_parallel": 20}


@pytest.mark.parametrize(
    ("kept", "target_ms", "best"),
    [
        # Little is lost: what is fastest.
        (5.7, 40, "attentions_and_mlps"),
        # A quarter of the worth: then the fastest of those that lose nothing.
        (4.5, 40, "tensor_parallel"),
        # Beside a target that takes no time only the round counts.
        (4.6, 0, "attentions_and_mlps"),
        # Beside one that takes for ever, only the worth.
        (5.7, 100_000, "tensor_parallel"),
    ],
)
def test_the_choice_weighs_the_round_against_what_it_is_worth(kept, target_ms, best):
    worth = dict.fromkeys(ROUNDS, 6.0)
    worth |= {"attentions": kept, "attentions_and_mlps": kept}
    verdict = choose(measured(**ROUNDS), worth, target_ms / 1e3)
    assert verdict.placement == best
    said = str(verdict)
    assert said.startswith(f"the draft's placement is '{best}'")
    assert all(name in said for name in ROUNDS)


def test_loads_count_alike():
    """Twice as fast for one text and three times as slow for several is a loss."""
    rounds = measured(one_device=10, tensor_parallel=10)
    rounds["tensor_parallel"][1].round /= 2
    rounds["tensor_parallel"][8].round *= 3
    worth = dict.fromkeys(rounds, 1.0)
    assert choose(rounds, worth, 0.0).placement == "one_device"
    rounds["tensor_parallel"][8].round /= 2
    assert choose(rounds, worth, 0.0).placement == "tensor_parallel"


def test_an_impossible_placement_is_not_tried(tmp_path):
    """Experts are not divided, nor two heads of keys by three."""
    folder = save_draft(tmp_path / "experts", "mixtral", layers=4, num_local_experts=2)
    allowed, refused = possible(model_of(folder), 2)
    assert allowed == ["one_device", "attentions"]
    assert list(refused) == ["attentions_and_mlps", "tensor_parallel"]
    allowed, refused = possible(model_of(save_draft(tmp_path / "dense", layers=4)), 3)
    assert allowed == ["one_device", "attentions", "attentions_and_mlps"]
    assert "too few for 3 shards" in refused["tensor_parallel"]


def test_groups_of_one_are_followed_to_the_end(tmp_path):
    model = model_of(save_draft(tmp_path, layers=6))
    assert followed(model, 1, 4) == [1.0] * 4
    kept = followed(model, 4, 4)
    assert kept[0] == 1.0
    assert kept == sorted(kept, reverse=True)
    assert kept[-1] < 1


def test_all_are_tried_on_all_shards_and_one_is_kept(tmp_path):
    plan = plan_of(save_draft(tmp_path, layers=5), "auto", 2)
    placed: list[tuple[str, int]] = []

    with in_threads(plan) as (home, _):

        def place(placement, slots):
            placed.append((placement, slots))
            return home.place(placement, slots, settle=False)

        verdict = try_all(home._whole, 2, 3, (3, 3, 3), 10**6, place)
        assert [name for name, _ in placed] == list(PLACEMENTS)
        assert set(verdict.rounds) == set(PLACEMENTS)
        assert verdict.worth["tensor_parallel"] == verdict.worth["one_device"] == 4.0
        assert 1 < verdict.worth["attentions"] == verdict.worth["attentions_and_mlps"] < 4
        run = home.place("attentions_and_mlps", 500)
        assert home._whole is None
        assert run.room("a", 3)
        assert torch.isfinite(run.begin(["a"], [verdict_text()])).all()


def verdict_text():
    import numpy as np

    return np.arange(3, dtype=np.int32)


def test_owners_of_a_draft_that_stays_on_one_device_end(tmp_path):
    plan = plan_of(save_draft(tmp_path, layers=4), "auto", 2)
    with in_threads(plan) as (home, group):
        home.place("tensor_parallel", 500, settle=False)
        told = group.counts.copy()
        run = home.place("one_device", 500)
        run.room("a", 3)
        run.begin(["a"], [verdict_text()])
        assert (group.counts - told).total() == 1  # that it is over
