"""The object vLLM holds as its ``custom_class`` drafter: our proposer under its
controller, guarded."""

from __future__ import annotations

import logging
import os
import time
from typing import TYPE_CHECKING

import numpy as np
from vllm.distributed import get_tensor_model_parallel_rank

from vllm_specplus import metrics
from vllm_specplus.config import METHODS
from vllm_specplus.control import memory
from vllm_specplus.control.controller import Controller
from vllm_specplus.plugin import CONFIG_KEY
from vllm_specplus.proposers import proposer_class
from vllm_specplus.proposers.base import Observation, StepContext
from vllm_specplus.tree import DraftBatch

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger("vllm.specplus")


class Drafter:
    """Runs the configured proposer. A fault in drafting never reaches the request:
    it is counted, logged once, and the step goes on undrafted."""

    def __init__(self, vllm_config: VllmConfig):
        extra = vllm_config.additional_config[CONFIG_KEY]
        self.config = METHODS[extra["config"]["method"]].model_validate(extra["config"])
        # Every rank verifies and compacts; one of them counts for /metrics.
        counts = get_tensor_model_parallel_rank() == 0
        self.counters = metrics.Counters(os.environ.get(metrics.VARIABLE) if counts else None)
        model = vllm_config.model_config
        self.proposer = proposer_class(self.config.method)(
            self.config,
            vocab_size=model.get_vocab_size(),
            fingerprint=f"{model.model}|{model.tokenizer}|{model.get_vocab_size()}",
        )
        self.controller = Controller(
            self.config.control,
            self.proposer.sources,
            max_nodes=self.config.num_speculative_tokens,
            max_rows=max_rows(vllm_config),
            counters=self.counters,
        )
        self._warned = False
        self.proposer.report = self._failed

    def load_model(self, model) -> None:
        """Called by vLLM when the target is loaded."""
        self.proposer.warm_up()

    def propose(self, *args, **kwargs):
        """vLLM's plain interface gives a drafter neither logits nor trees."""
        raise RuntimeError(
            "this drafter needs vllm-specplus's worker; it is set by --speculative-config with a "
            "method of vllm-specplus, or by worker_cls when custom_class is written by hand"
        )

    def draft(self, step: StepContext) -> DraftBatch:
        start = time.perf_counter()
        try:
            self.controller.prepare(step)
            proposing = time.perf_counter()
            drafts = self.proposer.propose(step)
            proposed = time.perf_counter()
            self.controller.drafting_took(int((step.max_nodes > 0).sum()), proposed - proposing)
            self.counters.add("draft_seconds", proposed - proposing)
            self.counters.add("control_seconds", proposing - start)
            drafts = self.controller.choose(step, drafts)
            self.counters.add("control_seconds", time.perf_counter() - proposed)
            return drafts
        except Exception as error:
            self._failed(error)
            return DraftBatch.empty(len(step.request_ids))

    def observe_prompt(self, tokens: np.ndarray, previous: np.ndarray, top_ids: np.ndarray) -> None:
        try:
            self.proposer.observe_prompt(
                Observation(tokens, previous, top_ids, np.ones(len(tokens), bool))
            )
        except Exception as error:
            self._failed(error)

    def forget(self, request_id: str) -> None:
        self.proposer.forget(request_id)
        self.controller.forget(request_id)

    def close(self) -> None:
        self.proposer.close()

    def _failed(self, error: Exception) -> None:
        self.counters.add("draft_failures")
        if not self._warned:
            self._warned = True
            logger.warning(
                "drafting with %s failed, decoding goes on without drafts: %s",
                self.config.method,
                error,
                exc_info=error,
            )


def max_rows(vllm_config: VllmConfig) -> int:
    """Most rows a step may verify: the batch's token budget and the logits' memory."""
    scheduler, model = vllm_config.scheduler_config, vllm_config.model_config
    ranks = vllm_config.parallel_config.tensor_parallel_size
    row = memory.logits_row_bytes(model.get_vocab_size(), model.dtype.itemsize, ranks)
    by_logits = memory.LOGITS_BUDGET // row
    return min(scheduler.max_num_batched_tokens, max(by_logits, scheduler.max_num_seqs))
