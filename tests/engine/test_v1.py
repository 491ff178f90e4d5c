"""What is read off the V1 runner, and written to it."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from vllm_specplus.engine.v1 import V1Batch


def test_profiled_rows_hold_different_tokens():
    """A mixture of experts is asked for all its experts by them, as by texts."""
    ids = torch.zeros(64, dtype=torch.int32)
    batch = V1Batch(SimpleNamespace(input_ids=SimpleNamespace(gpu=ids)))
    batch.mix_tokens(48, 1000)
    assert len(ids[:48].unique()) > 40
    assert 0 <= ids.min() <= ids.max() < 1000
    assert (ids[48:] == 0).all()
    again = ids.clone()
    batch.mix_tokens(48, 1000)  # the same on every rank
    assert torch.equal(ids, again)
