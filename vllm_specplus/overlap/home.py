"""The engine's end of a draft that runs while the target verifies: a proposer like any other.

It tells the draft's process every step, waits for the trees of a step for as long as drafting them
would have taken here at most, and returns them. What comes too late is not verified; the process
then goes on from a step without trees.

A process that is killed, or says nothing for :data:`LOST_SECONDS`, costs drafts and nothing
else: requests go on undrafted while another one is started, and that reads their texts again.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import torch

from vllm_specplus.drafting.ray_owners import PlacementError
from vllm_specplus.overlap.channel import ChannelClosed
from vllm_specplus.overlap.loop import ANSWER, COUNT, FAILED, FAULT, FORGET, LOAD, READY, SHARE
from vllm_specplus.overlap.messages import Message, from_bytes
from vllm_specplus.overlap.pace import UNKNOWN, Pace
from vllm_specplus.overlap.process import DraftProcess, LocalProcess, RayProcess, check_apart
from vllm_specplus.overlap.steps import UNDRAFTED, Asked, StepTeller
from vllm_specplus.overlap.vocabulary import told
from vllm_specplus.proposer import Proposer, Services
from vllm_specplus.step import DEPTHS, StepContext
from vllm_specplus.tree import DraftBatch

#: For a process to load its draft, and to compile or record what serving should not wait for.
LOAD_SECONDS = 600
#: A process that owes an answer is taken for lost if it says nothing for so long, or if it works on
#: one answer for so long.
LOST_SECONDS, HUNG_SECONDS = 10.0, 300.0
#: Between two attempts to start a lost process anew.
RETRY_SECONDS = 30


class DraftProcessLost(RuntimeError):
    """The draft's process is gone, or does not answer; the step goes on undrafted."""


class DraftFault(RuntimeError):
    """Something failed in the draft's process, which goes on."""


