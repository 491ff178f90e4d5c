"""Blocks behind many positions of texts in one pass: how DFlash (arXiv 2602.06036) is trained.

The block behind position ``n`` holds the token of ``n``, its *anchor*, and masks up to
``n + q - 1``; the mask at ``n + j`` is to predict the token there. A row sees what it would see if
it were served: the context that the head makes of the target's states *before* the anchor, and all
rows of its own block, before it and behind it. Of the text from the anchor on, and of other
blocks, it sees nothing. With all blocks of a text side by side that is a mask of the text's
columns, which end at each block's anchor, and a diagonal of blocks behind them.

``speculators`` trains by the same mask, with compiled FlexAttention and modules of its own; these
are the modules that are served (``drafting/block_heads.py``).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vllm_specplus.drafting.block_heads import BlockHead
from vllm_specplus.training.batch import Batch


def draw_anchors(learn: Tensor, share: float, most: int, rng: torch.Generator) -> Tensor:
    """int64 [B, A]: behind which positions of each text there are blocks, -1 where a text has fewer
    than others. Drawn without replacement from those of ``learn`` bool [B, n]: so large a ``share``
    of them, rounded up, and at most so many."""
    order = torch.rand(learn.shape, generator=rng, device=learn.device)
    counts = (learn.sum(1) * share).ceil().long().clamp(max=most)
    return _first(order.masked_fill(~learn, -1.0).argsort(1, descending=True), counts)


def all_anchors(learn: Tensor) -> Tensor:
    """int64 [B, A]: all positions of ``learn`` bool [B, n] in ascending order, -1 behind them."""
    order = learn.long().argsort(dim=1, descending=True, stable=True)
    return _first(order, learn.sum(1))


def _first(order: Tensor, counts: Tensor) -> Tensor:
    """The first ``counts`` int64 [B] of each row of ``order`` [B, n], and -1 behind them."""
    width = max(int(counts.max()), 1)
    spare = torch.arange(width, device=order.device) >= counts[:, None]
    return order[:, :width].masked_fill(spare, -1)


def decay(depth: int, gamma: float) -> list[float]:
    """DFlash's weights of so many depths, 1 for the first: a token counts only where all before it
    are right."""
    return [math.exp(-each / gamma) for each in range(depth)]


class Lesson(NamedTuple):
    """Blocks of q rows, of which D = q - 1 predict, and what is to be learnt from them."""

    anchors: Tensor
    """int64 [B, A]; -1: no block."""
    tokens: Tensor
    """int64 [B, A, q] that the rows hold."""
    truth: Tensor
    """int64 [B, A, D] that are to be predicted, the text's; 0 behind its end."""
    learn: Tensor
    """bool [B, A, D]: does the prediction count?"""
    places: Tensor
    """int64 [B, A, D]: at which position the target makes the same prediction, counted over all
    texts; of use where ``learn`` is true."""

    @classmethod
    def of(cls, batch: Batch, anchors: Tensor, rows: int, mask_token: int) -> Lesson:
        """Of blocks of so many ``rows`` behind ``anchors`` int64 [B, A]."""
        texts, length = batch.tokens.shape
        own = torch.arange(rows, device=anchors.device)
        places = anchors.clamp(min=0)[..., None] + own
        truth = _at(batch.tokens, places)
        tokens = torch.full_like(truth, mask_token)
        tokens[..., 0] = truth[..., 0]
        before = places[..., :-1]
        learn = _at(batch.learn, before) & (anchors >= 0)[..., None]
        of_text = length * torch.arange(texts, device=anchors.device)
        return cls(anchors, tokens, truth[..., 1:], learn, before + of_text[:, None, None])


def _at(values: Tensor, places: Tensor) -> Tensor:
    """[B, A, q] of ``values`` [B, n] at ``places`` int64 [B, A, q], 0 behind the end."""
    behind = F.pad(values, (0, places.shape[-1]))
    return behind.gather(1, places.flatten(1)).view_as(places)


class _Context:
    """Keys and values of the texts, in front of those of their blocks."""

    def __init__(self, head: BlockHead, states: Tensor):
        texts, length, _ = states.shape
        positions = torch.arange(length, device=states.device).repeat(texts)
        self._layers = [
            [each.unflatten(0, (texts, length)).transpose(1, 2) for each in both]
            for both in head.context(states.flatten(0, 1), positions)
        ]

    def update(self, keys: Tensor, values: Tensor, layer: int, *_, **__) -> tuple[Tensor, Tensor]:
        """Those of the context and of the blocks, [B, kv_heads, n + A q, head_dim]. (The call that
        transformers' attention makes.)"""
        before = self._layers[layer]
        return torch.cat((before[0], keys), 2), torch.cat((before[1], values), 2)


class Blocks:
    """Passes of ``head`` over blocks of a batch of texts, padded on the right."""

    def __init__(self, head: BlockHead, states: Tensor):
        """``states`` [B, n, states * target_hidden]: what the target computed of the texts."""
        self._head, self._length = head, states.shape[1]
        self._context = _Context(head, states)

    def rows(self, anchors: Tensor, embedded: Tensor) -> Tensor:
        """Behind the last norm, [B, A, D, hidden] of the rows that predict.

        ``anchors`` int64 [B, A], below 0 where there is no block; ``embedded`` float32
        [B, A, q, hidden] the rows' inputs.
        """
        parts, (_, blocks, width, _) = self._head.parts, embedded.shape
        hidden = embedded.flatten(1, 2)
        own = torch.arange(width, device=anchors.device)
        rotary = self._head.rotary((anchors.clamp(min=0)[..., None] + own).flatten(1))
        sees = self._sees(anchors, width)
        for layer in parts["layers"]:
            normed = layer["input_layernorm"](hidden)
            attended, _ = layer["self_attn"](
                normed, position_embeddings=rotary, attention_mask=sees,
                past_key_values=self._context,
            )  # fmt: skip
            hidden = hidden + attended
            hidden = hidden + layer["mlp"](layer["post_attention_layernorm"](hidden))
        hidden = hidden.unflatten(1, (blocks, width))
        return parts["norm"](hidden[:, :, -self._head.config.depth :])

    def _sees(self, anchors: Tensor, width: int) -> Tensor:
        """bool [B, 1, A q, n + A q]: which columns each row sees."""
        places = torch.arange(self._length, device=anchors.device)
        context = (places < anchors[..., None]).repeat_interleave(width, 1)
        blocks = torch.arange(anchors.shape[1], device=anchors.device).repeat_interleave(width)
        same = (blocks[:, None] == blocks).expand(len(anchors), -1, -1)
        return torch.cat((context, same), 2)[:, None]
