"""What our back ends of multi-head latent attention (MLA) share.

"DeepSeek-V2" (arXiv 2405.04434): of a token the cache holds one *latent*, for all heads: a row
whose first ``kv_lora_rank`` elements are what keys and values are projected from, and a rotary part
of the keys behind them. vLLM's layer absorbs the projections into queries and outputs of requests
that decode, and calls ``forward_mqa`` for their rows, which come first in the batch; prompts are
projected and go through ``forward_mha``. Requests with drafts decode, so that trees concern the
first only: their rows are taken out of it, whereas all other rows stay with the stock kernel, each
as a request of its own that ends with it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from vllm.model_executor.layers.attention.mla_attention import QueryLenSupport

from vllm_specplus.capabilities import Need
from vllm_specplus.engine.attention.base import TreePath, tree_metadata

#: What is served with latents: no option of theirs is.
SUPPORTS = frozenset((Need.LATENT_ATTENTION,))


class RowsAsRequests:
    """Mixin before a stock metadata builder: requests with drafts decode, whatever their number,
    and the stock kernel, which has one row per request, is told of every row."""

    query_len_support: ClassVar[QueryLenSupport] = QueryLenSupport.VARLEN

    def _build_decode(
        self, block_table_tensor, seq_lens_device, max_seq_len, query_start_loc_cpu,
        query_start_loc_device, num_decode_tokens, *args, **kwargs,
    ):  # fmt: skip
        """Build the metadata of the requests that decode, R of them with ``num_decode_tokens``
        rows in all, as of so many requests."""
        requests = len(seq_lens_device)
        if num_decode_tokens > requests:
            starts = query_start_loc_device.to(torch.int64)
            of_row = torch.repeat_interleave(
                torch.arange(requests, device=starts.device),
                starts.diff(),
                output_size=num_decode_tokens,
            )
            # The last row of a request sees all of it, those before one token less each.
            after = starts[1:][of_row] - 1 - torch.arange(num_decode_tokens, device=starts.device)
            seq_lens_device = seq_lens_device[of_row] - after.to(seq_lens_device.dtype)
            block_table_tensor = block_table_tensor[of_row]
        return super()._build_decode(
            block_table_tensor, seq_lens_device, max_seq_len, query_start_loc_cpu,
            query_start_loc_device, num_decode_tokens, *args, **kwargs,
        )  # fmt: skip


class LatentTreeAttention(TreePath):
    """Of latents: attends to the tree rows of a batch apart."""

    supports = SUPPORTS

    def forward_mqa(self, q, kv_c_and_k_pe_cache, attn_metadata, layer):
        """Attend as in the stock implementation: ``q`` [n, H, D], or its two parts, of n rows that
        decode; the cache [pages, block_size, D]; returns [n, H, kv_lora_rank] and None."""
        tree = tree_metadata(attn_metadata)
        if tree is None:
            return super().forward_mqa(q, kv_c_and_k_pe_cache, attn_metadata, layer)
        if isinstance(q, tuple):
            q = torch.cat(q, dim=-1)
        output = q.new_empty(*q.shape[:2], self.kv_lora_rank)
        if len(q) > len(tree.rows):
            # Rows that decode come first, and those of trees are among them.
            others = tree.other_rows[: len(q) - len(tree.rows)]
            decode = attn_metadata.decode
            alone = replace(
                attn_metadata,
                decode=replace(
                    decode,
                    block_table=decode.block_table[others],
                    seq_lens=decode.seq_lens[others],
                ),
            )
            output[others], _ = super().forward_mqa(q[others], kv_c_and_k_pe_cache, alone, layer)
        self._tree_forward(layer, q, kv_c_and_k_pe_cache, tree, output)
        return output, None
