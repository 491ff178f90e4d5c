"""vLLM's metadata of a batch, divided between our attention and the stock kernels."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_specplus.engine import tree_metadata
from vllm_specplus.engine.batch import BatchView, describe
from vllm_specplus.engine.tree_metadata import Others, StepTrees
from vllm_specplus.engine.uploads import pack, upload
from vllm_specplus.engine.v1 import V1Batch
from vllm_specplus.tree import DraftTokens


def make_common(**more) -> CommonAttentionMetadata:
    """Three requests with 2, 3 and 1 rows."""
    starts = torch.tensor([0, 2, 5, 6], dtype=torch.int32)
    lengths = torch.tensor([12, 23, 31], dtype=torch.int32)
    values = {
        "query_start_loc": starts,
        "query_start_loc_cpu": starts,
        "seq_lens": lengths,
        "seq_lens_cpu_upper_bound": lengths,
        "num_reqs": 3,
        "num_actual_tokens": 6,
        "max_query_len": 3,
        "max_seq_len": 31,
        "block_table_tensor": torch.arange(12, dtype=torch.int32).view(3, 4),
        "slot_mapping": torch.arange(100, 106),
        "positions": torch.arange(6) * 7,
        "is_prefilling": torch.tensor([False, True, False]),
    }
    return CommonAttentionMetadata(**values | more)


def others(*chosen: bool) -> Others:
    return Others.of(np.array(chosen), np.array([2, 3, 1], np.int32))


def subset(common: CommonAttentionMetadata, which: Others) -> CommonAttentionMetadata:
    uploaded = upload(which.arrays(), torch.device("cpu"))
    return tree_metadata.subset(common, which, uploaded)


def test_a_subset_is_the_metadata_of_its_requests():
    part = subset(make_common(), others(False, True, True))
    assert part.query_start_loc.tolist() == part.query_start_loc_cpu.tolist() == [0, 3, 4]
    assert (part.num_reqs, part.num_actual_tokens) == (2, 4)
    assert (part.max_query_len, part.max_seq_len) == (3, 31)
    assert part.seq_lens.tolist() == part.seq_lens_cpu_upper_bound.tolist() == [23, 31]
    assert part.block_table_tensor.tolist() == [[4, 5, 6, 7], [8, 9, 10, 11]]
    assert part.slot_mapping.tolist() == [102, 103, 104, 105]
    assert part.positions.tolist() == [14, 21, 28, 35]
    assert part.is_prefilling.tolist() == [True, False]
    assert part.causal is True


def test_pictures_stay_with_their_request():
    """Ranges that see each other are kept by a request's number in the batch, which changes."""
    ranges = {0: [(0, 4)], 1: [(7, 9), (11, 12)], 2: []}
    part = subset(make_common(mm_req_doc_ranges=ranges), others(False, True, True))
    assert part.mm_req_doc_ranges == {0: [(7, 9), (11, 12)], 1: []}
    assert subset(make_common(), others(True, False, True)).mm_req_doc_ranges is None


def test_arrays_per_request_on_the_host_too():
    part = subset(
        make_common(
            req_idx=np.array([4, 5, 6]), rswa_prefix_lens=torch.tensor([1, 2, 3], dtype=torch.int32)
        ),
        others(True, False, True),
    )
    assert part.req_idx.tolist() == [4, 6]
    assert part.rswa_prefix_lens.tolist() == [1, 3]


def test_every_field_of_this_vllm_is_known(monkeypatch):
    """A field nobody has thought of must end the start, not be copied from another request."""
    assert tree_metadata.unknown_fields() == []
    monkeypatch.setattr(tree_metadata, "PER_REQUEST", tree_metadata.PER_REQUEST - {"req_idx"})
    assert tree_metadata.unknown_fields() == ["req_idx"]


def test_unknown_metadata_ends_the_start(monkeypatch):
    tree_metadata.check_groups([SimpleNamespace(kernel_block_size=None)])
    with pytest.raises(ValueError, match="set --block-size to 16"):
        tree_metadata.check_groups([SimpleNamespace(kernel_block_size=16)])
    monkeypatch.setattr(tree_metadata, "unknown_fields", lambda: ["tenants"])
    with pytest.raises(ValueError, match=r"does not know \(tenants\)"):
        tree_metadata.check_groups([])


def make_runner(mrope: bool) -> SimpleNamespace:
    return SimpleNamespace(
        device=torch.device("cpu"),
        positions=torch.arange(8),
        uses_mrope=mrope,
        mrope_positions=SimpleNamespace(gpu=torch.arange(8).expand(3, 8).clone()),
    )


def test_positions_of_three_axes_follow_depth():
    """M-RoPE has a position of time, height and width for every row: all three shift."""
    runner = make_runner(mrope=True)
    V1Batch(runner).shift_positions(torch.tensor([2, 5]), torch.tensor([-1, -3]))
    assert runner.positions.tolist() == [0, 1, 1, 3, 4, 2, 6, 7]
    assert runner.mrope_positions.gpu.tolist() == [[0, 1, 1, 3, 4, 2, 6, 7]] * 3


def test_positions_of_one_axis():
    runner = make_runner(mrope=False)
    V1Batch(runner).shift_positions(torch.tensor([7]), torch.tensor([-2]))
    assert runner.positions.tolist() == [0, 1, 2, 3, 4, 5, 6, 5]
    assert runner.mrope_positions.gpu.tolist() == [list(range(8))] * 3


def make_step():
    """A prompt of 3 rows, a tree of 4 and a single row, in this order."""
    view = BatchView(
        request_ids=["prompt", "tree", "plain"],
        drafts=[(), DraftTokens([7, 8, 9], np.array([-1, -1, 0], np.int32)), ()],
        num_scheduled=np.array([3, 4, 1], np.int32),
        num_computed=np.array([0, 10, 20], np.int32),
        token_ids=np.zeros((3, 32), np.int32),
        input_ids=np.zeros(8, np.int32),
    )
    return describe(view, np.array([2, 3, 4, 5, 6, 7]), serves_chains=False)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_step_is_uploaded_at_once_for_all_groups(device):
    """Whatever is in the step and however many groups of layers there are: one transfer of what
    the device's kernels read, and nothing else."""
    uploads = []

    def count(arrays):
        uploads.append(pack(arrays).nbytes)
        return upload(arrays, torch.device("cpu"))

    trees, rows = StepTrees.send(make_step(), count, device)
    assert rows.tolist() == [2, 3, 4, 5, 6, 7]
    common = make_common(
        seq_lens=torch.tensor([3, 14, 21]), seq_lens_cpu_upper_bound=torch.tensor([3, 14, 21]),
        slot_mapping=torch.arange(8), positions=torch.arange(8),
    )  # fmt: skip
    backend = SimpleNamespace(divides_metadata=True)
    group = SimpleNamespace(build_metadata=lambda common, _: common, backend=backend)
    for _ in range(2):
        found = tree_metadata.tree_metadata(trees, common, group)
        assert found.rows.tolist() == [3, 4, 5, 6]
        assert found.other_rows.tolist() == [0, 1, 2, 7]
        assert found.block_table.tolist() == [[4, 5, 6, 7]]
        assert found.other.query_start_loc.tolist() == [0, 3, 4]
        assert (found.max_rows, found.max_context_len) == (4, 10)
        assert (found.parents is None) == (found.ancestors is not None) == (device == "cuda")
    assert trees.uploaded["shifts"].tolist() == [0, 0, -1, -1]
    assert len(uploads) == 1
    assert uploads[0] < 320  # bytes, of 9 or 10 arrays
