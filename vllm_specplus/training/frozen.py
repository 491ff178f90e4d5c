"""The target of a run: what it makes of texts, which training does not change.

Its hidden states are computed once for each text and kept, as far as they fit into memory, or else
computed again whenever they are asked for. Distributions are never kept: of one position they are
``2 V`` bytes, against ``2 hidden`` of the state they follow from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_specplus.training.batch import Batch
from vllm_specplus.training.errors import TrainingError
from vllm_specplus.training.language_model import LanguageModel, load_model
from vllm_specplus.training.probe import Probe
from vllm_specplus.training.sampling import end_tokens
from vllm_specplus.training.texts import Text

#: Bytes of hidden states that are kept in main memory: 1.8 million tokens of 576 units.
KEPT = 2 << 30


class States(NamedTuple):
    """The target's hidden states of a batch, in its own dtype; 0 where there is no text."""

    last: Tensor
    """[B, n, hidden], behind the last norm."""
    layers: Tensor | None
    """[B, n, layers * hidden], side by side, what enters each of the layers that were asked for.

    What leaves the last one, where it was asked for, is not normed."""


@contextmanager
def entering_norm(body: torch.nn.Module) -> Iterator[list[Tensor]]:
    """What enters the last norm of a model's ``body`` meanwhile, [1, n, hidden] each time."""
    seen: list[Tensor] = []
    watch = body.norm.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        yield seen
    finally:
        watch.remove()


class Frozen(LanguageModel):
    """A model that is not trained."""

    def __init__(self, model: torch.nn.Module, dtype: torch.dtype, kept: int = KEPT):
        """``kept``: bytes of hidden states to keep, in main memory."""
        super().__init__(model.requires_grad_(False), dtype)
        self.ends = end_tokens(model)
        """Ids of the tokens that end a text."""
        self._kept: dict[tuple[Text, tuple[int, ...]], Tensor] = {}
        self._room = kept
        self._probe: tuple[tuple[Text, ...], Probe] | None = None

    @classmethod
    def load(
        cls, folder: Path, device: torch.device, dtype: torch.dtype, kept: int = KEPT
    ) -> Frozen:
        """The target in a folder; TrainingError if there is none that training knows."""
        return cls(load_model(folder, "target", dtype, device), dtype, kept)

    @torch.no_grad()
    def states(self, batch: Batch, layers: Sequence[int] = ()) -> States:
        """``layers`` counts as vLLM does: ``n`` is what enters layer ``n``, from 0 on; of as many
        layers as there are, what leaves the last one, before the norm."""
        if not all(0 <= n <= len(self.layers) for n in layers):
            raise TrainingError(
                f"layers {list(layers)} of a target of {len(self.layers)}: they count from 0 on"
            )
        rows = [self._of_text(text, tuple(layers)) for text in batch.texts]
        width = self.hidden_size * (1 + len(layers))
        every = torch.zeros(*batch.tokens.shape, width, dtype=rows[0].dtype, device=self.device)
        for row, of_text in enumerate(rows):
            every[row, : len(of_text)] = of_text.to(self.device)
        aux = every[..., self.hidden_size :] if layers else None
        return States(every[..., : self.hidden_size], aux)

    def forget_drafted(self) -> None:
        """Lets go of texts that a draft has written: they are not seen again."""
        for key in [key for key in self._kept if key[0].writer == "draft"]:
            dropped = self._kept.pop(key)
            self._room += dropped.numel() * dropped.element_size()

    def probe(self, texts: Sequence[Text]) -> Probe:
        """Where chains are tried on held-out ``texts``, kept until others are asked for."""
        if self._probe is None or self._probe[0] != tuple(texts):
            self._probe = tuple(texts), Probe.of(self, self.ends, texts)
        return self._probe[1]

    def _of_text(self, text: Text, layers: tuple[int, ...]) -> Tensor:
        """[n, hidden * (1 + layers)]. A text is read by itself: what rounding makes of it must not
        depend on which texts stand beside it, or a resumed run would differ."""
        kept = self._kept.get((text, layers))
        if kept is not None:
            return kept
        with entering_norm(self.body) if len(self.layers) in layers else nullcontext([]) as seen:
            read = self.outputs(
                torch.tensor([text.tokens], device=self.device), output_hidden_states=bool(layers)
            )
        # transformers' last state is the normed one.
        states = (*read.hidden_states[:-1], *seen) if layers else ()
        entering = [states[n] for n in layers]
        rows = torch.cat([read.last_hidden_state, *entering], -1)[0]
        size = rows.numel() * rows.element_size()
        if size <= self._room:
            self._room -= size
            self._kept[text, layers] = rows.cpu()
        return rows
