"""A step's attention metadata: trees for our kernels, stock metadata for the other requests."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_specplus.engine.attention.base import TreeAttentionMetadata
from vllm_specplus.engine.batch import Step, TreeBatch, offsets, tree_batch
from vllm_specplus.engine.uploads import Arrays

if TYPE_CHECKING:
    from vllm.v1.worker.utils import AttentionGroup

#: As :func:`vllm_specplus.engine.uploads.upload`, to the device of the model.
Upload = Callable[[Arrays], dict[str, torch.Tensor]]

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

    def arrays(self) -> dict[str, np.ndarray]:
        """What the device needs of them."""
        return {
            "other_requests": self.requests,
            "other_rows": self.rows,
            "other_starts": offsets(self.lengths),
        }


@dataclass(frozen=True, slots=True)
class StepTrees:
    """The trees of a step, and its other requests, on the host and on the device: uploaded once,
    for all groups of layers."""

    batch: TreeBatch
    others: Others | None
    """None: all requests are ``batch``'s."""
    uploaded: dict[str, torch.Tensor]

    @classmethod
    def send(cls, step: Step, upload: Upload, device: str) -> tuple[StepTrees | None, torch.Tensor]:
        """Uploads what ``step`` needs where the model is, a ``device`` of that type: its trees,
        None if our attention serves none of its requests; and int64 [L] its ``batch_rows``."""
        arrays = {"batch_rows": step.batch_rows}
        if not step.tree_attention.any():
            return None, upload(arrays)["batch_rows"]
        batch, others = tree_batch(step), None
        arrays |= {
            "requests": batch.requests,
            "rows": batch.rows,
            "query_start_loc": batch.query_start_loc,
            "context_lens": batch.context_lens,
            "shifts": batch.shifts,
            "depths": batch.depths,
        }
        if device == "cpu":
            arrays["parents"] = batch.parents
        else:
            arrays["ancestors"] = batch.ancestors()
        if len(batch.requests) < len(step.tree_attention):
            others = Others.of(~step.tree_attention, step.num_scheduled)
            arrays |= others.arrays()
        uploaded = upload(arrays)
        return cls(batch, others, uploaded), uploaded["batch_rows"]


def subset(
    common: CommonAttentionMetadata, others: Others, uploaded: dict[str, torch.Tensor]
) -> CommonAttentionMetadata:
    """vLLM's metadata of a batch, for some of its requests alone; ``uploaded`` are at least the
    ``arrays`` of ``others``."""
    host, index = torch.from_numpy(others.requests), uploaded["other_requests"]
    rows, starts = uploaded["other_rows"], offsets(others.lengths)
    seq_lens = common.seq_lens_cpu_upper_bound[host]
    values = {
        "query_start_loc": uploaded["other_starts"],
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
    trees: StepTrees, common: CommonAttentionMetadata, group: AttentionGroup
) -> TreeAttentionMetadata:
    """What our attention needs for a step's trees, with stock metadata of the others."""
    uploaded, other = trees.uploaded, None
    if trees.others is not None and group.backend.divides_metadata:
        other = group.build_metadata(subset(common, trees.others, uploaded), 0)
    return TreeAttentionMetadata(
        rows=uploaded["rows"],
        query_start_loc=uploaded["query_start_loc"],
        context_lens=uploaded["context_lens"],
        block_table=common.block_table_tensor[uploaded["requests"]].contiguous(),
        parents=uploaded.get("parents"),
        depths=uploaded["depths"],
        ancestors=uploaded.get("ancestors"),
        max_rows=trees.batch.max_rows,
        max_context_len=int(trees.batch.context_lens.max()),
        other_rows=uploaded.get("other_rows"),
        other=other,
    )
