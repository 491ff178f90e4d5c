"""Streaming input: a request that goes on after a turn, with other parameters."""

from __future__ import annotations

import numpy as np
import pytest

from tests.engine import harness

pytestmark = pytest.mark.engine
#: Within one process vLLM's scheduler and runner share the prompts' lists, and both extend them.
APART = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
GREEDY = {"temperature": 0, "max_tokens": 24, "ignore_eos": True, "detokenize": False}
OFF = {"extra_args": {"specplus": {"enabled": False}}}


@pytest.fixture(scope="module")
def sessions() -> list:
    """Two sessions of three turns; in the second nothing is to be drafted."""
    rng = np.random.default_rng(9)
    turns = [(40, {}), (5, OFF), (60, {})]
    return [
        [[rng.integers(3, 512, size).tolist(), GREEDY | more] for size, more in turns]
        for _ in range(2)
    ]


@pytest.fixture(scope="module")
def plain_turns(tmp_path_factory, tiny_engine, sessions) -> list:
    folder = tmp_path_factory.mktemp("sessions")
    (result,) = harness.run(folder, tiny_engine, [{"sessions": sessions}], env=APART)["batches"]
    return result["ids"]


def test_turns_are_those_of_plain_decoding(
    tmp_path, tiny_engine, tiny_model, sessions, plain_turns
):
    """The target drafts for itself, so that ``max_tokens`` falls inside an accepted draft."""
    spec = {
        "method": "draft_tree", "model": tiny_model, "shape": "chain", "num_speculative_tokens": 6,
        "control": {"policy": "fixed"},
    }  # fmt: skip
    engine = tiny_engine | {"speculative_config": spec}
    result = harness.run(tmp_path, engine, [{"sessions": sessions}], env=APART)
    (served,) = result["batches"]
    assert served["ids"] == plain_turns
    assert served["nodes"][0] > 0
    assert served["nodes"][1] == 0  # its own controls, not those of the first turn
    assert served["nodes"][2] > 0
    assert result["counters"]["draft_failures"] == 0


@pytest.mark.full("vllm_specplus/engine/scheduler.py")  # it is about vLLM's own method
def test_vllms_own_draft_goes_on_behind_what_was_cut_away(
    tmp_path, tiny_engine, tiny_model, sessions, plain_turns
):
    """What the test above would see without our scheduler's part in it."""
    spec = {"method": "draft_model", "model": tiny_model, "num_speculative_tokens": 6}
    plain = [[[ids, GREEDY] for ids, _ in turns] for turns in sessions]
    engine = tiny_engine | {"speculative_config": spec}
    (served,) = harness.run(tmp_path, engine, [{"sessions": plain}], env=APART)["batches"]
    assert [turns[0] for turns in served["ids"]] == [turns[0] for turns in plain_turns]
    assert served["ids"] != plain_turns


def test_turns_of_several_salts(tmp_path, tiny_engine, sessions, plain_turns):
    """Salts that change within a session."""
    salted = [
        [[ids, fields | {"extra_args": {"specplus": {"cache_salt": f"{s} {t // 2}"}}}]
         for t, (ids, fields) in enumerate(turns)]
        for s, turns in enumerate(sessions)
    ]  # fmt: skip
    spec = {
        "method": "suffix_tree", "max_memory_mb": 1, "num_speculative_tokens": 4,
        "control": {"policy": "fixed"},
    }  # fmt: skip
    engine = tiny_engine | {"speculative_config": spec}
    result = harness.run(tmp_path, engine, [{"sessions": salted}] * 2, env=APART)
    assert [served["ids"] for served in result["batches"]] == [plain_turns] * 2
    assert result["counters"]["draft_failures"] == 0
