"""What a run costs, before it is started: memory, disk and time."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """The sizes of a target, from its configuration."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool

    @property
    def layer(self) -> int:
        """Parameters of one decoder layer, its norms left out."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate

    @property
    def embedding(self) -> int:
        """Parameters of the embedding, and as many of the output layer."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """Of the whole target."""
        return self.layers * self.layer + self.embedding * (1 if self.tied else 2)


@dataclass(frozen=True)
class Work:
    """What a recipe keeps and computes."""

    trained: int
    """Parameters that the optimiser changes."""
    multiplied: float
    """Trained weights that one position is multiplied with in a forward pass: more than ``trained``
    where weights are used several times (multi-step), less where rows are looked up."""
    vocab: int
    """Logits per position of a loss."""
    losses: float = 1.0
    """Losses per position: exits, steps."""
    target_layers: int = 0
    """Of the target, run forward (without gradient) at each position in each epoch; 0 if its
    features are kept."""
    feature_bytes: int = 0
    """Kept per position for the whole run."""
    draft_written: float = 0.0
    """Share of the learnt tokens that the draft writes anew in each epoch."""
