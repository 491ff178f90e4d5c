"""Going on behind many places of texts at once, with keys and values of transformers' models.

For what a draft would propose, and its target say, behind positions of held-out texts: there are
several in a text, which is read once for all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_specplus.training.language_model import LanguageModel


class Decoding:
    """Continuations of texts, a token at a time."""

    def __init__(
        self, model: LanguageModel, tokens: Tensor, mask: Tensor, rows: Tensor, places: Tensor
    ):
        """Continuation r goes on behind position ``places[r]`` of text ``rows[r]``, int64 [R].

        ``tokens`` int64 [B, n] and ``mask`` bool [B, n] are texts padded on the right. What a text
        has behind the position is not seen; in a model of windows it still counts as distance.
        """
        from transformers import DynamicCache

        self._model, self._cache = model, DynamicCache()
        hidden = model.read(tokens, mask, past_key_values=self._cache, use_cache=True)
        self.hidden = hidden[rows, places]
        """[R, hidden] behind the last norm, at the newest token of each."""
        self._cache.batch_select_indices(rows)
        width = torch.arange(tokens.shape[1], device=tokens.device)
        self._seen = width <= places[:, None]
        self._next = places + 1

    def read(self, tokens: Tensor) -> None:
        """One more token of each, int64 [R]."""
        self._seen = torch.cat((self._seen, torch.ones_like(self._seen[:, :1])), 1)
        self.hidden = self._model.read(
            tokens[:, None], self._seen, position_ids=self._next[:, None],
            past_key_values=self._cache, use_cache=True,
        )[:, 0]  # fmt: skip
        self._next = self._next + 1

    def best(self) -> Tensor:
        """int64 [R]: the most probable next tokens."""
        return self._model.output(self.hidden).argmax(-1)


@torch.no_grad()
def greedy_chains(
    model: LanguageModel, tokens: Tensor, mask: Tensor, rows: Tensor, places: Tensor, depth: int
) -> Tensor:
    """int64 [R, depth]: the most probable tokens, one after another; see :class:`Decoding`."""
    decoding = Decoding(model, tokens, mask, rows, places)
    chain = [decoding.best()]
    while len(chain) < depth:
        decoding.read(chain[-1])
        chain.append(decoding.best())
    return torch.stack(chain, 1)
