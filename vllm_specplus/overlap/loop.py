"""The life of a draft's process: it takes steps, answers, and goes on.

What the engine says is read between two passes of the draft at the latest. A step that comes while
trees are drafted below outcomes ends that, unless one of these outcomes came.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from typing import Any

import numpy as np
import torch

from vllm_specplus import registry
from vllm_specplus.overlap.channel import Channel, ChannelClosed
from vllm_specplus.overlap.messages import Message, to_bytes
from vllm_specplus.overlap.outcomes import DraftedTree
from vllm_specplus.overlap.rounds import Ahead, GoesOn, Overtaken, Round, Undrafted, overlapped
from vllm_specplus.overlap.steps import STEP, UNDRAFTED, Asked, StepReader
from vllm_specplus.overlap.vocabulary import SentVocabulary
from vllm_specplus.proposer import Services
from vllm_specplus.step import StepContext

#: Messages of the draft's process.
READY, FAILED, ANSWER, FAULT, COUNT = "ready", "failed", "answer", "fault", "count"
BEAT = "beat"
#: Messages of the engine, beside steps.
LOAD, SHARE, FORGET = "load", "share", "forget"
#: Between two signs of life while there is work.
BEAT_SECONDS = 1.0


class DraftLoop:
    """One draft, and what is said about it."""

    drafter: GoesOn

    def __init__(self, channel: Channel, device: torch.device):
        self._channel, self._device = channel, device
        self._reader = StepReader(device)
        # What was said, in order: steps, and names of requests that are gone.
        self._said: deque[tuple[StepContext, Asked] | str] = deque()
        self._busy = threading.Event()
        self._undrafted = -1
        self._answered = -1
        self._told = 0
        """The round of that number knows that its step was not waited for."""
        self._pass_seconds: float | None = None
        """Of the last round that drafted."""

    def load(self, message: Message) -> None:
        """Make and load the draft of a message :data:`LOAD`."""
        fields, arrays = message.fields, message.arrays
        proposer = registry.method_class(fields["config"]["method"])
        config = proposer.config_class.model_validate(fields["config"])
        torch.manual_seed(fields["seed"])
        dtype = getattr(torch, fields["dtype"])
        vocabulary = SentVocabulary.of(fields["vocabulary"], arrays, dtype, self._device)
        record = None
        if fields["record"] and self._device.type == "cuda":
            from vllm_specplus.drafting.graphs import CudaRecorder

            record = CudaRecorder()
        services = Services(
            fields["vocab_size"], fields["fingerprint"],
            report=lambda error: self._channel.send(FAULT, text=str(error)),
            count=lambda name: self._channel.send(COUNT, name=name),
            target_vocabulary=lambda: vocabulary, record=record,
        )  # fmt: skip
        self.drafter = overlapped(proposer)(config, services)
        self.drafter.load_draft(self._device, dtype)
        self.drafter.warm_up()

    @torch.inference_mode()
    def run(self) -> None:
        """Serve until the engine is gone."""
        threading.Thread(target=self._beat, daemon=True).start()
        try:
            while True:
                while not self._said:
                    self._hear(None)
                self._busy.set()
                self._serve()
                self._busy.clear()
        except ChannelClosed:
            return
        finally:
            self.drafter.close()

    # -- steps ------------------------------------------------------------------------

    def _serve(self) -> None:
        """What was said, in order; of several steps the last one is drafted for, since the others
        went by."""
        while self._said:
            said = self._said.popleft()
            if isinstance(said, str):
                self.drafter.forget(said)
                self.drafter.ahead.pop(said, None)
                continue
            step, asked = said
            if self._newest() is not None:
                step.max_nodes[:] = 0
            self._draft(step, asked)

    def _newest(self) -> tuple[StepContext, Asked] | None:
        """The newest step that was told of, of those that were not drafted for."""
        return next((each for each in reversed(self._said) if not isinstance(each, str)), None)

    def _beat(self) -> None:
        """Tell now and then that work goes on: a long text may take a draft long to read."""
        with contextlib.suppress(ChannelClosed):
            while self._busy.wait():
                time.sleep(BEAT_SECONDS)
                if self._busy.is_set():
                    self._channel.send(BEAT)

    def _draft(self, step: StepContext, asked: Asked) -> None:
        drafter = self.drafter
        foreseen = drafter.foreseen(step)
        drafter.ahead = {}
        drafter.round = now = Round(step, asked, foreseen, self._answer, self._look)
        try:
            drafter.propose(step)
        except ChannelClosed:
            raise
        except Exception as error:
            self._channel.send(FAULT, text=f"{type(error).__name__}: {error}")
        if self._answered < asked.number:  # nothing could be drafted
            now.trees = {}
            self._answer(now)
        if now.pass_seconds:
            self._pass_seconds = now.pass_seconds[-1]

    def _look(self) -> None:
        """See ``Round.look``."""
        now = self.drafter.round
        while self._hear(0):
            pass
        newest = self._newest()
        if newest is not None and not _came(now, *newest):
            raise Overtaken
        if self._undrafted == now.asked.number > self._told:
            self._told = self._undrafted
            if self._answered < now.asked.number:
                now.trees = {}
                self._answer(now)
            raise Undrafted

    def _answer(self, now: Round) -> None:
        """Send the trees of a round, each with what its nodes were drawn from."""
        requests = range(len(now.step.request_ids))
        own = now.trees if now.asked.wanted else {}
        trees = [own.get(r, DraftedTree()) for r in requests]
        arrays = {
            "counts": np.array([len(tree) for tree in trees], np.int32),
            "foreseen": np.array([tree is not None for tree in now.foreseen], bool),
        }
        for name in ("tokens", "parents", "sources"):
            arrays[name] = np.concatenate([getattr(tree, name) for tree in trees] or [[]])
        drawn_from, q = _distributions(trees)
        if q is not None:
            arrays |= {"drawn_from": drawn_from, "q": to_bytes(q)}
        self._answered = now.asked.number
        self._channel.send(ANSWER, arrays, number=self._answered, pass_seconds=self._pass_seconds)

    # -- what the engine says -----------------------------------------------------------

    def _hear(self, seconds: float | None) -> bool:
        """Take in one message; False: none came in time."""
        message = self._channel.receive(seconds)
        if message is None:
            return False
        if message.kind == STEP:
            self._said.append(self._reader.read(message))
        elif message.kind == UNDRAFTED:
            self._undrafted = message.fields["number"]
        elif message.kind == FORGET:
            self._reader.forget(message.fields["request"])
            self._said.append(message.fields["request"])
        elif message.kind == SHARE:
            self.drafter.share_pages(*message.fields["pages"])
            self._channel.send(READY)
        return True


def _came(now: Round, step: StepContext, asked: Asked) -> bool:
    """Is a newer step what is being drafted for in the round ``now``? By what its trees are
    worth."""
    met = np.zeros(len(step.request_ids), bool)
    place = {name: r for r, name in enumerate(now.step.request_ids)}
    for r, name in enumerate(step.request_ids):
        text = step.token_ids[r, : step.num_tokens[r]]
        guesses = now.guesses.get(place.get(name, -1), ())
        met[r] = any(Ahead(*guess, DraftedTree()).came(text) for guess in guesses)
    return bool(met.any() and asked.worth[met].sum() >= asked.worth[~met].sum())


def _distributions(trees: list[DraftedTree]) -> tuple[np.ndarray, torch.Tensor | None]:
    """What the nodes of all trees were drawn from: (int32 [N] row of each node, -1: no draw;
    float32 [M, V'], rows that some node needs, None: nothing was drawn)."""
    rows, parts, begin = [], [], 0
    for tree in trees:
        used = np.unique(tree.drawn_from[tree.drawn_from >= 0])
        own = np.searchsorted(used, tree.drawn_from).astype(np.int32) + begin
        rows.append(np.where(tree.drawn_from < 0, -1, own).astype(np.int32))
        if len(used):
            parts.append(tree.q[torch.from_numpy(used).to(tree.q.device)])
        begin += len(used)
    return np.concatenate(rows or [np.empty(0, np.int32)]), torch.cat(parts) if parts else None


def serve(channel: Channel, device: torch.device, **about: Any) -> None:
    """A draft's life, from its :data:`LOAD` on. ``about``: told when it is ready."""
    loop = DraftLoop(channel, device)
    try:
        message = channel.receive(None)
        assert message is not None
        try:
            loop.load(message)
        except Exception as error:
            channel.send(FAILED, text=f"{type(error).__name__}: {error}")
            channel.receive(None)  # until the engine has heard it
            return
        channel.send(READY, **about)
    except ChannelClosed:
        return
    loop.run()
