"""Our model runner: vLLM's V1 runner with draft trees, as a mixin of named overrides.

One step, in vLLM's order::

    _prepare_inputs            rows, depths; positions follow depth
    _build_attention_metadata  trees attached to the stock metadata
    (forward)                  attention/; exit_pass.py may end it early
    _sample                    verify.py follows the trees; the KV cache is compacted
    propose_draft_token_ids    shows the step to the proposer, returns its trees

What may be added here: an override of a method of vLLM's runner, in a few lines that hand over to
another file. What is computed from a batch belongs to ``batch.py`` (pure), what is read off the
runner to ``v1.py``, what a rule decides to ``verify.py`` and ``samplers/``, times to ``clock.py``,
images to ``image_rows.py``, ``pictures.py`` and ``latents.py``. Nothing else in this folder
subclasses the runner's steps.
"""

from __future__ import annotations

import time
from itertools import chain
from typing import Any

import numpy as np
import torch
from vllm.distributed import get_tensor_model_parallel_rank, get_tp_group
from vllm.v1.outputs import SamplerOutput
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_specplus.engine import attention, needs
from vllm_specplus.engine.attention.base import PageCache
from vllm_specplus.engine.aux_states import AuxiliaryStates
from vllm_specplus.engine.batch import Step, describe, logits_rows
from vllm_specplus.engine.clock import StepClock, StepProfiler
from vllm_specplus.engine.counts import hand_over
from vllm_specplus.engine.exit_pass import ExitPassMixin
from vllm_specplus.engine.image_rows import DiscardedDrawsMixin, ImageRowsMixin
from vllm_specplus.engine.memory_plan import common_pages, for_kv_cache
from vllm_specplus.engine.pictures import PictureRows
from vllm_specplus.engine.profile_trees import profiled_step
from vllm_specplus.engine.proposing import Proposing
from vllm_specplus.engine.tree_metadata import StepTrees, check_groups, tree_metadata
from vllm_specplus.engine.verify import Verifier, VerifyBatch, make_verifier
from vllm_specplus.kernels import native
from vllm_specplus.step import LatentStep
from vllm_specplus.tree import moves


