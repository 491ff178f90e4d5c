"""How many tokens a round brings, and what is known of it before anything runs.

A plan is about time; how often drafts are right is a matter of models and texts. Where the user
states nothing, a published or measured rate stands in, and its source is printed with it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Known:
    """A rate, and where it was found."""

    rate: float
    """Share of the drafted levels that are right, given that all above them are."""
    source: str


MOESD = "arXiv 2505.19645, table 1: Qwen2-57B-A14B with a draft of 0.5B, MT-bench, greedy"
EAGLE = "vLLM issue 20780: EAGLE-3 for Llama-3.1-8B, MT-bench, 5 tokens"
MEDUSA = "Spec-Bench, Vicuna-7B: 2.32 tokens per step of 4 heads"
OURS = "measured here, SmolLM2-135M, Spec-Bench"

#: By method.
KNOWN = {
    "draft_tree": Known(0.70, MOESD),
    "easyspec": Known(0.70, MOESD),
    "eagle_tree": Known(0.75, EAGLE),
    "block_tree": Known(0.60, MEDUSA),
    "token_recycling": Known(0.46, OURS),
    "layer_skip": Known(0.67, f"{OURS}, a fifth of the blocks left out"),
    "early_exit": Known(0.28, f"{OURS}, a model that was not trained for exits"),
}


def expected(rate: float, levels: int) -> float:
    """Tokens of a round that drafts so many levels, its own one among them: one more than what is
    accepted (arXiv 2211.17192, eq. 1)."""
    return sum(rate**level for level in range(levels + 1))


def expected_overlapped(rate: float, levels: int) -> float:
    """Tokens of a round in which the target verifies while the draft goes on, as PEARL does
    (arXiv 2408.11850): the mean over its two kinds of rounds.

    A round that follows a rejection verifies the first of the tokens that are being drafted; it
    brings one token. Where that was right, rounds verify ``levels`` tokens each until one is wrong;
    a block that is all right brings no token of the target's own.
    """
    whole = rate**levels
    following = rate / (rate + 1 - whole) if rate < 1 else 1.0
    accepted = sum(rate**level for level in range(levels))
    return (1 - following) + following * accepted
