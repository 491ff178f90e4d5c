"""Faults of drafting: logged by kind, and never the engine's."""

from __future__ import annotations

import logging

import pytest
import torch

from vllm_specplus.engine import faults
from vllm_specplus.engine.drafter import Drafter
from vllm_specplus.engine.faults import FaultLog
from vllm_specplus.metrics import Counters

logger = logging.getLogger("tests.faults")


def raised(error: Exception) -> Exception:
    with pytest.raises(type(error)) as info:
        raise error
    return info.value


def raised_elsewhere(error: Exception) -> Exception:
    with pytest.raises(type(error)) as info:
        raise error
    return info.value


@pytest.fixture
def clock():
    return [0.0]


@pytest.fixture
def log(clock, caplog):
    caplog.set_level(logging.WARNING, logger.name)
    return FaultLog(logger, "suffix_tree", lambda: clock[0])


def test_a_harmless_fault_does_not_hide_another(log, caplog):
    log(raised(KeyError("a")))
    log(raised(RuntimeError("lost device")))
    log(raised_elsewhere(KeyError("a")))
    assert [record.exc_info[0] for record in caplog.records] == [KeyError, RuntimeError, KeyError]
    assert "drafting with suffix_tree failed" in caplog.text


def test_a_kind_is_logged_once_in_an_interval_and_counted(log, clock, caplog):
    for _ in range(5):
        log(raised(KeyError("a")))
    assert len(caplog.records) == 1
    clock[0] = faults.INTERVAL_S
    log(raised(KeyError("b")))
    assert len(caplog.records) == 2
    assert "(4 more since the last warning of this kind)" in caplog.records[1].getMessage()
    clock[0] *= 2
    log(raised(KeyError("c")))
    assert "more since" not in caplog.records[2].getMessage()


def test_kinds_are_bounded(log, caplog):
    for number in range(2 * faults.MOST_KINDS):
        log(type(f"Fault{number}", (Exception,), {})("new"))
    assert len(caplog.records) == 2 * faults.MOST_KINDS
    assert len(log._kinds) == faults.MOST_KINDS


class Part:
    def __init__(self, error: Exception | None = None):
        self.error, self.forgotten = error, []

    def forget(self, request_id: str) -> None:
        self.forgotten.append(request_id)
        if self.error is not None:
            raise self.error


def test_a_fault_in_forgetting_ends_nothing(log):
    """vLLM tells of finished requests in the middle of a step: what is raised there ends it."""
    drafter = object.__new__(Drafter)
    drafter._first_rank, drafter._log_fault = True, log
    drafter.counters = Counters()
    drafter.proposer, drafter.controller = Part(KeyError("request")), Part()
    drafter.forget("request")
    assert drafter.proposer.forgotten == drafter.controller.forgotten == ["request"]
    assert drafter.counters["draft_failures"] == 1


def test_a_fault_in_looking_at_a_step_costs_drafts(log):
    """What a proposer is shown takes memory too, before it is asked."""
    drafter = object.__new__(Drafter)
    drafter._log_fault, drafter.counters, drafter.proposer = log, Counters(), Part()

    def look():
        raise torch.OutOfMemoryError("no memory for the context")

    assert drafter.draft(3, look).counts.tolist() == [0, 0, 0]
    drafter.observe_prompt(look)
    assert drafter.counters["draft_failures"] == 2