class OverlappedDraft(Proposer):
    """Has a proposer in another process, of class ``method``."""

    _process: DraftProcess | None = None
    """None: it is being started anew."""
    _starting: threading.Thread | None = None
    _pages: tuple[int, int, int] | None = None

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
        self._owed: tuple[int, float] | None = None
        """The newest step that an answer is due for, and since when any has been."""
        self._heard = 0.0
        """When the process last said anything."""
        self._verified: dict[str, bool] = {}
        """Was a tree of the request verified in the last step that it took part in?"""
        self._closing = threading.Event()

    # -- the process --------------------------------------------------------------------

    def load_draft(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._process = self._start()

    def _start(self) -> DraftProcess:
        """A process that has loaded its draft; PlacementError in bounded time if there is none."""
        process: DraftProcess
        if self._device.type == "cpu":
            process = LocalProcess(self.config.draft_cores)
        else:
            process = RayProcess("GPU", getattr(self.config, "ray_address", None))
        try:
            about, arrays = None, {}
            if self.borrows_vocabulary:
                about, arrays = told(self.services.target_vocabulary(), self._dtype)
            process.channel.send(
                LOAD, arrays, config=self._config(), vocab_size=self.services.vocab_size,
                fingerprint=self.services.fingerprint, vocabulary=about,
                dtype=str(self._dtype).removeprefix("torch."), seed=torch.initial_seed(),
                record=self.services.record is not None,
            )  # fmt: skip
            if gpu := self._ready(process).fields["gpu"]:
                check_apart(gpu)
            if self._pages is not None:
                process.channel.send(SHARE, pages=self._pages)
                self._ready(process)
        except ChannelClosed as error:
            problem = process.ended() or str(error)
            process.close()
            raise PlacementError(problem) from error
        except BaseException:
            process.close()
            raise
        return process

    def _ready(self, process: DraftProcess) -> Message:
        """What a process says when it is ready."""
        end = time.monotonic() + LOAD_SECONDS
        while not self._closing.is_set():
            message = process.channel.receive(0.2)
            if message is None:
                if time.monotonic() > end:
                    raise PlacementError(f"the draft was not loaded in {LOAD_SECONDS} seconds")
            elif message.kind == FAILED:
                raise PlacementError(f"the draft's process failed: {message.fields['text']}")
            elif message.kind == READY:
                return message
            else:
                self._take(message)
        raise PlacementError("the engine is closing")

    def _config(self) -> dict[str, Any]:
        return self.config.model_dump(exclude_unset=True, by_alias=True)

    def share_pages(self, pages: int, page: int, max_requests: int) -> None:
        self._pages, self._teller = (pages, page, max_requests), StepTeller(page)
        process = self._process
        assert process is not None
        try:
            process.channel.send(SHARE, pages=self._pages)
            self._ready(process)
        except ChannelClosed as error:
            raise PlacementError(process.ended() or str(error)) from error

    def pids(self) -> list[int]:
        """Of the draft's process, on this machine."""
        return [] if self._process is None else self._process.pids()

    def held_bytes(self) -> int:
        """On a CPU the draft's process has the same memory."""
        return self._described.held_bytes()

    def forget(self, request_id: str) -> None:
        self._teller.forget(request_id)
        self._verified.pop(request_id, None)
        if self._process is not None and not self._process.channel.closed:
            self._process.channel.send(FORGET, request=request_id)

    def close(self) -> None:
        self._closing.set()
        if self._starting is not None:
            self._starting.join(RETRY_SECONDS)
        if self._process is not None:
            self._process.close()
            self._process = None

    def _lose(self, problem: str) -> DraftProcessLost:
        """End what is left of the process, start another one in the background."""
        lost, self._process = self._process, None
        self._teller = StepTeller(self._pages[1] if self._pages else 0)
        self._owed, self._verified = None, {}

        def start_anew() -> None:
            if lost is not None:
                lost.close()
            try:
                process = self._start()
            except Exception as error:
                self.services.report(error)
                self._closing.wait(RETRY_SECONDS)
                self._failed = True
                return
            self._process = process
            self.services.count("draft_group_rebuilds")

        self._failed = False
        self._starting = threading.Thread(target=start_anew, daemon=True)
        self._starting.start()
        return DraftProcessLost(problem)

    _failed = False
    """Did the last attempt to start it anew fail?"""

    def _alive(self) -> bool:
        """Is there a process? DraftProcessLost when it is found to be gone."""
        if self._starting is not None:
            if self._starting.is_alive():
                return False
            self._starting = None
            if self._failed:
                raise self._lose("the draft's process did not start, and is started once more")
        process = self._process
        if process is None:
            return False
        if process.channel.closed:
            raise self._lose(process.ended() or "the draft's process is gone")
        while (message := process.channel.receive(0)) is not None:
            self._take(message)
        if self._owed is not None:
            now, since = time.monotonic(), self._owed[1]
            if now - max(since, self._heard) > LOST_SECONDS or now - since > HUNG_SECONDS:
                raise self._lose(f"the draft's process did not answer for {now - since:.0f} s")
        return True

    # -- steps ----------------------------------------------------------------------------

    def propose(self, step: StepContext) -> DraftBatch:
        """Trees of the requests whose drafts are there in time; ``step.max_nodes`` of the others
        becomes 0."""
        requests = len(step.request_ids)
        wanted = step.max_nodes > 0
        self._pace.stepped(dict(zip(step.request_ids, step.num_tokens.tolist(), strict=True)))
        try:
            drafts = self._drafts(step) if self._alive() else None
        except ChannelClosed:
            raise self._lose("the draft's process is gone") from None
        if drafts is None:
            drafts = DraftBatch.empty(requests)
        step.max_nodes[drafts.counts == 0] = 0
        self._depth = int(self._depths(step).max(initial=0))
        for name, asked, count in zip(step.request_ids, wanted, drafts.counts, strict=True):
            if asked:
                self._verified[name] = bool(count)
            else:
                self._verified.pop(name, None)
        return drafts

    def _drafts(self, step: StepContext) -> DraftBatch | None:
        depths = self._depths(step)
        depth = int(depths.max(initial=0))
        if not (depth or self.reads_hidden):
            return None
        followed = np.full((len(depths), DEPTHS), UNKNOWN, np.float32)
        if step.acceptance is not None:
            followed = step.acceptance[:, :, 0]
        # What one step owes is not waited for in the next: the process is busy, or stopped.
        waits = self._owed is None and depth > 0
        self._number += 1
        worth = self._pace.worth(followed, depths)
        asked = Asked(self._number, waits, self._pace.price(depth), worth, followed)
        told_step = self._teller.message(step, asked)
        self._channel.send(told_step.kind, told_step.arrays, **told_step.fields)
        start = time.monotonic()
        self._owed = self._number, start if self._owed is None else self._owed[1]
        if not waits:
            return None
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

    _depth = 0
    """Of the deepest tree that was proposed last."""

    def _depths(self, step: StepContext) -> np.ndarray:
        """int64 [R] levels that each request may draft."""
        return (self._above < step.max_nodes[:, None]).sum(1)

    @property
    def _channel(self):
        assert self._process is not None
        return self._process.channel

    def _await(self, end: float) -> Message | None:
        """The answer of the newest step, None if it is not there at ``end``."""
        while (left := end - time.monotonic()) > 0:
            message = self._channel.receive(left)
            if message is not None:
                self._take(message)
                if message.kind == ANSWER and message.fields["number"] == self._number:
                    return message
        return None

    def _take(self, message: Message) -> None:
        """Whatever the process says."""
        self._heard = time.monotonic()
        if message.kind == ANSWER:
            self._pace.passed(message.fields["pass_seconds"])
            if self._owed is not None:
                newest, done = self._owed[0], message.fields["number"]
                self._owed = None if done >= newest else (newest, self._heard)
        elif message.kind == FAULT:
            self.services.report(DraftFault(message.fields["text"]))
        elif message.kind == COUNT:
            self.services.count(message.fields["name"])

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
