"""The stock scheduler, which never pays for drafts with another request's memory.

Before every step, drafts are cut where they would need cache blocks or token budget
that plain decoding could need: speculation then causes no preemption and starves no
request that plain decoding would have served (SpecMemo, arXiv 2506.01986, asks for the
same bound; SmartSpec guards with a margin on free blocks).
"""

from __future__ import annotations

import logging

from vllm.utils.math_utils import cdiv
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from vllm_specplus.control.requests import carry_salt
from vllm_specplus.engine.counts import StepCounts

logger = logging.getLogger("vllm.specplus")


class GuardedScheduler(Scheduler):
    """Stock scheduling on drafts that fit."""

    def __init__(self, vllm_config, *args, **kwargs):
        super().__init__(vllm_config, *args, **kwargs)
        self._counts = StepCounts()
        groups = self.kv_cache_config.kv_cache_groups
        self._block_sizes = [each.kv_cache_spec.block_size for each in groups]
        self._broken: dict[str, int] = {}
        # vLLM fills a request's first decode up with drafts of -1, for graphs of one number of
        # rows per request; trees have no such graphs, and every one would be verified. A number
        # of drafts by batch size, here the same for all, is what it does not fill up to.
        if self.dynamic_sd_lookup is None:
            self.dynamic_sd_lookup = [self.num_spec_tokens] * (self.max_num_running_reqs + 1)

    def add_request(self, request) -> None:
        """Workers get a request's parameters, but not its ``cache_salt``: it travels in them. A
        turn of a session of streaming input that names none has the session's."""
        params, session = request.sampling_params, self.requests.get(request.request_id)
        if params is not None:
            salt = request.cache_salt or (session and session.cache_salt)
            params.extra_args = carry_salt(params.extra_args, salt)
        super().add_request(request)

    def schedule(self, *args, **kwargs):
        self._trim_drafts()
        return super().schedule(*args, **kwargs)

    def update_from_output(self, scheduler_output, model_runner_output):
        self._counts.take(model_runner_output)
        self._broken = model_runner_output.num_nans_in_logits or {}
        return super().update_from_output(scheduler_output, model_runner_output)

    def _update_request_with_output(self, request, new_token_ids, *args, **kwargs):
        """A request for whose next token there is no distribution ends with an error, behind what
        was accepted before it."""
        broken = bool(self._broken.get(request.request_id)) and bool(new_token_ids)
        if broken:
            new_token_ids = new_token_ids[:-1]
        tokens, stopped = super()._update_request_with_output(
            request, new_token_ids, *args, **kwargs
        )
        if not broken or stopped:
            return tokens, stopped
        logger.error("request %s ends: the model's logits are not finite", request.request_id)
        request.status, request.resumable = RequestStatus.FINISHED_ERROR, False
        return tokens, True

    def make_stats(self, *args, **kwargs):
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            self._counts.put(stats)
        return stats

    def _handle_stopped_request(self, request) -> bool:
        """A session's next turn goes on from what was said. Where its end fell inside an accepted
        draft, keys and values were computed behind it, and vLLM takes them for text."""
        if request.resumable:
            said = request.num_tokens - 1 + request.num_output_placeholders
            request.num_computed_tokens = min(request.num_computed_tokens, said)
        return super()._handle_stopped_request(request)

    def update_draft_token_ids(self, draft_token_ids) -> None:
        """Drafts come after a step's outputs: those for a turn that ended in it are void."""
        super().update_draft_token_ids(draft_token_ids)
        for name in draft_token_ids.req_ids:
            request = self.requests.get(name)
            if request is not None and request.status != RequestStatus.RUNNING:
                request.spec_token_ids = []

    def _trim_drafts(self) -> None:
        drafted = [r for r in self.running if r.spec_token_ids]
        if not drafted:
            return
        budget = self.max_num_scheduled_tokens
        free = self.kv_cache_manager.block_pool.get_num_free_blocks()
        if self._plenty(budget, free):
            return
        for request in self.running:
            plain = request.num_tokens - request.num_computed_tokens
            budget -= min(plain, self.max_num_scheduled_tokens)
            free -= self._missing(request)
        # What the coming steps may need before a drafted block comes into use: a block
        # for every running request, and the prompts that may be admitted meanwhile.
        free -= len(self.running) * len(self._block_sizes)
        if self.waiting:
            free -= self._bound(self.max_num_scheduled_tokens, len(self.waiting))
        free, budget = max(free, 0), max(budget, 0)
        for request in drafted:
            count = len(request.spec_token_ids)
            fits = min(count, budget)
            # Slots of its own last blocks are free of charge.
            plain = self._missing(request)
            while fits and self._missing(request, fits) - plain > free:
                fits -= 1
            free -= self._missing(request, fits) - plain
            budget -= fits
            if fits < count:
                # A prefix of the list keeps its tree; see tree.DraftTokens.
                request.spec_token_ids = request.spec_token_ids[:fits]
                self._counts.own.add("memory_guard_trims")

    def _plenty(self, budget: int, free: int) -> bool:
        """Can everything be served, by an upper bound that looks at no block table?"""
        rows = sum(r.num_tokens_with_spec - r.num_computed_tokens for r in self.running)
        waiting = budget if self.waiting else 0
        blocks = self._bound(rows + waiting, 3 * len(self.running) + len(self.waiting))
        return rows <= budget and blocks < free

    def _bound(self, tokens: int, requests: int) -> int:
        """Most cache blocks, of all groups, that ``tokens`` of so many ``requests`` may begin."""
        return sum(cdiv(tokens, size) + requests for size in self._block_sizes)

    def _missing(self, request, drafts: int = 0) -> int:
        """Cache blocks, of all groups, that the request's known tokens and so many ``drafts`` need
        beside those that it holds. What a window has left behind counts as held."""
        tokens = request.num_tokens + drafts
        held = self.kv_cache_manager.get_block_ids(request.request_id)
        return sum(
            max(cdiv(tokens, size) - len(blocks), 0)
            for size, blocks in zip(self._block_sizes, held, strict=True)
        )
