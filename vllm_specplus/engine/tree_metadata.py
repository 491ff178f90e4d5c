"""A step's attention metadata: trees for our kernels, stock metadata for the other requests."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_specplus.engine.attention.base import TreeAttentionMetadata
from vllm_specplus.engine.batch import Step, offsets, tree_batch

if TYPE_CHECKING:
    from vllm.v1.worker.utils import AttentionGroup

ToDevice = Callable[[np.ndarray], torch.Tensor]

#: How the fields of vLLM's metadata of a whole batch become those of some of its requests.
#: A field that is not listed here, of a vLLM that we do not know, ends the start.
COMPUTED = {
    "query_start_loc", "query_start_loc_cpu", "num_reqs", "num_actual_tokens", "max_query_len",
    "max_seq_len",
}  # fmt: skip
PER_REQUEST = {
    "causal", "seq_lens", "block_table_tensor", "seq_lens_cpu_upper_bound", "is_prefilling",
    "req_idx", "encoder_seq_lens", "encoder_seq_lens_cpu", "dcp_local_seq_lens",
    "dcp_local_seq_lens_cpu_upper_bound", "rswa_prefix_lens", "replayssm_decode_base_cpu",
}  # fmt: skip
PER_ROW = {"slot_mapping", "positions"}
BY_REQUEST = {"mm_req_doc_ranges"}
#: Of the whole batch; the others are of features that are refused, and None.
COMMON = {"logits_indices_padded", "num_logits_indices", "max_logits_per_req"}
#: What vLLM derives from the others, and keeps.
CACHES = {"_num_computed_tokens_cache", "_token_to_req_indices_cache"}


def unknown_fields() -> list[str]:
    """Names of fields of this vLLM's metadata that we cannot divide among requests."""
    known = COMPUTED | PER_REQUEST | PER_ROW | BY_REQUEST | COMMON | CACHES
    return [each.name for each in fields(CommonAttentionMetadata) if each.name not in known]


def check_groups(groups: Iterable[AttentionGroup]) -> None:
    """Raise ValueError with one sentence if the metadata of these groups cannot be divided among
    requests, or addresses other blocks than the scheduler's."""
    if unknown := unknown_fields():
        raise ValueError(
            f"vLLM's attention metadata has fields that vllm-specplus does not know "
            f"({', '.join(unknown)}): use a vLLM of the supported range"
        )
    for group in groups:
        if group.kernel_block_size is not None:
            raise ValueError(
                f"the attention kernels use blocks of {group.kernel_block_size} tokens, and the KV "
                f"cache others, which vllm-specplus does not address: set --block-size to "
                f"{group.kernel_block_size}"
            )


@dataclass(frozen=True, slots=True)
class Others:
    """Some requests of a batch: which they are, and where their rows are."""

    requests: np.ndarray
    """int64 [B] ascending."""
    rows: np.ndarray
    """int64 [T'] their rows among the batch's, in order."""
    lengths: np.ndarray
    """int32 [B] rows of each."""

    @classmethod
    def of(cls, chosen: np.ndarray, num_scheduled: np.ndarray) -> Others:
        """Those that are ``chosen`` bool [R], of requests with ``num_scheduled`` int32 [R] rows."""
        requests = np.flatnonzero(chosen)
        rows = np.flatnonzero(np.repeat(chosen, num_scheduled))
        return cls(requests, rows, num_scheduled[requests])


def subset(
    common: CommonAttentionMetadata, others: Others, to_device: ToDevice
) -> CommonAttentionMetadata:
    """vLLM's metadata of a batch, for some of its requests alone."""
    starts = offsets(others.lengths)
    host, index = torch.from_numpy(others.requests), to_device(others.requests)
    rows = to_device(others.rows)
    seq_lens = common.seq_lens_cpu_upper_bound[host]
    values = {
        "query_start_loc": to_device(starts),
        "query_start_loc_cpu": torch.from_numpy(starts),
        "num_reqs": len(others.requests),
        "num_actual_tokens": int(starts[-1]),
        "max_query_len": int(others.lengths.max()),
        "max_seq_len": int(seq_lens.max()),
    }
    for name in PER_REQUEST | PER_ROW:
        value = getattr(common, name, None)
        if isinstance(value, np.ndarray):
            value = value[others.requests]
        elif isinstance(value, torch.Tensor):  # else one for all, or None
            on_host = value.device.type == "cpu"
            at = rows if name in PER_ROW else host if on_host else index
            value = value[at]
        values[name] = value
    ranges = common.mm_req_doc_ranges
    if ranges is not None:
        ranges = {i: ranges.get(r, []) for i, r in enumerate(others.requests.tolist())}
    values["mm_req_doc_ranges"] = ranges
    known = {each.name for each in fields(CommonAttentionMetadata)}
    for name in COMMON & known:
        values[name] = getattr(common, name)
    return CommonAttentionMetadata(**{k: v for k, v in values.items() if k in known})


def tree_metadata(
    step: Step, common: CommonAttentionMetadata, group: AttentionGroup, to_device: ToDevice
) -> TreeAttentionMetadata:
    """What our attention needs for the trees of ``step``, with stock metadata of the others."""
    trees = tree_batch(step)
    other_rows = other = None
    if len(trees.requests) < len(step.tree_attention):
        others = Others.of(~step.tree_attention, step.num_scheduled)
        other_rows = to_device(others.rows)
        other = group.build_metadata(subset(common, others, to_device), 0)
    on_device = common.seq_lens.device.type != "cpu"
    return TreeAttentionMetadata(
        rows=to_device(trees.rows),
        query_start_loc=to_device(trees.query_start_loc),
        context_lens=to_device(trees.context_lens),
        block_table=common.block_table_tensor[to_device(trees.requests)].contiguous(),
        parents=to_device(trees.parents),
        ancestors=to_device(trees.ancestors()) if on_device else None,
        max_rows=trees.max_rows,
        max_context_len=int(trees.context_lens.max()),
        other_rows=other_rows,
        other=other,
    )
