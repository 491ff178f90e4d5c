"""What a tree-attention implementation needs to know about one step.

Every backend in this folder subclasses a stock vLLM backend, overrides nothing
but ``get_impl_cls`` and, in the implementation's ``forward``, calls the stock
kernel unless a :class:`TreeAttentionMetadata` is attached to the metadata.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

#: Attribute of a stock attention-metadata object that carries the tree batch.
TREE_ATTRIBUTE = "specplus_tree"


@dataclass(slots=True)
class TreeAttentionMetadata:
    """The draft trees of one batch, for all attention layers of one step.

    A *tree row* is one query row of a request that verifies a draft tree: row 0
    of the request is its root (the last sampled token), the others are the
    nodes in topological order. K and V of all rows are already in the paged
    cache, at the consecutive slots ``context_len + row``; only the *visibility*
    differs from causal attention: a row sees the whole context and, of its own
    request's rows, itself and its ancestors.

    Shapes: ``R`` tree requests, ``T`` tree rows in all, ``N`` the largest
    number of rows of one request.
    """

    rows: torch.Tensor
    """int64 [T] on the device: index of each tree row among the batch's rows;
    request by request, rows of one request consecutive."""
    query_start_loc: torch.Tensor
    """int32 [R + 1] on the device: offsets of the requests in ``rows``."""
    context_lens: torch.Tensor
    """int32 [R] on the device: tokens in the cache before the root."""
    block_table: torch.Tensor
    """int32 [R, max_blocks] on the device: KV cache pages of each request."""
    parents: torch.Tensor
    """int32 [T] on the device: row of the parent within the request; -1 for roots."""
    ancestors: torch.Tensor | None
    """bool [T, N] on the device: may row i see row j of its request
    (ancestor-or-self). None on CPU, whose kernel climbs ``parents``."""
    max_rows: int
    """N."""
    max_context_len: int
    other_rows: torch.Tensor | None
    """int64 on the device: the batch's other rows (prefill, plain decode,
    chains), or None when every request has a tree."""
    other: Any | None
    """Stock metadata of the other requests, in the order of ``other_rows``."""
    first: torch.Tensor | None = None
    """int32 [R] on the device: the first visible token of the cache, None: all are."""


class PictureAttention:
    """Mixin before an implementation with trees, of the branch that does not see the prompt.

    The rows of a picture see the picture, and what its text without a prompt begins with; they are
    the "tree rows" here, a "request" being one picture in one request. Any other row sees itself
    alone: its output is its value.
    """

    def forward(
        self, layer, query, key, value, kv_cache, attn_metadata, output,
        output_scale=None, output_block_scale=None,
    ):  # fmt: skip
        pictures = tree_metadata(attn_metadata)
        if pictures is None:  # the model is being warmed up
            return output.zero_()
        if pictures.other_rows is not None:
            own = value[pictures.other_rows].repeat_interleave(self.num_queries_per_kv, 1)
            output.index_copy_(0, pictures.other_rows, own)
        if pictures.max_rows:
            self._tree_forward(layer, query, kv_cache, pictures, output)
        return output


def tree_metadata(attn_metadata: Any) -> TreeAttentionMetadata | None:
    """The tree batch attached to ``attn_metadata``, or None for ordinary steps."""
    return getattr(attn_metadata, TREE_ATTRIBUTE, None)
