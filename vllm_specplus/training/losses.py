"""What a draft is told about a position: losses of its distribution q from the target's, p.

In standard speculative decoding a token is accepted with probability ``sum_v min(p, q)``, which is
1 - TVD(p, q). Total variation has hardly a gradient far from the target, where forward KL is the
better guide (DistillSpec, arXiv 2310.08461; LK losses, arXiv 2602.23881).

Every loss maps :class:`Rows` of N positions to float32 [N] and is minimal where q = p, but for
``hard_ce``, which learns the text itself. ``speculators`` has some of them, for heads of its own
kinds and as part of its trainer; none of it can be imported beside vLLM without that trainer's
dependencies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vllm_specplus.strict import nearest, quoted
from vllm_specplus.training.errors import TrainingError

#: Label of a position whose next token the vocabulary does not have.
NO_LABEL = -100
#: Tokens that ``list_mle`` puts in order (ViSpec).
RANKED = 10
#: The least that a probability counts as, where its logarithm is taken.
LEAST = 1e-30


class Rows(NamedTuple):
    """Positions of texts, as target and draft see them."""

    target_logits: Tensor
    """float32 [N, V]."""
    draft_logits: Tensor
    """float32 [N, V], of the same vocabulary."""
    labels: Tensor
    """int64 [N]: the text's next token; :data:`NO_LABEL` where V has none for it."""
    target_features: Tensor | None = None
    """[N, hidden], for losses of hidden states."""
    draft_features: Tensor | None = None


Loss = Callable[[Rows], Tensor]
"""float32 [N]."""


def forward_kl(rows: Rows) -> Tensor:
    """KL(p || q) in nats."""
    log_p, log_q = rows.target_logits.log_softmax(-1), rows.draft_logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def reverse_kl(rows: Rows) -> Tensor:
    """KL(q || p) in nats."""
    log_p, log_q = rows.target_logits.log_softmax(-1), rows.draft_logits.log_softmax(-1)
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def jensen_shannon(rows: Rows) -> Tensor:
    """Mean divergence, in nats, of both from their mean."""
    log_p, log_q = rows.target_logits.log_softmax(-1), rows.draft_logits.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    middle = ((p + q) / 2).clamp(min=LEAST).log()
    return ((p * (log_p - middle)).sum(-1) + (q * (log_q - middle)).sum(-1)) / 2


def total_variation(rows: Rows) -> Tensor:
    """1 - the probability that a draft's token is accepted."""
    return (rows.target_logits.softmax(-1) - rows.draft_logits.softmax(-1)).abs().sum(-1) / 2


def acceptance(rows: Rows) -> Tensor:
    """- log of the probability that a draft's token is accepted (LK)."""
    both = torch.minimum(rows.target_logits.softmax(-1), rows.draft_logits.softmax(-1))
    return -both.sum(-1).clamp(min=LEAST).log()


def soft_ce(rows: Rows) -> Tensor:
    """Cross-entropy of q under p: forward KL and the entropy of p, which no draft can change."""
    return -(rows.target_logits.softmax(-1) * rows.draft_logits.log_softmax(-1)).sum(-1)


def hard_ce(rows: Rows) -> Tensor:
    """- log q of the text's token; 0 where the vocabulary has none for it."""
    return F.cross_entropy(rows.draft_logits, rows.labels, ignore_index=NO_LABEL, reduction="none")


def smooth_l1(rows: Rows) -> Tensor:
    """Mean smooth L1 distance between the units of both hidden states (EAGLE)."""
    if rows.target_features is None or rows.draft_features is None:
        raise TrainingError(
            "'smooth_l1' compares hidden states, of which this recipe has none: "
            "use a loss of distributions, as 'forward_kl'"
        )
    distance = F.smooth_l1_loss(
        rows.draft_features.float(), rows.target_features.float(), reduction="none"
    )
    return distance.mean(-1)


def list_mle(rows: Rows) -> Tensor:
    """- log of the probability that drawing from q, without replacement and among the target's best
    tokens only, gives them in the target's order (ViSpec)."""
    best = rows.target_logits.topk(min(RANKED, rows.target_logits.shape[-1])).indices
    scores = rows.draft_logits.gather(-1, best)
    left = scores.flip(-1).logcumsumexp(-1).flip(-1)
    return (left - scores).sum(-1)


LOSSES: dict[str, Loss] = {
    loss.__name__: loss
    for loss in (
        forward_kl, reverse_kl, jensen_shannon, total_variation, acceptance, soft_ce, hard_ce,
        smooth_l1, list_mle,
    )
}  # fmt: skip


def mixed(weights: Mapping[str, float]) -> Loss:
    """The sum of some losses, each times its weight; TrainingError for an unknown one, for none
    and for a weight that is not above 0."""
    if not weights:
        raise TrainingError(f"a mixed loss of no parts: name some of {', '.join(LOSSES)}")
    for name, weight in weights.items():
        if name not in LOSSES:
            meant = nearest(name, LOSSES)
            hint = f", did you mean {meant!r}?" if meant else ""
            raise TrainingError(f"unknown loss {quoted(name)}{hint} (allowed: {', '.join(LOSSES)})")
        if not weight > 0:
            raise TrainingError(f"loss {name!r} has weight {quoted(weight)}: it must be above 0")
    parts = [(LOSSES[name], weight) for name, weight in weights.items()]

    def loss(rows: Rows) -> Tensor:
        return torch.stack([weight * part(rows) for part, weight in parts]).sum(0)

    return loss


def loss_of(described: str | Mapping[str, float]) -> Loss:
    """The loss of a name, or of weights by name; TrainingError if there is none."""
    return mixed({described: 1.0} if isinstance(described, str) else described)
