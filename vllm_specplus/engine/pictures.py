"""Pictures that are part of a text: where a step's rows are in them.

For models with a ``picture_layout`` (``image/chameleon.py``). The model is told which kind of token
may follow each row; the layers that do not see the prompt, where the picture of a row begins
(``attention/base.py``, ``PictureAttention``); and no draft begins a picture or leaves one, so that
both are known by a row's place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm_specplus.engine.attention.base import TreeAttentionMetadata
from vllm_specplus.engine.tree_metadata import Upload
from vllm_specplus.image.chameleon import NOTHING_KNOWN, Known
from vllm_specplus.step import Rows
from vllm_specplus.tree import DraftTokens, ancestor_mask, row_depths

if TYPE_CHECKING:
    from vllm.v1.attention.backend import CommonAttentionMetadata

    from vllm_specplus.engine.v1 import V1Batch
    from vllm_specplus.image.chameleon import Layout


class PictureRows:
    """The T token rows of the current step."""

    def __init__(self, layout: Layout, upload: Upload):
        self._layout, self._upload = layout, upload
        # Request -> version of its text, and what is known of it; of the requests of this step.
        self._known: dict[str, tuple[int, Known]] = {}

    def read(self, batch: V1Batch, num_scheduled: np.ndarray, rows: Rows) -> torch.Tensor:
        """Begin a step of R requests, ``num_scheduled`` int32 [R] rows of each, of which ``rows``
        are verified. Returns what may follow each, int64 [T] on the device."""
        computed = batch.num_computed.astype(np.int64)
        read, before, self._known = [], self._known, {}
        versions = batch.versions().tolist()
        for i, (first, count) in enumerate(zip(computed, num_scheduled, strict=True)):
            depths = rows.depths[rows.starts[i] + 1 : rows.starts[i + 1]]
            text = batch.texts[i, : first + count - len(depths)]
            name = batch.request_ids[i]
            version, known = before.get(name, (-1, NOTHING_KNOWN))
            if version != versions[i] or known.length > first:  # cut, or read again
                known = NOTHING_KNOWN
            *found, known = self._layout.read(text, int(first), depths, known)
            self._known[name] = versions[i], known
            read.append(found)
        # Where the picture begins that each row is in, -1 in no picture.
        self._begins, follows = (np.concatenate(each) for each in zip(*read, strict=True))
        self._request = np.repeat(np.arange(len(computed)), num_scheduled)
        # Of the rows' keys and values, in the cache of their request.
        ends = np.cumsum(num_scheduled)
        self._places = np.arange(ends[-1]) + (computed - (ends - num_scheduled))[self._request]
        return self._upload({"follows": follows})["follows"]

    def outside(self, batch_rows: np.ndarray) -> np.ndarray:
        """bool: which of these rows are in no picture."""
        return self._begins[batch_rows] < 0

    def attention(
        self, batch: V1Batch, common: CommonAttentionMetadata, num_scheduled: np.ndarray,
        rows: Rows, batch_rows: np.ndarray, device: str,
    ) -> TreeAttentionMetadata:  # fmt: skip
        """For layers that do not see the prompt; ``batch_rows`` int64 are the verified rows'."""
        block_size = batch.page_size
        inside = np.flatnonzero(self._begins >= 0)
        request, begins = self._request[inside], self._begins[inside]
        new = np.ones(len(inside), bool)
        new[1:] = (request[1:] != request[:-1]) | (begins[1:] != begins[:-1])
        heads = np.flatnonzero(new)
        starts = np.append(heads, len(inside)).astype(np.int32)
        counts = np.diff(starts)
        # A chain, unless all rows of the request are verified: they may be a tree.
        parents = np.zeros(len(self._begins), np.int32)
        parents[inside] = np.arange(len(inside)) - np.repeat(heads, counts) - 1
        verified = np.diff(rows.starts)
        alone = np.repeat(num_scheduled == verified, verified)
        parents[batch_rows[alone]] = rows.parents[alone]
        parents = parents[inside]
        contexts = self._places[inside[heads]]
        first = np.maximum(begins[heads] - self._layout.bare_begins_before, 0)
        # Whole blocks that are not seen are left out.
        skipped = first // block_size
        blocks = -(-(contexts + counts) // block_size) - skipped
        columns = skipped[:, None] + np.arange(blocks.max(initial=0))
        columns = np.minimum(columns, common.block_table_tensor.shape[1] - 1)
        contexts = (contexts - skipped * block_size).astype(np.int32)
        max_rows = int(counts.max(initial=0))
        arrays = {
            "request": request[heads][:, None],
            "columns": columns,
            "rows": inside,
            "query_start_loc": starts,
            "context_lens": contexts,
            "first": (first % block_size).astype(np.int32),
            "other_rows": np.flatnonzero(self._begins < 0),
        }
        if device == "cpu":
            arrays["parents"] = parents
        else:
            arrays["ancestors"] = ancestor_mask(parents, starts, max_rows)
        uploaded = self._upload(arrays)
        table = common.block_table_tensor[uploaded["request"], uploaded["columns"]]
        return TreeAttentionMetadata(
            rows=uploaded["rows"],
            query_start_loc=uploaded["query_start_loc"],
            context_lens=uploaded["context_lens"],
            block_table=table,
            parents=uploaded.get("parents"),
            ancestors=uploaded.get("ancestors"),
            max_rows=max_rows,
            max_context_len=int(contexts.max(initial=0)),
            other_rows=uploaded["other_rows"] if len(arrays["other_rows"]) else None,
            other=None,
            first=uploaded["first"],
        )

    def cut(self, drafts: list[DraftTokens], batch: V1Batch) -> list[DraftTokens]:
        """Each as far as none of its tokens begins a picture or leaves one."""
        out = []
        for i, draft in enumerate(drafts):
            if draft:
                parents = draft.parents
                if parents is None:
                    parents = np.arange(-1, len(draft) - 1, dtype=np.int32)
                rows = np.append(np.int32(-1), parents + 1)
                depths = row_depths(rows, np.array((0, len(rows)), np.int32))[1:]
                text = batch.texts[i, : batch.num_tokens[i]]
                # Since the step has read it, the text has gained a token at least.
                _, known = self._known[batch.request_ids[i]]
                draft = draft[: self._layout.kept(text, np.array(draft), depths, known)]
            out.append(draft)
        return out
