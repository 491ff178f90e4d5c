"""What goodput is maximised under: how long the next step may take, for whom.

A request's time per token is the sum of its steps over its tokens. Of every choice of nodes is
known what the step will take, and what each request can expect of it; an objective says which
choices are fair to every request.

    latency      nobody is slower than it would be undrafted, but for a margin (the default)
    throughput   anything goes that makes more tokens per second
    slo          every request keeps its target of time per token, and new ones that of the time to
                 their first token
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np

from vllm_specplus.control.ledger import Ledger
from vllm_specplus.control.settings import GoodputControl
from vllm_specplus.metrics import Counters
from vllm_specplus.step import StepContext

logger = logging.getLogger("vllm.specplus")


@dataclass(frozen=True, slots=True)
class Limits:
    """The seconds that the next step may take."""

    seconds: np.ndarray
    """float64 [R] for a request that gains its one token only."""
    per_token: np.ndarray
    """float64 [R] and so much more for every drafted token that it is expected to gain."""
    ceiling: float = np.inf
    """Whatever is gained."""


class Throughput:
    """No limit."""

    def limits(self, step: StepContext, plain: float, prompt: float) -> Limits | None:
        """For the requests of ``step``, if it took ``plain`` seconds undrafted and a prompt is
        read in ``prompt`` seconds."""
        return None

    def ended(self, request_id: str) -> None:
        """The request is gone; its account is still there."""


class Latency(Throughput):
    """No request may take longer for its tokens than it would undrafted, or than undrafted requests
    usually do, whichever is longer, but for a margin.

    Whoever has had a short time so far, since no prompt was read meanwhile, say, can wait without
    being one of the slow ones for it. What is usual is so chosen that the slow ones, all in all,
    take no longer than they would undrafted (``control/ledger.py``).
    """

    #: Share of what plain decoding would have taken. Below the 5 % that the tail may lose, since
    #: expectations do not come true every time, and the plain time itself is a prediction.
    MARGIN = 0.03

    def __init__(self, ledger: Ledger):
        self._ledger = ledger

    def limits(self, step: StepContext, plain: float, prompt: float) -> Limits | None:
        accounts = self._ledger.accounts(step.request_ids)
        # With the token that the step brings, whatever else it brings.
        usual = accounts.usual * (accounts.alone + plain)
        admitted = np.maximum(accounts.plain + plain, usual)
        left = (1.0 + self.MARGIN) * admitted - accounts.spent
        return Limits(np.maximum(left, plain), np.full(len(left), plain))


class Slo(Throughput):
    """Requests keep their targets, where even plain decoding could."""

    def __init__(self, control: GoodputControl, ledger: Ledger, counters: Counters):
        self._ledger, self._counters = ledger, counters
        self._tpot = np.inf if control.tpot_ms is None else control.tpot_ms / 1000
        self._ttft = np.inf if control.ttft_ms is None else control.ttft_ms / 1000
        self._targets: dict[str, float] = {}
        self._told = False

    def limits(self, step: StepContext, plain: float, prompt: float) -> Limits | None:
        targets = np.full(len(step.request_ids), self._tpot)
        if step.tpot_targets is not None:
            targets = np.where(np.isnan(step.tpot_targets), targets, step.tpot_targets)
        self._targets.update(zip(step.request_ids, targets.tolist(), strict=True))
        accounts = self._ledger.accounts(step.request_ids)
        left = targets * (accounts.tokens + 1) - accounts.spent
        # Who misses the target even undrafted is at least not to be any slower than that.
        # A new request waits for the end of a step, and shares the next with others' drafts.
        return Limits(
            np.maximum(left, plain),
            np.maximum(targets, plain),
            max((self._ttft - prompt) / 2, plain),
        )

    def ended(self, request_id: str) -> None:
        target, account = self._targets.pop(request_id, np.inf), self._ledger.accounts([request_id])
        tokens, spent = float(account.tokens[0]), float(account.spent[0])
        if not tokens or spent <= target * tokens:
            return
        self._counters.add("requests_above_target")
        if not self._told:
            self._told = True
            logger.warning(
                "a request took %.1f ms per token, its target is %.1f ms: more requests are in "
                "flight than can keep it, with drafts or without. Further ones are counted in "
                "vllm:specplus_requests_above_target", 1000 * spent / tokens, 1000 * target,
            )  # fmt: skip


def make_objective(control: GoodputControl, ledger: Ledger, counters: Counters) -> Throughput:
    """The objective that the user configured."""
    if control.objective == "throughput":
        return Throughput()
    return Latency(ledger) if control.objective == "latency" else Slo(control, ledger, counters)
