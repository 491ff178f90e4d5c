"""Keeps a draft's process: starts it, knows when it is lost, and starts another one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from vllm_specplus.drafting.ray_owners import PlacementError
from vllm_specplus.overlap.channel import ChannelClosed
from vllm_specplus.overlap.loop import ANSWER, COUNT, FAILED, FAULT, LOAD, READY, SHARE
from vllm_specplus.overlap.messages import Message
from vllm_specplus.overlap.process import DraftProcess, LocalProcess, RayProcess, check_apart
from vllm_specplus.proposer import Services

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


class Keeper:
    """Of one draft."""

    process: DraftProcess | None = None
    """None: it is being started anew."""
    pages: tuple[int, int, int] | None = None
    """As ``Proposer.share_pages`` is told, from then on."""
    _starting: threading.Thread | None = None
    _failed = False
    """Did the last attempt to start it anew fail?"""

    def __init__(
        self, config: Any, device: torch.device, services: Services,
        told: Callable[[], tuple[dict[str, np.ndarray], dict[str, Any]]],
    ):  # fmt: skip
        """``told`` returns arrays and fields of a message ``loop.LOAD``. Starts nothing."""
        self._config, self._device, self._services, self._told = config, device, services, told
        self._closing = threading.Event()
        self._owed: tuple[int, float] | None = None
        self._heard = 0.0

    @property
    def owes(self) -> bool:
        """Is an answer due?"""
        return self._owed is not None

    def asked(self, number: int) -> None:
        """An answer to a step of that number is due, as well as those that were."""
        self._owed = number, time.monotonic() if self._owed is None else self._owed[1]

    def start(self) -> DraftProcess:
        """A process that has loaded its draft; PlacementError in bounded time if there is none."""
        process: DraftProcess
        if self._device.type == "cpu":
            process = LocalProcess(self._config.draft_cores)
        else:
            address = getattr(self._config, "ray_address", None)
            process = RayProcess("GPU", address, self._services.target_devices())
        try:
            arrays, fields = self._told()
            process.channel.send(LOAD, arrays, **fields)
            if gpu := self._ready(process).fields["gpu"]:
                check_apart(gpu, self._services.target_devices())
            if self.pages is not None:
                self._share(process)
        except ChannelClosed as error:
            problem = process.ended() or str(error)
            process.close()
            raise PlacementError(problem) from error
        except BaseException:
            process.close()
            raise
        return process

    def share(self, pages: tuple[int, int, int]) -> None:
        """Tell the process of the target's pages; PlacementError if it does not come of it."""
        self.pages = pages
        assert self.process is not None
        try:
            self._share(self.process)
        except ChannelClosed as error:
            raise PlacementError(self.process.ended() or str(error)) from error

    def _share(self, process: DraftProcess) -> None:
        process.channel.send(SHARE, pages=self.pages)
        self._ready(process)

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
                self.take(message)
        raise PlacementError("the engine is closing")

    def take(self, message: Message) -> None:
        """Whatever the process says, but for what is in an answer."""
        self._heard = time.monotonic()
        if message.kind == ANSWER and self._owed is not None:
            newest, done = self._owed[0], message.fields["number"]
            self._owed = None if done >= newest else (newest, self._heard)
        elif message.kind == FAULT:
            self._services.report(DraftFault(message.fields["text"]))
        elif message.kind == COUNT:
            self._services.count(message.fields["name"])

    def check(self) -> str | None:
        """What is wrong, None: the process is there, or being started anew."""
        if self._starting is not None and not self._starting.is_alive():
            self._starting = None
            if self._failed:
                return "the draft's process did not start, and is started once more"
        if self.process is None:
            return None
        if self.process.channel.closed:
            return self.process.ended() or "the draft's process is gone"
        if self._owed is not None:
            now, since = time.monotonic(), self._owed[1]
            if now - max(since, self._heard) > LOST_SECONDS or now - since > HUNG_SECONDS:
                return f"the draft's process did not answer for {now - since:.0f} s"
        return None

    def start_anew(self) -> None:
        """End what is left of the process, and start another one in the background."""
        lost, self.process = self.process, None
        self._owed, self._failed = None, False

        def run() -> None:
            if lost is not None:
                lost.close()
            try:
                process = self.start()
            except Exception as error:
                self._services.report(error)
                self._closing.wait(RETRY_SECONDS)
                self._failed = True
                return
            self.process = process
            self._services.count("draft_group_rebuilds")

        self._starting = threading.Thread(target=run, daemon=True)
        self._starting.start()

    def close(self) -> None:
        """End all that there is."""
        self._closing.set()
        if self._starting is not None:
            self._starting.join(RETRY_SECONDS)
        if self.process is not None:
            self.process.close()
            self.process = None
