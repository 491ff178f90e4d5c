"""Which targets a head can be run for. What layers they have is none of its business."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm_specplus.drafting.model import DraftModelError

if TYPE_CHECKING:
    from vllm_specplus.target import Target


def check_fits(
    target: Target, head: str, hidden: int | None, vocab: int | None, layers: Sequence[int] | None
) -> None:
    """DraftModelError unless the ``head``, as sentences call it, was made for a target like this.

    ``hidden``, ``vocab``: units and tokens of its target, None: it does not say; ``layers`` that it
    reads, as vLLM counts them, empty: vLLM's choice; None: it reads what is behind the last norm.
    """
    for what, own, others in (
        ("hidden units", hidden, target.hidden_size), ("tokens", vocab, target.vocab_size)
    ):  # fmt: skip
        if own is not None and own != others:
            raise DraftModelError(
                f"{head} was made for a target of {own} {what}, and this one has {others}"
            )
    if layers is None:
        return
    highest = max(layers, default=0)
    if highest > target.num_layers:
        raise DraftModelError(
            f"{head} reads layer {highest}, and the target has {target.num_layers}"
        )
    if not target.gives_layers():
        raise DraftModelError(
            f"{head} reads hidden states of the target's layers, which vLLM hands out of some "
            f"models and not of one of type {target.family!r}: use a method that does without, "
            f"such as 'token_recycling'"
        )