class TreeRunnerMixin(ExitPassMixin, ImageRowsMixin):
    """Overrides of ``GPUModelRunner``; see the module's docstring for the order."""

    _step: Step | None = None
    _trees: StepTrees | None = None
    _pictures: PictureRows | None = None
    _logits_rows: np.ndarray
    """int64 [L] batch rows that get logits in the current step."""
    _hidden: torch.Tensor | None = None
    """[L, hidden] of the step's verified rows, for a judge."""
    _profiled: str | None = None
    """The kind of step with drafts that is being profiled."""
    _layers: dict[str, Any]
    """The target's attention layers by name."""
    _caches: list[PageCache]
    """One per group of layers that have the same pages."""
    verifier: Verifier

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._aux = AuxiliaryStates.of(self.drafter, self.model_config)
        self.use_aux_hidden_state_outputs |= self._aux.wanted
        self.batch.serve_processors()
        self.proposing = Proposing(
            self.drafter, self.batch, self.num_spec_tokens, self.max_model_len
        )
        self._clock = StepClock(self.drafter)

    # -- start ------------------------------------------------------------------

    def load_model(self, *args, **kwargs) -> None:
        super().load_model(*args, **kwargs)
        codebook = getattr(self.get_model(), "codebook", None)
        self.verifier = make_verifier(
            self.drafter.config, self.drafter.proposer, self.sampler, self.device, codebook,
            self.drafter.counters, self.drafter.draft_probs, get_tp_group(),
            self.get_model().embed_input_ids,
        )  # fmt: skip
        self.make_exits()
        if (layout := getattr(self.get_model(), "picture_layout", None)) is not None:
            self._pictures = PictureRows(layout, self.batch.upload)

    def _get_eagle3_aux_layers_from_config(self) -> tuple[int, ...] | None:
        return self._aux.layers(self.get_model())

    def memory_for_kv_cache(self, available: int) -> int:
        """See ``memory_plan.for_kv_cache``."""
        specs = self.get_kv_cache_spec().values()
        slot = sum(each.page_size_bytes // each.block_size for each in specs)
        return for_kv_cache(available, self.vllm_config, self.drafter.proposer, slot)

    def initialize_kv_cache(self, kv_cache_config, *args, **kwargs) -> None:
        super().initialize_kv_cache(kv_cache_config, *args, **kwargs)
        self._layers = attention.cached_layers(self.vllm_config)
        needs.check_loaded(self._layers, kv_cache_config, self.drafter.config.serves())
        check_groups(chain.from_iterable(self.attn_groups))
        self._caches = attention.page_caches(self._layers, self.kv_cache_config.kv_cache_groups)
        self.drafter.attention_layers = self._layers
        page = self.batch.page_size
        self.drafter.share_pages(common_pages(kv_cache_config, page), page, self.max_num_reqs)

    def profile_step_cost(self) -> None:
        """Compile what the first steps should not wait for, and measure (or read) what a step
        costs; after the model is warm."""
        if self.device.type == "cuda":
            dtype, rows = self.model_config.dtype, self.uniform_decode_query_len
            attention.warm_up(self._layers, self._caches, dtype, rows)
            self.verifier.warm_up(self.model_config.get_vocab_size())
        control = self.drafter.config.control
        if control.policy == "goodput":
            most = min(self.max_num_tokens, self.max_num_reqs * self.uniform_decode_query_len)
            profiler = StepProfiler(self.vllm_config, self.device, self._run_profiled)
            self.drafter.set_cost(
                profiler.profile(control.cost_file, most, trees=self._pictures is None)
            )

    def _run_profiled(self, rows: int, kind: str) -> None:
        """One forward pass over ``rows`` rows as in a step of this kind, with its logits."""
        drafted = kind != "plain"
        # Of one token, which a dummy batch holds, all rows would go to the same experts.
        self.batch.mix_tokens(rows, self.model_config.get_vocab_size())
        self._profiled = kind if drafted else None
        try:
            hidden, _ = self._dummy_run(
                rows,
                force_attention=drafted,
                uniform_decode=drafted,
                profile_seq_lens=self.uniform_decode_query_len,
            )
        finally:
            self._profiled = None
        self._after_forward(hidden[:rows])

    def _after_forward(self, hidden: torch.Tensor) -> None:
        """What else the target computes for every verified row."""
        self.batch.logits(None, hidden)

    # -- inputs -----------------------------------------------------------------

    def execute_model(self, scheduler_output, *args, **kwargs):
        self._clock.stop(scheduler_output.num_scheduled_tokens)
        started, drafting = time.perf_counter(), self._clock.drafting
        out = super().execute_model(scheduler_output, *args, **kwargs)
        if self._step is not None and get_tensor_model_parallel_rank() == 0:
            names = scheduler_output.num_scheduled_tokens
            self._clock.start(started, drafting, names, self._step.shape)
        return out

    def _calc_spec_decode_metadata(self, num_draft_tokens, cu_num_scheduled_tokens):
        """The stock method also prepares its rejection sampler, which we do not use."""
        self._logits_rows = logits_rows(num_draft_tokens, cu_num_scheduled_tokens)
        nothing = torch.empty(0, dtype=torch.int32)
        return SpecDecodeMetadata(
            draft_token_ids=nothing,
            num_draft_tokens=num_draft_tokens.tolist(),
            cu_num_draft_tokens=nothing,
            cu_num_sampled_tokens=nothing,
            target_logits_indices=nothing,
            bonus_logits_indices=nothing,
            logits_indices=nothing,  # sent with the step's other arrays
        )

    def _prepare_inputs(self, scheduler_output, num_scheduled_tokens):
        _, metadata, most = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)
        view = self.batch.view(scheduler_output, num_scheduled_tokens)
        self._step = step = describe(view, self._logits_rows, self.serves_chains)
        step.watched = self.drafter.watches(step.drafted)
        self.drafter.counters.add("chain_fallbacks:resumed", step.resumed)
        self.batch.blank(step.batch_rows[step.rows.tokens < 0])
        trees, metadata.logits_indices = StepTrees.send(step, self.batch.upload, self.device.type)
        self._trees = trees
        if trees is not None:
            self.batch.shift_positions(trees.uploaded["rows"], trees.uploaded["shifts"])
        if self._pictures is not None:
            follows = self._pictures.read(self.batch, num_scheduled_tokens, step.rows)
            self.get_model().picture_follows[: len(follows)] = follows
        return metadata.logits_indices, metadata, most

    serves_chains = False
    """Does our attention serve chains and single rows better than the stock one?"""

    def _build_attention_metadata(self, *args, **kwargs):
        metadata, common = super()._build_attention_metadata(*args, **kwargs)
        step, step_trees = self._step, self._trees
        if self._profiled is not None:
            step = profiled_step(common, self._profiled, self.serves_chains)
            step_trees, _ = StepTrees.send(step, self.batch.upload, self.device.type)
        if step is None or (self._pictures is None and step_trees is None):
            return metadata, common
        for group, own in self.batch.groups(common, kwargs["slot_mappings"]):
            # One tree object serves every layer of the group.
            if not getattr(group.backend, "sees_prompt", True):
                trees = self._pictures.attention(
                    self.batch, common, step.num_scheduled, step.rows, step.batch_rows,
                    self.device.type,
                )  # fmt: skip
            elif step_trees is not None:
                trees = tree_metadata(step_trees, own, group)
            else:
                continue
            attention.attach(metadata, group, self._layers, trees)
        return metadata, common

    # -- verification -----------------------------------------------------------

    def _sample(self, logits, spec_decode_metadata) -> SamplerOutput:
        step = self._step
        if step is None:
            return super()._sample(logits, spec_decode_metadata)
        start = time.perf_counter()
        verdict = self.verifier.verify(logits, self._verify_batch(step), step.watched)
        step.acceptance, step.top_ids = verdict.acceptance, verdict.top_ids
        step.target_probs, step.broken = verdict.target_probs, verdict.broken
        self.drafter.counters.add("verify_seconds", time.perf_counter() - start)
        self._compact(step)
        # vLLM reads the output back at once; on the host it costs no second copy.
        return SamplerOutput(
            sampled_token_ids=torch.from_numpy(verdict.acceptance.output),
            logprobs_tensors=verdict.logprobs,
        )

    def _verify_batch(self, step: Step) -> VerifyBatch:
        outside = None
        if self._pictures is not None:  # words are not interchangeable
            outside = self._pictures.outside(step.batch_rows[step.rows.starts[:-1]])
        stops = self.proposing.relaxed_stops() if self.verifier.relaxes else []
        return self.batch.verify_batch(step.rows, stops, outside, self._hidden)

    def _compact(self, step: Step) -> None:
        """Move accepted nodes to the consecutive slots that their text owns."""
        if not step.tree_attention.any():
            return
        start = time.perf_counter()
        request, source, destination = moves(step.acceptance.path)
        if len(request):
            # Only trees move, and a tree's root is the first row of its request.
            root = step.num_computed[request].astype(np.int64)
            self.batch.move(self._caches, request, root + source, root + destination)
            self.drafter.counters.add("kv_slots_moved", len(request))
        self.drafter.counters.add("compact_seconds", time.perf_counter() - start)

    def sample_tokens(self, grammar_output):
        if self.verifier.reads_hidden and self.execute_model_state is not None:
            size = self.model_config.get_hidden_size()
            self._hidden = self._aux.of_rows(self.execute_model_state, size)
        try:
            output = super().sample_tokens(grammar_output)
            return hand_over(output, self.drafter.counters, self._step)
        finally:
            self._step = self._trees = self._hidden = None

    # -- drafting ---------------------------------------------------------------

    def _input_fits_in_drafter(self, common_attn_metadata) -> bool:
        """Always: the stock answer near max_model_len schedules drafts of zeros."""
        return True

    def propose_draft_token_ids(
        self, scheduler_output, sampled_token_ids, sampling_metadata, hidden_states,
        sample_hidden_states, aux_hidden_states, *args, **kwargs,
    ):  # fmt: skip
        self.proposing.show_prompt(self._step, hidden_states)
        decoding = np.array([bool(tokens) for tokens in sampled_token_ids], bool)
        if get_tensor_model_parallel_rank() != 0:
            self.drafter.accompany(self._read_kv)
            return [[] for _ in decoding]  # vLLM takes rank 0's drafts
        layers = self._aux.for_proposer(aux_hidden_states)
        drafts = self.proposing.propose(
            self._step, decoding, hidden_states, layers, self._read_kv, self._latents()
        ).split()
        return drafts if self._pictures is None else self._pictures.cut(drafts, self.batch)

    def _read_kv(self, requests: np.ndarray, positions: np.ndarray):
        """See ``step.ReadKV``."""
        return self._caches[0].read(self.batch.slots(requests, positions))

    def _latents(self) -> LatentStep | None:
        """Where the pictures are, of a model whose tokens are latents."""
        return None

    # -- the end ----------------------------------------------------------------

    def _on_request_state_removed(self, req_id, req_state) -> None:
        super()._on_request_state_removed(req_id, req_state)
        self.proposing.forget(req_id)

    def close_drafter(self) -> None:
        """Let the proposer end what it has started."""
        if get_tensor_model_parallel_rank() == 0:
            self.drafter.close()


class TreeCPUModelRunner(TreeRunnerMixin, DiscardedDrawsMixin, CPUModelRunner):
    @property
    def serves_chains(self) -> bool:
        """With several rows per request the stock kernel takes longer, and dividing a
        batch among two kernels costs copies in every layer."""
        return native.library() is not None


class TreeGPUModelRunner(TreeRunnerMixin, GPUModelRunner):
    pass
