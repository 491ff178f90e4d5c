"""The algorithm: draft a step, judge it, and have the target write it anew where that pays.

Section 4 of the paper, with the target asked lazily: its step is written only when it is wanted
(the authors' script, an evaluator, writes both every time). A step is escalated where the score is
*above* the threshold, as the paper says; the script escalates at the threshold too.

What fails degrades towards the target: without the draft, or without the router's word, the target
writes the step. Without the target nothing that was promised can be kept, and the answer ends with
an error.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncGenerator
from typing import Annotated

from pydantic import Field

from vllm_specplus.arbitrage.engines import Engine, EngineError, Refused
from vllm_specplus.arbitrage.metrics import Metrics
from vllm_specplus.arbitrage.routers import Router
from vllm_specplus.arbitrage.steps import End, Job, Step, Writer, Written
from vllm_specplus.strict import StrictModel

log = logging.getLogger(__name__)

#: Seconds for which a draft that does not answer is left alone.
PAUSE = 5.0
#: Seconds before a target that does not answer is asked once more.
AGAIN = 0.2


class Limits(StrictModel):
    """Bounds of every answer."""

    max_steps: Annotated[int, Field(ge=1)] = 150
    """The authors' default."""
    step_tokens: Annotated[int, Field(ge=1)] | None = None
    """Most tokens of a step; a longer one is judged as it is, and goes on as the next. None: as
    many as the answer may have, so that a step without an end is the last one, as in the paper."""


class Arbiter:
    """Answers with two engines and a router, any number of jobs at a time."""

    def __init__(
        self, draft: Engine, target: Engine, router: Router, metrics: Metrics,
        limits: Limits | None = None,
    ):  # fmt: skip
        self.draft, self.target, self.router = draft, target, router
        self.metrics, self.limits = metrics, limits or Limits()
        self.paused_until = 0.0
        """By the monotonic clock: the draft is not asked before."""

    async def answer(self, job: Job) -> AsyncGenerator[Step, None]:
        """The steps of an answer, each as soon as it stands. Refused or EngineError where the
        target cannot go on."""
        answer = Answer(self, job)
        while (step := await answer.next_step()) is not None:
            self.metrics.count(step)
            yield step


class Answer:
    """One answer as it grows."""

    def __init__(self, arbiter: Arbiter, job: Job):
        self._arbiter, self._job = arbiter, job
        self._steps: list[Step] = []
        self._left = job.max_tokens
        self._ended = False
        self._drafting = job.threshold >= 0 and Writer.DRAFT in job.prompts
        """Is the draft asked? Not where every step would be written anew, nor where it cannot read
        the text, or has no room for it any more."""
        self._seconds: dict[str, float] = {}

    async def next_step(self) -> Step | None:
        """The next step; None behind the last one."""
        limits = self._arbiter.limits
        if self._ended or self._left <= 0 or len(self._steps) >= limits.max_steps:
            return None
        self._seconds = {}
        most = min(self._left, limits.step_tokens or self._left)
        candidate, score = await self._drafted(most), None
        if candidate is not None:
            score = await self._scored(candidate)
        kept = candidate is not None and (
            self._job.threshold >= 1 or (score is not None and score <= self._job.threshold)
        )
        written = candidate if kept else await self._by_target(most)
        if written is None:
            return None
        writer = Writer.DRAFT if kept else Writer.TARGET
        # The target's context may have room where the draft's has none.
        self._drafting &= not is_full(candidate, most)
        self._ended = written.end is End.ANSWER or (not kept and is_full(written, most))
        step = Step(
            writer, written.text, written.tokens, written.end, written.read, score, self._seconds
        )
        self._steps.append(step)
        self._left -= written.tokens
        return step

    async def _drafted(self, most: int) -> Written | None:
        """The draft's step, if it is asked and answers."""
        arbiter = self._arbiter
        if not self._drafting or time.monotonic() < arbiter.paused_until:
            return None
        try:
            return await self._written(Writer.DRAFT, most)
        except Refused as error:
            log.warning("%s; the target writes the rest of this answer", error)
            self._drafting = False
        except EngineError as error:
            log.warning("%s; the target writes alone for %g s", error, PAUSE)
            arbiter.paused_until = time.monotonic() + PAUSE
        arbiter.metrics.failed("draft")
        return None

    async def _scored(self, candidate: Written) -> float | None:
        """The router's score; None where it has none, or nothing depends on it."""
        if self._job.threshold >= 1:
            return None
        began = time.perf_counter()
        try:
            return await self._arbiter.router.score(self._job, self._steps, candidate)
        except EngineError as error:
            log.warning("%s; the target writes this step", error)
            self._arbiter.metrics.failed("router")
            return None
        finally:
            self._seconds["router"] = time.perf_counter() - began

    async def _by_target(self, most: int) -> Written | None:
        """The target's step; None where its context has no room for one."""
        for last in (False, True):
            try:
                return await self._written(Writer.TARGET, most)
            except Refused as error:
                if not self._steps:
                    raise
                # Of a request that is good for the draft, what is too much is the text's length.
                log.warning("%s; the answer ends", error)
                return None
            except EngineError as error:
                self._arbiter.metrics.failed("target")
                if last:
                    raise
                log.warning("%s; it is asked once more", error)
                await asyncio.sleep(AGAIN)
        raise AssertionError

    async def _written(self, writer: Writer, most: int) -> Written:
        """A step of one of the models behind the text so far."""
        job = self._job
        engine = self._arbiter.draft if writer is Writer.DRAFT else self._arbiter.target
        sampling = dict(job.sampling)
        if job.seed is not None:
            # Steps of one seed would repeat its first draws.
            own = random.Random(f"{job.seed} {len(self._steps)} {writer}")
            sampling["seed"] = own.getrandbits(63)
        if job.cache_salt is not None:
            sampling["cache_salt"] = job.cache_salt
        text = job.prompts[writer] + "".join(step.text for step in self._steps)
        began = time.perf_counter()
        try:
            return await engine.write(text, most, job.stop, sampling, job.special_tokens)
        finally:
            self._seconds[writer] = time.perf_counter() - began


def is_full(written: Written | None, most: int) -> bool:
    """Did a step end because its writer's context has no room for more?"""
    return written is not None and written.end is End.LENGTH and written.tokens < most
