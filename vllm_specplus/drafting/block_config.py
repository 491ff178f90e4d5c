"""What a block head is, as its folder describes it; read by ``block_checkpoint.py``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Second:
    """What DFlash-2 adds to DFlash (``dflash2.py``)."""

    taps: int
    """Rows that a convolution reads: a row, and those before it."""
    group: int
    """Units that share a kernel."""
    candidates: int
    """How many tokens of each depth the selector chooses from."""
    embedding_scale: float
    output_scale: float
    soft_cap: float
    """Of the logits, before they are scaled; 0: none."""


@dataclass(frozen=True)
class Body:
    """The transformer of DFlash, DFlash-2 and DSpark."""

    layer: dict[str, Any]
    """Keys of ``Qwen3Config``, sizes among them."""
    queries: int
    """Rows of a pass: the newest token, and masks."""
    from_anchor: bool
    """Does the newest token's own row predict the first token? Else the first mask does."""
    mask_token: int
    windows: tuple[int | None, ...]
    """How far each layer looks back; None: over the whole text."""
    window_of_anchor: bool
    """Windows are counted from the newest token for all rows alike; else from each row."""
    causal: tuple[bool, ...]
    """Of each layer: does a row see no later one of the block?"""
    confidence: Literal["row", "token"] | None = None
    """What DSpark's confidence head reads: a row alone, or also the token before; None: it has
    none."""
    second: Second | None = None
    """None: not of DFlash-2."""


@dataclass(frozen=True)
class ParallelBody:
    """The layers of P-EAGLE, of which the first reads an embedding beside a hidden state."""

    family: str
    """``llama`` or ``qwen3``."""
    layer: dict[str, Any]
    """Keys of the family's config, sizes among them."""
    mask_token: int
    norm_before_residual: bool
    """Does the residual stream begin behind the norm of the hidden state?"""


@dataclass(frozen=True)
class BlockConfig:
    """What a head's folder says."""

    kind: str
    depth: int
    """Tokens that are predicted at once."""
    target_hidden_size: int
    vocab_size: int | None
    """The target's; None: it is not said."""
    layer_ids: tuple[int, ...] | None
    """Which of the target's hidden states it reads, as vLLM counts them: ``n`` is what enters layer
    ``n``; empty: vLLM's choice. None: those behind the last norm."""
    max_positions: int | None
    """None: as many as the target."""
    body: Body | ParallelBody | None
    """None: of Medusa."""

    @property
    def ahead(self) -> int:
        """Rows of a pass at the positions from the newest token's on."""
        if isinstance(self.body, ParallelBody):
            return self.depth - 1  # what predicts the first token is the row before
        return self.body.queries if self.body else 0

    @property
    def hidden_size(self) -> int:
        return self.body.layer["hidden_size"] if self.body else self.target_hidden_size
