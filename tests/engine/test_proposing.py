"""What a proposer is shown of a step."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.sampling_params import SamplingParams, StructuredOutputsParams

from tests.samplers.test_relaxed import make_rows
from vllm_specplus.engine import proposing
from vllm_specplus.engine.proposing import Proposing
from vllm_specplus.metrics import Counters
from vllm_specplus.step import Acceptance


def shown(*params: SamplingParams):
    """The observation of two requests: a root and its child each."""
    rows = make_rows([5, 6, 7, 8], [-1, 0, -1, 0], [0, 2, 4])
    path = np.array([[0, 1], [0, 1]], np.int32)
    step = SimpleNamespace(
        rows=rows, previous=np.array([3, 5, 3, 7], np.int32),
        top_ids=np.arange(8, dtype=np.int32).reshape(4, 2), target_probs=None,
        acceptance=Acceptance(path, np.full(2, 2, np.int32), path),
        num_computed=np.full(2, 9), num_scheduled=np.full(2, 2), batch_rows=np.arange(4),
    )  # fmt: skip
    known = np.full(2, 12, np.int32)
    batch = SimpleNamespace(
        request_ids=["a", "b"], texts=np.zeros((2, 64), np.int32), num_tokens=known,
        num_prompt=np.full(2, 8, np.int32), params=lambda name: params["ab".index(name)],
        sampling=lambda seeds: None, versions=lambda: np.zeros(2, np.int64),
        adapter=lambda name: "",
    )  # fmt: skip
    drafter = SimpleNamespace(counters=Counters(), forget=lambda name: None)
    context = Proposing(drafter, batch, 8, 64)._context(step, np.ones(2, bool))
    return context.observation


def test_nobody_learns_from_logits_behind_a_grammar():
    """Where a mask has been, the most probable tokens are those that it left."""
    free = SamplingParams()
    bound = SamplingParams(structured_outputs=StructuredOutputsParams(choice=["yes", "no"]))
    assert shown(free, free).tokens.tolist() == [5, 6, 7, 8]
    assert shown(free, bound).tokens.tolist() == [5, 6, -1, -1]


@pytest.mark.parametrize(("max_rows", "sizes"), [(4000, [256, 44]), (100, [100, 100, 100])])
def test_prompts_are_shown_in_parts_that_the_budget_of_memory_holds(monkeypatch, max_rows, sizes):
    """A row of theirs has logits, as one of a draft has: of a prompt of 300 tokens and its last."""
    monkeypatch.setattr(proposing, "get_tensor_model_parallel_rank", lambda: 0)
    made, seen = [], []

    def logits(request: int, rows: torch.Tensor) -> torch.Tensor:
        made.append(len(rows))
        return torch.zeros(len(rows), 32)

    params = SamplingParams()
    text = np.arange(320, dtype=np.int32)[None]
    batch = SimpleNamespace(
        request_ids=["a"], texts=text, logits=logits, params=lambda name: params,
        adapter=lambda name: "",
    )  # fmt: skip
    drafter = SimpleNamespace(
        counters=Counters(), controller=SimpleNamespace(max_rows=max_rows),
        proposer=SimpleNamespace(reads_prompt=True, top_k=2),
        observe_prompt=lambda look: seen.append(look()),
    )  # fmt: skip
    rows = make_rows([300], [-1], [0, 1])
    step = SimpleNamespace(
        rows=rows, num_scheduled=np.array([301]), num_computed=np.array([0]),
        shape=SimpleNamespace(prompt_rows=300),
    )  # fmt: skip
    Proposing(drafter, batch, 8, 512).show_prompt(step, torch.zeros(301, 8))
    assert made == sizes
    assert np.concatenate([each.tokens for each in seen]).tolist() == list(range(300))
