"""The engine's end of a draft that runs while the target verifies: a proposer like any other.

It tells the draft's process every step, waits for the trees of a step for as long as drafting them
would have taken here at most, and returns them. What comes too late is not verified; the process
then goes on from a step without trees.

A process that is killed, or says nothing for long, costs drafts and nothing else: requests go on
undrafted while another one is started, and that reads their texts again.
"""

from __future__ import annotations

import itertools
import time
from typing import Any

import numpy as np
import torch

from vllm_specplus.overlap.channel import Channel, ChannelClosed
from vllm_specplus.overlap.keeper import DraftProcessLost, Keeper
from vllm_specplus.overlap.loop import ANSWER, FORGET
from vllm_specplus.overlap.messages import Message, from_bytes
from vllm_specplus.overlap.pace import UNKNOWN, Pace
from vllm_specplus.overlap.steps import UNDRAFTED, Asked, StepTeller
from vllm_specplus.overlap.vocabulary import told
from vllm_specplus.proposer import Proposer, Services
from vllm_specplus.step import DEPTHS, StepContext
from vllm_specplus.tree import DraftBatch

#: Between the seeds of a draft's processes: one that is started anew must not draw again by the
#: numbers of the one before. It is none of the multiples that tell streams apart in
#: ``noise.stream``.
_APART = 0xD1342543DE82EF95


