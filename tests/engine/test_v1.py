"""What is read off the V1 runner, and written to it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
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


def table(pages: list[list[int]], block_size: int):
    array = np.array(pages, np.int32)
    return SimpleNamespace(
        block_size=block_size, block_table=SimpleNamespace(np=array),
        get_device_tensor=lambda count: torch.from_numpy(array[:count]),
    )  # fmt: skip


def test_groups_of_layers_have_slots_of_their_own():
    tables = [table([[3, 4], [5, 6], [0, 0]], 16), table([[0, 9], [7, 8], [0, 0]], 32)]
    runner = SimpleNamespace(
        input_batch=SimpleNamespace(block_table=tables), attn_groups=[["a", "b"], ["c"]]
    )
    batch, request, position = V1Batch(runner), np.array([0, 1]), np.array([20, 33])
    assert batch.slots(request, np.array([20, 3])).tolist() == [4 * 16 + 4, 5 * 16 + 3]
    assert batch.slots(request, position, 1).tolist() == [20, 8 * 32 + 1]
    common = SimpleNamespace(
        num_reqs=2, num_actual_tokens=3, block_table_tensor="of a and b", slot_mapping="theirs"
    )
    mappings = {0: torch.arange(4), 1: torch.arange(10, 14)}
    found = list(batch.groups(common, mappings))
    assert [group for group, _ in found] == ["a", "b", "c"]
    assert found[0][1] is found[1][1] is common
    assert found[2][1].block_table_tensor.tolist() == [[0, 9], [7, 8]]
    assert found[2][1].slot_mapping.tolist() == [10, 11, 12]
    assert common.slot_mapping == "theirs"
