"""vLLM's V1 model runner, as the rest of this folder sees it.

The one place that reads the fields of ``GPUModelRunner`` and of its input batch. A runner of
another generation needs a file like this one, and overrides like those of ``runner.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm.utils.torch_utils import PIN_MEMORY

from vllm_specplus.engine import row_processors
from vllm_specplus.engine.batch import BatchView, Step, cache_slots
from vllm_specplus.engine.row_penalties import Texts
from vllm_specplus.engine.row_sampling import is_plain_greedy
from vllm_specplus.engine.text_versions import TextVersions
from vllm_specplus.engine.uploads import Arrays, upload
from vllm_specplus.engine.verify import VerifyBatch
from vllm_specplus.step import Rows, Sampling

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    from vllm.v1.worker.utils import AttentionGroup

    from vllm_specplus.engine.attention.base import PageCache


class V1Batch:
    """The current batch of R requests; arrays are views, good for one step."""

    def __init__(self, runner: GPUModelRunner):
        self._runner = runner
        self._versions = TextVersions()
        self._versions_before = np.empty(0, np.int64)
        """int64 [R] of the texts before the step that runs."""

    # -- requests ---------------------------------------------------------------

    @property
    def request_ids(self) -> list[str]:
        """[R] in the batch's order."""
        return self._runner.input_batch.req_ids

    def params(self, request_id: str) -> SamplingParams | None:
        """What a request asked for."""
        return self._runner.requests[request_id].sampling_params

    def adapter(self, request_id: str) -> str:
        """The name of the LoRA adapter that a request asks for; "" if for none."""
        adapter = self._runner.requests[request_id].lora_request
        return "" if adapter is None else adapter.lora_name

    def prompt(self, request_id: str) -> list[int]:
        """Its prompt's ids."""
        return self._runner.requests[request_id].prompt_token_ids

    @property
    def texts(self) -> np.ndarray:
        """int32 [R, max_model_len] prompts and outputs."""
        return self._runner.input_batch.token_ids_cpu

    @property
    def num_tokens(self) -> np.ndarray:
        """int32 [R] known tokens of each text."""
        batch = self._runner.input_batch
        return batch.num_tokens_no_spec[: batch.num_reqs].astype(np.int32)

    @property
    def num_prompt(self) -> np.ndarray:
        """int32 [R] tokens of each prompt."""
        batch = self._runner.input_batch
        return batch.num_prompt_tokens[: batch.num_reqs]

    def versions(self) -> np.ndarray:
        """int64 [R] see ``TextVersions.look``."""
        return self._versions.look(self.request_ids, self.num_tokens, self.num_prompt)

    def forget(self, request_id: str) -> None:
        """The request is gone."""
        self._versions.forget(request_id)

    @property
    def num_computed(self) -> np.ndarray:
        """int32 [R] tokens whose keys and values were in the cache before the step."""
        batch = self._runner.input_batch
        return batch.num_computed_tokens_cpu[: batch.num_reqs]

    @property
    def discarded(self) -> np.ndarray:
        """bool [R]: requests whose prompt is not read to its end, so that nothing is output."""
        return self._runner.discard_request_mask.np[: self._runner.input_batch.num_reqs]

    # -- the step ---------------------------------------------------------------

    def view(self, scheduler_output: SchedulerOutput, num_scheduled: np.ndarray) -> BatchView:
        """The batch of a step that begins; ``num_scheduled`` int32 [R] as vLLM hands it over."""
        # A cut is seen before the step makes the text longer again.
        self._versions_before = self.versions()
        drafts = scheduler_output.scheduled_spec_decode_tokens
        return BatchView(
            request_ids=self.request_ids,
            drafts=[drafts.get(name) or () for name in self.request_ids],
            num_scheduled=num_scheduled,
            num_computed=self.num_computed,
            token_ids=self.texts,
            input_ids=self._runner.input_ids.np,
        )

    def blank(self, rows: np.ndarray) -> None:
        """Let batch rows ``rows`` int64 [n] read token 0: vLLM puts -1 where a grammar refuses a
        draft."""
        if len(rows):
            self._runner.input_ids.gpu[self.to_device(rows)] = 0

    def mix_tokens(self, rows: int, vocab_size: int) -> None:
        """Let the first ``rows`` batch rows read tokens as if drawn from ``vocab_size`` ids, the
        same on every rank."""
        draws = torch.Generator().manual_seed(0)
        tokens = torch.randint(vocab_size, (rows,), generator=draws, dtype=torch.int32)
        self._runner.input_ids.gpu[:rows] = tokens.to(self._runner.input_ids.gpu.device)

    def shift_positions(self, rows: torch.Tensor, shifts: torch.Tensor) -> None:
        """Add ``shifts`` int64 [n] to the positions of batch rows ``rows`` int64 [n], both on the
        device. Cache slots, which vLLM has computed from sequential positions, stay."""
        self._runner.positions.index_add_(0, rows, shifts)
        if self._runner.uses_mrope:
            # Time, height and width advance alike in text, which is all that is drafted.
            positions = self._runner.mrope_positions.gpu
            positions.index_add_(1, rows, shifts.expand(len(positions), -1))

    def logits(self, request: int | None, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [n, V] of rows ``hidden`` [n, hidden] that are not the step's verified ones: of a
        request of the batch, with its adapter, or None: of nobody. On every rank."""
        runner = self._runner
        if runner.lora_config:  # adapters go by rows, of which a step has told others
            batch = runner.input_batch
            number = 0 if request is None else int(batch.request_lora_mapping[request])
            asked = batch.lora_id_to_lora_request
            rows = (number,) * len(hidden)
            runner._set_active_loras(rows, rows, {asked[number]} if number else set())
        return runner.model.compute_logits(hidden)

    # -- sampling ---------------------------------------------------------------

    def serve_processors(self) -> None:
        """See ``row_processors.complete``."""
        runner = self._runner
        row_processors.complete(
            runner.input_batch.logitsprocs, runner.vllm_config, runner.device, PIN_MEMORY
        )

    def sampling(self, seeds: list[int | None]) -> Sampling:
        """How the requests sample, on the host."""
        batch = self._runner.input_batch
        return Sampling(
            temperature=batch.temperature_cpu[: batch.num_reqs],
            top_k=batch.top_k_cpu[: batch.num_reqs],
            top_p=batch.top_p_cpu[: batch.num_reqs],
            seeds=seeds,
        )

    def verify_batch(
        self, rows: Rows, relaxed_stops: list[frozenset[int] | None],
        outside_pictures: np.ndarray | None, hidden: torch.Tensor | None,
    ) -> VerifyBatch:  # fmt: skip
        """What the step's ``rows`` are verified by; the arguments as in ``VerifyBatch``."""
        sampling, metadata = self.sampling([]), self._runner.input_batch.sampling_metadata
        return VerifyBatch(
            request_ids=self.request_ids,
            rows=rows,
            metadata=metadata,
            texts=None if metadata.no_penalties else self._texts_before(),
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            discarded=self.discarded,
            relaxed_stops=relaxed_stops,
            outside_pictures=outside_pictures,
            hidden=hidden,
        )

    def _texts_before(self) -> Texts:
        """The texts, before the step's tokens are known."""
        batch = self._runner.input_batch
        asking = (
            batch.frequency_penalties_reqs
            | batch.presence_penalties_reqs
            | batch.repetition_penalties_reqs
        )
        return Texts(
            request_ids=self.request_ids,
            token_ids=self.texts,
            num_tokens=self.num_tokens,
            num_prompt=self.num_prompt,
            versions=self._versions_before,
            penalised=np.array([name in asking for name in self.request_ids], bool),
        )

    def all_greedy_decodes(self, step: Step) -> bool:
        """Does every row of a ``step`` get logits, whose best token is what its request outputs?"""
        metadata = self._runner.input_batch.sampling_metadata
        return len(step.batch_rows) == step.num_scheduled.sum() and is_plain_greedy(metadata)

    # -- memory -----------------------------------------------------------------

    @property
    def pages(self) -> np.ndarray:
        """int32 [R, P] pages of the KV cache that hold each text, where all layers have the
        same."""
        return self._runner.input_batch.block_table[0].block_table.np

    @property
    def page_size(self) -> int:
        """Slots of a page."""
        return self._runner.input_batch.block_table[0].block_size

    def slots(self, request: np.ndarray, position: np.ndarray, group: int = 0) -> np.ndarray:
        """Cache slot int64 [n] of each (``request``, ``position`` in its text) int64 [n], in the
        caches of a ``group`` of layers."""
        table = self._runner.input_batch.block_table[group]
        return cache_slots(table.block_table.np, table.block_size, request, position)

    def move(
        self, caches: Sequence[PageCache], request: np.ndarray, source: np.ndarray,
        destination: np.ndarray,
    ) -> None:  # fmt: skip
        """Copy what the ``caches`` of all groups hold at the positions ``source`` of each
        ``request`` to ``destination``, int64 [n] each; see ``PageCache.move``."""
        for group, cache in enumerate(caches):
            cache.move(self.slots(request, source, group), self.slots(request, destination, group))

    def groups(
        self, common: CommonAttentionMetadata, slot_mappings: Mapping[int, torch.Tensor] | None
    ) -> Iterator[tuple[AttentionGroup, CommonAttentionMetadata]]:
        """Every group of layers with a builder of its own, and a step's metadata of its pages.

        ``common`` is that of the first group of KV caches; vLLM hands over the ``slot_mappings``
        of all, int64 [num_tokens] or longer, by its number.
        """
        tables = self._runner.input_batch.block_table
        for number, groups in enumerate(self._runner.attn_groups):
            own = common
            if number:
                own = copy(common)
                own.block_table_tensor = tables[number].get_device_tensor(common.num_reqs)
                own.slot_mapping = slot_mappings[number][: common.num_actual_tokens]
            for group in groups:
                yield group, own

    def upload(self, arrays: Arrays) -> dict[str, torch.Tensor]:
        """Copies of ``arrays`` where the model is, by one transfer on the current stream."""
        return upload(arrays, self._runner.device)

    def to_device(self, array: np.ndarray) -> torch.Tensor:
        """A copy of one array where the model is, on the current stream."""
        return self.upload({"array": array})["array"]