class OverlappedDraft(Proposer):
    """Has a proposer in another process, of class ``method``."""

    _keeper: Keeper | None = None
    """None: the draft is not loaded."""
    _depth = 0
    """Levels of the deepest tree that was proposed last."""

    def __init__(self, method: type[Proposer], config: Any, services: Services):
        super().__init__(config, services)
        described = method(config, services)  # never loaded
        self.sources, self.levels = described.sources, described.levels
        self.reads_hidden, self.hidden_layers = described.reads_hidden, described.hidden_layers
        self.borrows_vocabulary = described.borrows_vocabulary
        self._described = described
        self._above = np.concatenate(([0], np.cumsum(self.levels)[:-1]))
        self._pace = Pace(config.overlap == "paper")
        self._teller = StepTeller()
        self._number = 0
        self._verified: dict[str, bool] = {}
        """Was a tree of the request verified in the last step that it took part in?"""

    # -- the process --------------------------------------------------------------------

    def load_draft(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, starts = device, itertools.count()

        def load() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
            arrays: dict[str, np.ndarray] = {}
            vocabulary, services = None, self.services
            if self.borrows_vocabulary:
                vocabulary, arrays = told(services.target_vocabulary(), dtype)
            return arrays, {
                "config": self.config.model_dump(exclude_unset=True, by_alias=True),
                "vocab_size": services.vocab_size, "fingerprint": services.fingerprint,
                "vocabulary": vocabulary, "dtype": str(dtype).removeprefix("torch."),
                "seed": (torch.initial_seed() + next(starts) * _APART) % 2**63,
                "record": services.record is not None,
            }  # fmt: skip

        self._keeper = Keeper(self.config, device, self.services, load)
        self._keeper.process = self._keeper.start()

    def share_pages(self, pages: int, page: int, max_requests: int) -> None:
        assert self._keeper is not None
        self._keeper.share((pages, page, max_requests))
        self._teller = StepTeller(page)

    def pids(self) -> list[int]:
        """Of the draft's process, on this machine."""
        process = self._keeper and self._keeper.process
        return process.pids() if process else []

    def held_bytes(self) -> int:
        """On a CPU the draft's process has the same memory."""
        return self._described.held_bytes()

    def forget(self, request_id: str) -> None:
        self._teller.forget(request_id)
        self._verified.pop(request_id, None)
        if self._keeper and self._keeper.process and not self._channel.closed:
            self._channel.send(FORGET, request=request_id)

    def close(self) -> None:
        if self._keeper is not None:
            self._keeper.close()

    @property
    def _channel(self) -> Channel:
        assert self._keeper is not None
        assert self._keeper.process is not None
        return self._keeper.process.channel

    def _take(self, message: Message) -> None:
        """Whatever the process says."""
        assert self._keeper is not None
        self._keeper.take(message)
        if message.kind == ANSWER:
            self._pace.passed(message.fields["pass_seconds"])

    def _is_there(self) -> bool:
        """Is there a process? DraftProcessLost when it is found to be gone."""
        keeper = self._keeper
        assert keeper is not None
        try:
            while keeper.process and (message := self._channel.receive(0)) is not None:
                self._take(message)
        except ChannelClosed:
            pass  # it is closed, then
        if problem := keeper.check():
            self._teller = StepTeller(keeper.pages[1] if keeper.pages else 0)
            self._verified = {}
            keeper.start_anew()
            raise DraftProcessLost(problem)
        return keeper.process is not None

    # -- steps ----------------------------------------------------------------------------

    def propose(self, step: StepContext) -> DraftBatch:
        """Trees of the requests whose drafts are there in time; ``step.max_nodes`` of the others
        becomes 0."""
        wanted = step.max_nodes > 0
        self._pace.stepped(dict(zip(step.request_ids, step.num_tokens.tolist(), strict=True)))
        drafts = None
        if self._is_there():
            try:
                drafts = self._drafts(step)
            except ChannelClosed:
                self._is_there()  # says so
        if drafts is None:
            drafts = DraftBatch.empty(len(step.request_ids))
        step.max_nodes[drafts.counts == 0] = 0
        self._depth = int(self._depths(step).max(initial=0))
        for name, asked, count in zip(step.request_ids, wanted, drafts.counts, strict=True):
            if asked:
                self._verified[name] = bool(count)
            else:
                self._verified.pop(name, None)
        return drafts

    def _drafts(self, step: StepContext) -> DraftBatch | None:
        keeper, depths = self._keeper, self._depths(step)
        assert keeper is not None
        depth = int(depths.max(initial=0))
        if not (depth or self.reads_hidden):
            return None
        followed = np.full((len(depths), DEPTHS), UNKNOWN, np.float32)
        if step.acceptance is not None:
            followed = step.acceptance[:, :, 0]
        # What one step owes is not waited for in the next: the process is busy, or stopped.
        waits = depth > 0 and not keeper.owes
        self._number += 1
        worth = self._pace.worth(followed, depths)
        asked = Asked(self._number, waits, self._pace.price(depth), worth, followed)
        said = self._teller.message(step, asked)
        self._channel.send(said.kind, said.arrays, **said.fields)
        keeper.asked(self._number)
        if not waits:
            return None
        start = time.monotonic()
        answer = self._await(start + self._pace.limit(depth))
        if answer is None:
            self._channel.send(UNDRAFTED, number=self._number)
            self.services.count("late_drafts")
            return None
        self._learn(step, answer)
        drafts = self._batch(answer)
        if len(drafts.tokens):
            self._pace.waited(time.monotonic() - start, depth)
        return drafts

    def charged(self, seconds: float) -> float:
        return self._pace.charged(seconds, self._depth)

    def _depths(self, step: StepContext) -> np.ndarray:
        """int64 [R] levels that each request may draft."""
        return (self._above < step.max_nodes[:, None]).sum(1)

    def _await(self, end: float) -> Message | None:
        """The answer of the newest step, None if it is not there at ``end``."""
        while (left := end - time.monotonic()) > 0:
            message = self._channel.receive(left)
            if message is not None:
                self._take(message)
                if message.kind == ANSWER and message.fields["number"] == self._number:
                    return message
        return None

    def _learn(self, step: StepContext, answer: Message) -> None:
        """How often outcomes are foreseen."""
        for name, wanted, foreseen in zip(
            step.request_ids, step.max_nodes > 0, answer.arrays["foreseen"], strict=True
        ):
            if wanted and name in self._verified:
                self._pace.answered(bool(foreseen), self._verified[name])
            if foreseen:
                self.services.count("outcomes_foreseen")

    def _batch(self, answer: Message) -> DraftBatch:
        """An answer as drafts."""
        arrays = answer.arrays
        tokens, parents, sources = (
            arrays[name].astype(np.int32) for name in ("tokens", "parents", "sources")
        )
        drafts = DraftBatch(tokens, parents, arrays["counts"].copy(), sources)
        if "q" in arrays:
            drafts.drawn_from = arrays["drawn_from"].copy()
            drafts.draft_probs = from_bytes(arrays["q"], torch.float32, self._device)
        return drafts
