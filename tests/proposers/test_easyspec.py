"""The method on several shards, without processes: what is refused, and what a lost group costs."""

from __future__ import annotations

import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.drafting.test_drafting import VOCAB, save_draft
from tests.model_configs import target
from tests.proposers.test_draft_tree import texts_of
from vllm_specplus.config import parse
from vllm_specplus.drafting.model import DraftModelError
from vllm_specplus.drafting.placement import PlacementError
from vllm_specplus.proposer import Services
from vllm_specplus.proposers import easyspec
from vllm_specplus.proposers.easyspec import EasySpec

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def draft(tmp_path_factory) -> str:
    return save_draft(tmp_path_factory.mktemp("deep"), layers=5)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"shards": 5}, "'shards' \\(5\\) is more than 'group_size' \\(4\\)"),
        ({"ray_address": "here:1"}, "'ray_address' is for 'shards' > 1"),
        ({"share_target": True}, "'share_target' is for 'shards' > 1"),
        ({"placement": "attentions"}, "'placement' is for 'shards' > 1"),
        ({"placement_timeout_s": 9}, "'placement_timeout_s' is for 'shards' > 1"),
        ({"shards": 2, "placement": "one_device"}, "placement"),
        (
            {"shards": 2, "placement": "tensor_parallel", "group_size": 4},
            "placement 'tensor_parallel' has no 'group_size': remove it",
        ),
        (
            {"shards": 3, "placement": "tensor_parallel"},
            "divides the 2 heads of keys of draft model .* among 3 'shards'",
        ),
    ],
)
def test_mistakes_are_named(draft, keys, says):
    pytest.importorskip("ray")
    with pytest.raises(ValueError, match=says):
        parse({"method": "easyspec", "model": draft, **keys})


@pytest.mark.parametrize("placement", ["attentions_and_mlps", "tensor_parallel"])
def test_experts_are_not_divided(tmp_path, placement):
    pytest.importorskip("ray")
    folder = save_draft(tmp_path, "mixtral", layers=4, num_local_experts=2)
    keys = {"method": "easyspec", "model": folder, "shards": 2}
    parse(keys | {"placement": "attentions"})
    with pytest.raises(ValueError, match="are experts: use 'attentions', or 'auto'"):
        parse(keys | {"placement": placement})


def test_sharing_the_targets_devices_needs_as_many(draft):
    pytest.importorskip("ray")
    config = parse({"method": "easyspec", "model": draft, "shards": 2, "share_target": True})
    fits = {"vocab_size": VOCAB, "tensor_parallel_size": 2}
    config.check_target(target(**fits))
    with pytest.raises(ValueError, match="is more than tensor_parallel_size \\(1\\)"):
        config.check_target(target(**fits | {"tensor_parallel_size": 1}))


def test_a_draft_of_another_vocabulary_is_refused_before_anything_is_placed(draft):
    pytest.importorskip("ray")
    config = parse({"method": "easyspec", "model": draft, "shards": 2})
    with pytest.raises(DraftModelError, match=f"has {VOCAB} token ids, the target 512"):
        config.check_target(target(vocab_size=512))


def test_a_draft_larger_than_memory_is_refused(draft, monkeypatch):
    config = parse({"method": "easyspec", "model": draft, "kv_memory_mb": 1 << 20})
    monkeypatch.setattr("vllm_specplus.drafting.memory._free", lambda device: 10**9)
    with pytest.raises(DraftModelError, match="use a smaller draft, lower 'kv_memory_mb'"):
        EasySpec(config, Services(VOCAB)).load_draft(CPU, torch.float32)


class Lost:
    """A placement whose owners are gone; each attempt to start them anew ends as it is told."""

    def __init__(self, plan, *attempts: bool):
        self.plan, self._attempts, self.started, self.closed = plan, list(attempts), 0, 0
        self.group = SimpleNamespace(check=lambda: None, hurry=lambda: None)

    def restart(self, plan):
        self.started += 1
        if not self._attempts.pop(0):
            raise PlacementError("easyspec asks for 1 free CPUs")

    def close(self):
        self.closed += 1

    def cancel(self):
        pass


