"""The step as a proposer sees it."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm.distributed import get_tensor_model_parallel_rank

from vllm_specplus.control.memory import PROMPT_CHUNK
from vllm_specplus.engine.batch import (
    Step,
    accepted_rows,
    draft_room,
    kept_rows,
    prompt_chunks,
    text_before,
)
from vllm_specplus.engine.request_options import RequestOptions
from vllm_specplus.engine.verify import most_probable
from vllm_specplus.step import LatentStep, Observation, ReadKV, StepContext, TargetRows
from vllm_specplus.tree import DraftBatch

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams

    from vllm_specplus.engine.drafter import Drafter
    from vllm_specplus.engine.v1 import V1Batch


class Proposing:
    """Shows every step to the drafter, with what its requests ask for."""

    def __init__(self, drafter: Drafter, batch: V1Batch, most_nodes: int, max_model_len: int):
        """``most_nodes`` of a request that asks for nothing."""
        self._drafter, self._batch = drafter, batch
        self._most_nodes, self._max_model_len = most_nodes, max_model_len
        self._options: dict[str, tuple[SamplingParams | None, RequestOptions]] = {}

    def relaxed_stops(self) -> list[frozenset[int] | None]:
        """See ``VerifyBatch``."""
        return [each.relaxed_stops for each in self._requests_options()]

    def _requests_options(self) -> list[RequestOptions]:
        return [self._options_of(name) for name in self._batch.request_ids]

    def _options_of(self, request_id: str) -> RequestOptions:
        params = self._batch.params(request_id)
        known = self._options.get(request_id)
        if known is not None and known[0] is params:
            return known[1]
        if known is not None:
            # The next turn of a session of streaming input, under the same id. Its prompt is what
            # was said, without what was cut away, and it may have another salt: a new request.
            self._drafter.forget(request_id)
        adapter = self._batch.adapter(request_id)
        options = RequestOptions.of(params, self._most_nodes, adapter)
        self._options[request_id] = params, options
        return options

    def forget(self, request_id: str) -> None:
        """The request is gone."""
        self._options.pop(request_id, None)
        self._batch.forget(request_id)
        self._drafter.forget(request_id)

    def propose(
        self, step: Step, decoding: np.ndarray, hidden: torch.Tensor,
        layers: list[torch.Tensor] | None, read_kv: ReadKV, latents: LatentStep | None,
    ) -> DraftBatch:  # fmt: skip
        """Drafts for the next step, on the rank that drafts; none if nobody watches this one.

        ``decoding`` bool [R] requests that have an output; ``hidden`` [T, hidden] of the batch's
        rows, ``layers`` the same of the layers that the proposer asks for.
        """

        self._count(step, decoding)

        def look() -> StepContext:
            context = self._context(step, decoding)
            context.target_kv, context.latents = read_kv, latents
            context.pages = self._batch.pages
            context.target_rows = self._target_rows(step, hidden, layers)
            return context

        with self._drafter.lead():  # also of a step without: the other ranks wait for its end
            if not step.watched:
                return DraftBatch.empty(len(decoding))
            return self._drafter.draft(len(decoding), look)

    def _context(self, step: Step, decoding: np.ndarray) -> StepContext:
        options, num_tokens = self._requests_options(), self._batch.num_tokens
        limits = np.minimum([each.max_nodes for each in options], self._most_nodes)
        chain_only = np.array([each.chain_only for each in options], bool)
        self._drafter.counters.add("chain_fallbacks:structured_output", int(chain_only.sum()))
        tokens = step.rows.tokens
        if chain_only.any():  # a grammar's mask is in their logits already: nobody learns from them
            tokens = np.where(np.repeat(chain_only, np.diff(step.rows.starts)), -1, tokens)
        return StepContext(
            request_ids=self._batch.request_ids,
            token_ids=self._batch.texts,
            num_tokens=num_tokens,
            max_nodes=draft_room(num_tokens, limits, decoding, self._max_model_len),
            chain_only=chain_only,
            observation=Observation(tokens, step.previous, step.top_ids, accepted_rows(step)),
            num_prompt_tokens=self._batch.num_prompt,
            cache_salts=[each.cache_salt for each in options],
            ends=[each.ends for each in options],
            tpot_targets=np.array([each.tpot_target for each in options]),
            sampling=self._batch.sampling([each.seed for each in options]),
            versions=self._batch.versions(),
            row_starts=step.rows.starts,
            target_probs=step.target_probs,
        )

    def _target_rows(
        self, step: Step, hidden: torch.Tensor, layers: list[torch.Tensor] | None
    ) -> TargetRows | None:
        """What was computed for the rows on the kept texts, for a proposer that asks."""
        if not self._drafter.proposer.reads_hidden:
            return None
        rows, positions, starts = kept_rows(step)
        index = self._batch.to_device(rows)
        states = torch.cat([each[index] for each in layers or [hidden]], -1)
        return TargetRows(states, positions, starts, self._batch.pages)

    def show_prompt(self, step: Step, hidden: torch.Tensor) -> None:
        """Let the proposer see what follows every prompt token read in this step; the verified
        rows, a request's last ones, are observed with the step. On every rank: the output layer
        is collective."""
        if not self._drafter.proposer.reads_prompt or not step.shape.prompt_rows:
            return
        start = time.perf_counter()
        # They have logits as the rows of drafts do, and a budget of memory holds for both.
        most = min(PROMPT_CHUNK, self._drafter.controller.max_rows)
        for request, begin, count, row in prompt_chunks(step, most):
            logits = self._batch.logits(request, hidden[row : row + count])
            if get_tensor_model_parallel_rank() == 0:
                look = partial(self._prompt_chunk, request, begin, logits)
                self._drafter.observe_prompt(look)
        self._drafter.counters.add("draft_seconds", time.perf_counter() - start)

    def _prompt_chunk(self, request: int, begin: int, logits: torch.Tensor) -> Observation:
        """What the ``logits`` [n, V] say of a prompt's tokens from ``begin`` on."""
        ids = most_probable(logits, self._drafter.proposer.top_k)[0].cpu().numpy()
        text, count = self._batch.texts[request], len(ids)
        previous = text_before(text, begin, count)
        salt = self._options_of(self._batch.request_ids[request]).cache_salt
        tokens = text[begin : begin + count]
        return Observation(tokens, previous, ids, np.ones(count, bool), salt)

    def _count(self, step: Step, decoding: np.ndarray) -> None:
        """Count decoding steps; a prompt's last chunk makes its first token, not a step."""
        in_output = (step.num_computed >= self._batch.num_prompt) & decoding
        lengths, counters = step.acceptance.lengths, self._drafter.counters
        requests = tokens = int(in_output.sum())
        if step.drafted:
            tokens = int(lengths[in_output].sum())
            nodes = np.diff(step.rows.starts) - 1
            counters.add("nodes_drafted", int(nodes[in_output].sum()))
            counters.add("nodes_accepted", tokens - requests)
        counters.add("request_steps", requests)
        counters.add("output_tokens", tokens)
