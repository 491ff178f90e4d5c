"""The object vLLM holds as its ``custom_class`` drafter: our proposer under its
controller, guarded."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.config import CUDAGraphMode
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.tokenizers import cached_tokenizer_from_config

from vllm_specplus import overlap, registry
from vllm_specplus.control.allowed import can_be_text
from vllm_specplus.control.controller import Controller
from vllm_specplus.control.cost import StepCost
from vllm_specplus.control.settings import ControlConfig
from vllm_specplus.drafting.graphs import CudaRecorder
from vllm_specplus.engine import attention
from vllm_specplus.engine.faults import FaultLog
from vllm_specplus.engine.memory_plan import max_rows
from vllm_specplus.engine.names import CONFIG_KEY
from vllm_specplus.engine.needs import gives_layers
from vllm_specplus.engine.ranks import devices_of_ranks, lockstep
from vllm_specplus.engine.target_layers import TargetLayers
from vllm_specplus.engine.target_vocabulary import load_vocabulary
from vllm_specplus.metrics import Counters
from vllm_specplus.proposer import Services
from vllm_specplus.step import DraftProbs, Observation, ReadKV, Rows, StepContext
from vllm_specplus.tree import DraftBatch

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger("vllm.specplus")


class Drafter:
    """Runs the configured proposer. A fault in drafting never reaches the request:
    it is counted, logged, and the step goes on undrafted."""

    def __init__(self, vllm_config: VllmConfig):
        extra = vllm_config.additional_config[CONFIG_KEY]
        proposer = registry.method_class(extra["config"]["method"])
        self.config = proposer.config_class.model_validate(extra["config"])
        # Every rank verifies and compacts; vLLM reads the output of this one, with its counters.
        self._first_rank = get_tensor_model_parallel_rank() == 0
        self.counters = Counters()
        self._vllm_config = vllm_config
        self._log_fault = FaultLog(logger, self.config.method)
        self._method = proposer
        self._pages: tuple[int, int, int] | tuple[()] = ()
        self.attention_layers: dict[str, Any] = {}
        """The target's, by name, from the time on that it has a KV cache."""
        self._cost: StepCost | None = None
        self._begin(self.config.control)

    def _begin(self, control: ControlConfig) -> None:
        self._lockstep = lockstep()
        self.proposer = overlap.proposer(self._method, self.config, self._services())
        self.controller = Controller(
            control,
            self.proposer.sources,
            max_nodes=self.config.num_speculative_tokens,
            max_rows=max_rows(self._vllm_config, self.proposer),
            counters=self.counters,
            levels=self.proposer.levels,
            draws=self.proposer.rule is not None,
        )
        self._drafted: tuple[list[str], DraftBatch] | None = None

    def renew(self, control: ControlConfig | None = None) -> None:
        """Forgets all that was learnt since the start: proposer and controller are made again, what
        a step costs is as it was measured. ``control``: what decides from now on, by default what
        was configured."""
        self.proposer.close()
        self._begin(control or self.config.control)
        if self._cost is not None:
            self.set_cost(self._cost)
        self._load_draft()
        if self._pages:
            self.share_pages(*self._pages)

    def set_cost(self, cost: StepCost) -> None:
        """Tells the controller what a step costs."""
        self._cost, self.controller.cost = cost, copy.deepcopy(cost)

    def _services(self) -> Services:
        config, model = self._vllm_config, self._vllm_config.model_config
        on_cuda = self._first_rank and config.device_config.device_type == "cuda"
        # As of the target: recorded where its steps are.
        graphs = on_cuda and config.compilation_config.cudagraph_mode != CUDAGraphMode.NONE
        return Services(
            vocab_size=model.get_vocab_size(),
            fingerprint=f"{model.model}|{model.tokenizer}|{model.get_vocab_size()}",
            report=self._failed,
            count=self.counters.add,
            target_layers=lambda: TargetLayers(self._model, config),
            target_vocabulary=lambda: self._vocabulary,
            codebook=lambda: getattr(self._model, "codebook", None),
            load_tokenizer=lambda: cached_tokenizer_from_config(model),
            context_pages=lambda: attention.context_pages(self.attention_layers),
            target_devices=lambda: self._devices,
            target_bytes=lambda: sum(weight.nbytes for weight in self._model.parameters()),
            record=CudaRecorder() if graphs else None,
            num_layers=model.get_total_num_hidden_layers(),
            gives_layers=lambda: gives_layers(model),
            lockstep=self._lockstep,
        )

    def load_model(self, model) -> None:
        """Called by vLLM when the target is loaded."""
        if self.proposer.borrows_vocabulary:
            self._vocabulary = load_vocabulary(model)  # of all ranks
        if self.proposer.places_processes:
            self._devices = devices_of_ranks(next(model.parameters()).device)  # of all ranks
        self._model = model
        self._load_draft()

    def _load_draft(self) -> None:
        device = next(self._model.parameters()).device
        dtype = self._vllm_config.model_config.dtype
        if self._first_rank:  # the one that drafts
            self.proposer.load_draft(device, dtype)
            self.proposer.warm_up()
        else:
            self.proposer.load_share(device, dtype)

    def share_pages(self, pages: int, page: int, max_requests: int) -> None:
        """See ``Proposer.share_pages``."""
        self._pages = pages, page, max_requests
        if not self._first_rank:
            self.accompany(_no_texts)
            return
        with self.lead():
            self.proposer.share_pages(pages, page, max_requests)

    def lead(self) -> AbstractContextManager[None]:
        """On the rank that drafts: within, it may draft with layers that all ranks share."""
        return nullcontext() if self._lockstep is None else self._lockstep.lead()

    def accompany(self, read_kv: ReadKV) -> None:
        """On the others: take part in what is drafted while the first one does :meth:`lead`."""
        if self._lockstep is not None:
            self._lockstep.accompany(read_kv)

    def propose(self, *args, **kwargs):
        """vLLM's plain interface gives a drafter neither logits nor trees."""
        raise RuntimeError(
            "this drafter needs vllm-specplus's worker; it is set by --speculative-config with a "
            "method of vllm-specplus, or by worker_cls when custom_class is written by hand"
        )

    def watches(self, drafted: bool) -> bool:
        """Is the step that runs to be looked at? See ``Controller.watches``. Where a proposer reads
        the target's hidden states, none is passed over, unless it ``may_miss`` some."""
        if not self._first_rank or (self.proposer.reads_hidden and not self.proposer.may_miss):
            return True
        return self.controller.watches(drafted)

    def draft(self, requests: int, look: Callable[[], StepContext]) -> DraftBatch:
        """Drafts for what ``look`` sees of a step of so many requests; none where anything fails,
        be it in ``look``, which takes memory."""
        start = time.perf_counter()
        try:
            step = look()
            self.controller.prepare(step)
            proposing = time.perf_counter()
            drafts = self.proposer.propose(step)
            drafts = can_be_text(drafts, self.proposer.services.vocab_size, step.ends)
            proposed = time.perf_counter()
            charged = self.proposer.charged(proposed - proposing)
            self.controller.drafting_took(step.max_nodes, charged)
            self.counters.add("draft_seconds", proposed - proposing)
            self.counters.add("control_seconds", proposing - start)
            drafts = self.controller.choose(step, drafts)
            self._drafted = list(step.request_ids), drafts
            end = time.perf_counter()
            self.counters.add("control_seconds", end - proposed)
            self.controller.looked(end - start, len(drafts.tokens))
            return drafts
        except Exception as error:
            self._failed(error)
            self._drafted = None
            return DraftBatch.empty(requests)

    def draft_probs(self, request_ids: list[str], rows: Rows) -> DraftProbs:
        """What the children of each verified row were drawn from.

        A tree that is not the one drafted last (its request sat out a step, or lost its
        parents on the way) is verified like a deterministic one, which holds for any draft.
        """
        index = np.full(len(rows.tokens), -1, np.int32)
        drawn = np.zeros(len(rows.tokens), np.int32)
        if self._drafted is None or self._drafted[1].draft_probs is None:
            return DraftProbs(torch.empty(0, 1), index, drawn)
        names, drafts = self._drafted
        ends = np.cumsum(drafts.counts)
        row_of = {name: i for i, name in enumerate(names)}
        for r, name in enumerate(request_ids):
            first, end = int(rows.starts[r]) + 1, int(rows.starts[r + 1])
            i = row_of.get(name)
            if i is None or first == end or end - first > drafts.counts[i]:
                continue
            begin = int(ends[i] - drafts.counts[i])
            drafted = slice(begin, begin + end - first)  # memory may have cut the tree's end
            parents = rows.parents[first:end]
            if (drafts.tokens[drafted] != rows.tokens[first:end]).any() or (
                drafts.parents[drafted] != parents - 1
            ).any():
                continue
            drawn_from = drafts.drawn_from[drafted]
            at = first - 1 + parents[drawn_from >= 0]
            index[at] = drawn_from[drawn_from >= 0]
            np.add.at(drawn, at, 1)
        return DraftProbs(drafts.draft_probs, index, drawn)

    def observe_prompt(self, look: Callable[[], Observation]) -> None:
        """Shows the proposer what ``look`` sees of a prompt."""
        try:
            self.proposer.observe_prompt(look())
        except Exception as error:
            self._failed(error)

    def forget(self, request_id: str) -> None:
        """Drop what is kept for a request that is gone. vLLM calls this in the middle of a step:
        a fault costs what is kept, not the engine."""
        for part in (self.proposer, self.controller) if self._first_rank else (self.controller,):
            try:
                part.forget(request_id)
            except Exception as error:
                self._failed(error)

    def close(self) -> None:
        self.proposer.close()

    def _failed(self, error: Exception) -> None:
        self.counters.add("draft_failures")
        self._log_fault(error)


def _no_texts(
    requests: np.ndarray, positions: np.ndarray
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """A ``ReadKV`` of before the first step."""
    raise RuntimeError("the target has computed nothing yet")