@pytest.fixture
def drafter(draft, monkeypatch):
    """On one shard, but for the placement that a test gives it; with what it reports."""
    reported: list[Exception] = []
    counted: Counter = Counter()
    services = Services(VOCAB, report=reported.append, count=lambda name: counted.update([name]))
    made = EasySpec(parse({"method": "easyspec", "model": draft, "shape": "chain"}), services)
    made.load_draft(CPU, torch.float32)
    made._chosen = "attentions"
    monkeypatch.setattr(easyspec, "RETRY_SECONDS", (0, 0))
    monkeypatch.setattr(
        easyspec, "rejoin", lambda executor, plan, group: executor.attach(executor.parts)
    )
    yield made, reported, counted
    made.close()


PLAN = easyspec.Plan("x", "", "float32", None, 100, 12, 4, 2, "auto")


def broken(made: EasySpec) -> None:
    """The next pass fails."""
    parts = made._executor.parts

    def lost(*_):
        del parts.begin
        raise RuntimeError("connection closed by peer")

    parts.begin = lost


def test_a_lost_group_is_started_anew_and_texts_are_read_again(drafter):
    made, reported, counted = drafter
    step = texts_of([20, 30], made)
    first = made.propose(step)
    made._placement = Lost(PLAN, False, True)
    broken(made)
    with pytest.raises(RuntimeError, match="closed by peer"):
        made.propose(step)
    made._rebuild.join(30)
    assert made._placement.started == 2
    assert counted["draft_group_rebuilds"] == 1
    assert [str(error) for error in reported] == ["easyspec asks for 1 free CPUs"]
    assert made._executor.cache._texts == {}
    again = made.propose(step)
    assert np.array_equal(again.tokens, first.tokens)


def test_attempts_are_bounded_and_the_end_is_said_once(drafter):
    made, reported, counted = drafter
    step = texts_of([20, 30], made)
    made._placement = Lost(PLAN, False, False, False)
    broken(made)
    with pytest.raises(RuntimeError):
        made.propose(step)
    made._rebuild.join(30)
    for _ in range(3):
        assert made.propose(step).counts.tolist() == [0, 0]
    assert made._placement.started == 3
    assert made._placement.closed == 1
    assert isinstance(reported[-1], easyspec.DraftGroupLost)
    assert "3 attempts to start new ones failed" in str(reported[-1])
    assert len(reported) == 4
    assert counted["draft_group_rebuilds"] == 0


def test_a_group_that_breaks_again_and_again_is_given_up(drafter, monkeypatch):
    made, _, counted = drafter
    step = texts_of([20, 30], made)
    made._placement = Lost(PLAN, *[True] * 9)
    for _ in range(3):
        broken(made)
        with pytest.raises(RuntimeError):
            made.propose(step)
        made._rebuild.join(30)
    assert not made._given_up
    # One that was well for long is started as if it were the first.
    monkeypatch.setattr(easyspec, "WELL_SECONDS", -1)
    broken(made)
    with pytest.raises(RuntimeError):
        made.propose(step)
    made._rebuild.join(30)
    assert not made._given_up
    monkeypatch.setattr(easyspec, "WELL_SECONDS", 600)
    for _ in range(3):
        broken(made)
        with pytest.raises(RuntimeError):
            made.propose(step)
        made._rebuild.join(30)
    assert made._given_up
    assert made._placement.started == 6
    assert counted["draft_group_rebuilds"] == 6


def test_a_wait_that_had_to_be_ended_costs_the_drafts(drafter):
    """On a device nothing fails by itself: what was computed is worth nothing."""
    made, _, counted = drafter
    step = texts_of([20, 30], made)
    made._placement = Lost(PLAN, True)

    def check():
        raise RuntimeError("a shard of the draft did not answer")

    made._placement.group.check = check
    with pytest.raises(RuntimeError, match="did not answer"):
        made.propose(step)
    made._rebuild.join(30)
    assert counted["draft_group_rebuilds"] == 1


def test_closing_ends_the_wait_for_another_attempt(drafter, monkeypatch):
    made, _, _ = drafter
    monkeypatch.setattr(easyspec, "RETRY_SECONDS", (3600,))
    made._placement = Lost(PLAN, False)
    broken(made)
    with pytest.raises(RuntimeError):
        made.propose(texts_of([20], made))
    made.close()
    assert not made._rebuild.is_alive()


def test_what_kind_of_draft_it_is_is_in_a_json_config(draft):
    """Keys of the method survive JSON, as users write them."""
    keys = {"method": "easyspec", "model": draft, "shards": 1, "group_size": 2}
    assert parse(json.loads(json.dumps(keys))).placement == "auto"
