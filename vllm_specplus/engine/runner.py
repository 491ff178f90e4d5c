"""Our model runner: stock ones with draft trees, as a mixin of named overrides.

One step, in vLLM's order::

    _prepare_inputs            rows, depths; positions follow depth
    _build_attention_metadata  trees attached to the stock metadata
    (forward)                  a back end of engine/attention
    _sample                    draw at every row, follow the trees, compact the KV
    propose_draft_token_ids    show the step to the proposer, return its trees
"""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numba import njit
from vllm import __version__ as vllm_version
from vllm.distributed import get_tensor_model_parallel_rank, get_tp_group
from vllm.v1.outputs import SamplerOutput
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_specplus.control import requests as request_controls
from vllm_specplus.control.cost import (
    PROFILE_ROUNDS,
    PROFILE_ROWS,
    CostProfile,
    StepCost,
    StepShape,
)
from vllm_specplus.control.requests import RequestControls
from vllm_specplus.engine import attention
from vllm_specplus.engine.attention.base import PageCache, TreeAttentionMetadata
from vllm_specplus.engine.pictures import PictureRows
from vllm_specplus.engine.verify import Verifier, VerifyBatch, make_verifier, top_ids
from vllm_specplus.kernels import native
from vllm_specplus.step import (
    Acceptance,
    LatentStep,
    Observation,
    Rows,
    Sampling,
    StepContext,
    TargetRows,
)
from vllm_specplus.tree import ancestor_mask, moves, row_depths

#: Prompt rows per call of the target's output layer while a proposer reads a
#: prompt: bounds the logits to this times the vocabulary.
PROMPT_CHUNK = 256


@dataclass(slots=True)
class Step:
    """One step between its hooks. ``R`` requests, ``L`` verified rows."""

    rows: Rows
    batch_rows: np.ndarray
    """int64 [L] index of each verified row among the batch's token rows."""
    tree_attention: np.ndarray
    """bool [R] requests served by our attention: all whose draft is not a chain; and, on
    the CPU, all that read no prompt in a step with drafts."""
    num_scheduled: np.ndarray
    """int32 [R] token rows of each request."""
    previous: np.ndarray
    """int32 [L] the token before each row on its path."""
    shape: StepShape
    """What was in the step, for the cost model."""
    top_ids: np.ndarray | None = None
    """int32 [L, k] most probable next ids of each row, for the proposer."""
    acceptance: Acceptance | None = None
    target_probs: torch.Tensor | None = None
    """float32 [L, V] the distribution at each row, for a proposer that asks."""


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a request's parameters say about drafting; fixed for its life."""

    max_nodes: int
    chain_only: bool
    cache_salt: str
    seed: int | None
    relaxed_stops: frozenset[int] | None
    """Its stop tokens; None: it must be verified losslessly."""


@dataclass(slots=True)
class Clock:
    """A step that is being timed, from its start to the next one's."""

    started: float
    request_ids: frozenset[str]
    shape: StepShape
    drafting: float
    """Value of the drafting counter when it started."""


@njit("int32[::1](int32[::1], int32[::1], int32[::1], int32[::1])", cache=True)
def _previous_tokens(tokens, parents, starts, before_root):
    previous = np.empty_like(tokens)
    for r in range(starts.shape[0] - 1):
        previous[starts[r]] = before_root[r]
        for i in range(starts[r] + 1, starts[r + 1]):
            previous[i] = tokens[starts[r] + parents[i]]
    return previous


class ImageRowsMixin:
    """What an image model has to know about the rows of a step, beside their tokens: the guidance
    they are to have, and where the picture of their request begins."""

    def _prepare_inputs(self, scheduler_output, num_scheduled_tokens):
        out = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)
        self._tell_image_model(num_scheduled_tokens)
        return out

    def _tell_image_model(self, num_scheduled: np.ndarray) -> None:
        model, batch = self.get_model(), self.input_batch
        guidance = getattr(model, "guidance", None)
        if guidance is not None:
            own = model.config.guidance_scale or 1.0
            wishes = (self._guidance_of(name) for name in batch.req_ids)
            scales = np.array([own if wish is None else wish for wish in wishes], np.float32)
            self._put_rows(guidance[:, 0], scales, num_scheduled)
        starts = getattr(model, "picture_starts", None)
        if starts is not None:
            behind_prompt = batch.num_prompt_tokens[: len(num_scheduled)].astype(np.int64)
            self._put_rows(starts, behind_prompt, num_scheduled)

    def _guidance_of(self, request_id: str) -> float | None:
        """None: the model's own."""
        params = self.requests[request_id].sampling_params
        extra_args = None if params is None else params.extra_args
        return request_controls.guidance(extra_args, possible=True)

    def _put_rows(
        self, buffer: torch.Tensor, values: np.ndarray, num_scheduled: np.ndarray
    ) -> None:
        """Each request's value, for all of its rows."""
        rows = np.repeat(values, num_scheduled)
        buffer[: len(rows)] = self._to_device(rows)

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        if self.device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)


class TreeRunnerMixin(ImageRowsMixin):
    """Overrides of ``GPUModelRunner``; see the module's docstring for the order."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.drafter.proposer.hidden_layers is not None:
            self.use_aux_hidden_state_outputs = True
        self._wishes: dict[str, Wishes] = {}

    _step: Step | None = None
    _clock: Clock | None = None
    _pictures: PictureRows | None = None
    _verified_rows: np.ndarray
    _page_cache: PageCache | None = None
    verifier: Verifier
    _hidden: torch.Tensor | None = None
    """[L, hidden] of the step's verified rows, for a judge."""
    _faster_than_stock = False
    """Does our attention serve chains and single rows better than the stock one?"""

    # -- time -------------------------------------------------------------------

    def profile_step_cost(self) -> None:
        """Measure (or read) what a step costs by its rows; after the model is warm."""
        self.verifier.warm_up(self.model_config.get_vocab_size())
        control = self.drafter.config.control
        if control.policy != "goodput":
            return
        key, path = self._cost_key(), control.cost_file
        group = get_tp_group()
        # Rank 0's answer: the file may be on its machine only, and measuring is collective.
        kept = group.broadcast_object(bool(path) and Path(path).exists(), src=0)
        profile = None if kept else self._measure_costs()
        if group.rank_in_group:
            return  # rank 0 decides
        if kept:
            profile = CostProfile.load(path, key)
        elif path:
            profile.save(path, key)
        self.drafter.controller.cost = StepCost(profile)

    def _cost_key(self) -> dict:
        """What a cost profile depends on."""
        model, compilation = self.vllm_config.model_config, self.vllm_config.compilation_config
        if self.device.type == "cpu":
            device = f"{platform.machine()}, {torch.get_num_threads()} threads"
        else:
            device = torch.cuda.get_device_name(self.device)
        return {
            "model": model.model,
            "dtype": str(model.dtype).removeprefix("torch."),
            "quantization": model.quantization,
            "device": device,
            "vllm": vllm_version,
            "tensor_parallel_size": self.parallel_config.tensor_parallel_size,
            "compilation": compilation.mode.name,
            "cudagraphs": compilation.cudagraph_mode.name,
        }

    def _measure_costs(self) -> CostProfile:
        """Time forward pass and output layer over growing row counts; some seconds."""
        most = max(min(self.max_num_tokens, PROFILE_ROWS[-1]), 2)
        rows = [n for n in PROFILE_ROWS if n <= most]
        # Rounds over all counts, so that a busy moment of the machine spoils one value of
        # each; the same calls on every rank, since the forward pass is collective.
        rounds = [[self._time_rows(n) for n in rows] for _ in range(PROFILE_ROUNDS)]
        return CostProfile.fit(np.array(rows, np.int64), {"plain": np.array(rounds)})

    def _time_rows(self, rows: int) -> float:
        self._synchronize()
        start = time.perf_counter()
        hidden, _ = self._dummy_run(rows)
        self._after_forward(hidden[:rows])
        self._synchronize()
        return time.perf_counter() - start

    def _after_forward(self, hidden: torch.Tensor) -> None:
        """What else the target computes for every verified row."""
        self.model.compute_logits(hidden)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def execute_model(self, scheduler_output, *args, **kwargs):
        self._stop_clock(scheduler_output)
        started = time.perf_counter()
        drafting = self.drafter.counters["draft_seconds"]
        out = super().execute_model(scheduler_output, *args, **kwargs)
        if self._step is not None and get_tensor_model_parallel_rank() == 0:
            names = frozenset(scheduler_output.num_scheduled_tokens)
            self._clock = Clock(started, names, self._step.shape, drafting)
        return out

    def _stop_clock(self, scheduler_output) -> None:
        """The last step's time ends where this one begins, if the engine was never idle."""
        clock, self._clock = self._clock, None
        if clock is None:
            return
        # A request of that step goes on: the scheduler had no reason to wait.
        if clock.request_ids.isdisjoint(scheduler_output.num_scheduled_tokens):
            return
        seconds = time.perf_counter() - clock.started
        drafting = self.drafter.counters["draft_seconds"] - clock.drafting
        self.drafter.controller.step_took(clock.shape, seconds - drafting)

    # -- inputs ---------------------------------------------------------------

    def _calc_spec_decode_metadata(self, num_draft_tokens, cu_num_scheduled_tokens):
        """Which batch rows get logits: each request's root and its nodes.

        The stock method also prepares its rejection sampler, which we do not use.
        """
        counts = num_draft_tokens + 1
        ends = np.cumsum(counts)
        rows = np.arange(ends[-1]) + np.repeat(cu_num_scheduled_tokens - ends, counts)
        self._verified_rows = rows
        nothing = torch.empty(0, dtype=torch.int32)
        return SpecDecodeMetadata(
            draft_token_ids=nothing,
            num_draft_tokens=num_draft_tokens.tolist(),
            cu_num_draft_tokens=nothing,
            cu_num_sampled_tokens=nothing,
            target_logits_indices=nothing,
            bonus_logits_indices=nothing,
            logits_indices=self._to_device(rows),
        )

    def _prepare_inputs(self, scheduler_output, num_scheduled_tokens):
        out = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)
        self._step = step = self._describe(scheduler_output, num_scheduled_tokens)
        if step.tree_attention.any():
            # The cache slots, computed from sequential positions, stay; the rotary
            # phase follows depth.
            in_request = np.arange(len(step.batch_rows)) - np.repeat(
                step.rows.starts[:-1], np.diff(step.rows.starts)
            )
            shift = self._to_device((step.rows.depths - in_request).astype(np.int64))
            index = self._to_device(step.batch_rows)
            self.positions.index_add_(0, index, shift)
            if self.uses_mrope:
                self.mrope_positions.gpu.index_add_(1, index, shift)
        if self._pictures is not None:
            follows = self._pictures.read(self.input_batch, num_scheduled_tokens, step.rows)
            self.get_model().picture_follows[: len(follows)] = follows
        return out

    def load_model(self, *args, **kwargs) -> None:
        super().load_model(*args, **kwargs)
        self.verifier = make_verifier(
            self.drafter.config,
            self.drafter.proposer,
            self.sampler,
            self.device,
            getattr(self.get_model(), "codebook", None),
            self.drafter.counters,
            self.drafter.draft_probs,
            get_tp_group(),
        )
        layout = getattr(self.get_model(), "picture_layout", None)
        if layout is not None:
            self._pictures = PictureRows(layout, self._to_device)

    def _get_eagle3_aux_layers_from_config(self) -> tuple[int, ...] | None:
        return self.drafter.proposer.hidden_layers or None

    def kv_share(self) -> float:
        """Which part of the memory for keys and values is the target's own."""
        shared = self.drafter.proposer.slot_bytes()
        if not shared:
            return 1.0
        specs = self.get_kv_cache_spec().values()
        target = sum(each.page_size_bytes / each.block_size for each in specs)
        return target / (target + shared)

    def initialize_kv_cache(self, kv_cache_config, *args, **kwargs) -> None:
        super().initialize_kv_cache(kv_cache_config, *args, **kwargs)
        self._page_cache = None
        if not self.drafter.proposer.reads_hidden:
            return
        (group,) = kv_cache_config.kv_cache_groups
        page = self.input_batch.block_table[0].block_size
        pages = kv_cache_config.num_blocks * group.kv_cache_spec.block_size // page
        self.drafter.share_pages(pages, page, self.max_num_reqs)

    def _describe(self, scheduler_output, num_scheduled: np.ndarray) -> Step:
        batch = self.input_batch
        drafts_of = scheduler_output.scheduled_spec_decode_tokens
        num_reqs = len(num_scheduled)
        counts = np.ones(num_reqs, np.int32)
        has_tree = np.zeros(num_reqs, bool)
        parents = []
        for i, request_id in enumerate(batch.req_ids):
            drafts = drafts_of.get(request_id)
            if not drafts:
                parents.append(_chain(1))
                continue
            counts[i] += len(drafts)
            tree = getattr(drafts, "parents", None)
            if tree is not None and num_scheduled[i] != counts[i]:
                # Rows before the root (rescheduled context): verify as a chain.
                tree = None
                self.drafter.counters.add("chain_fallbacks:resumed")
            if tree is None:
                parents.append(_chain(int(counts[i])))
            else:
                has_tree[i] = True
                parents.append(np.concatenate((_chain(1), tree + 1)))
        starts = np.zeros(num_reqs + 1, np.int32)
        np.cumsum(counts, out=starts[1:])
        batch_rows = self._verified_rows
        tokens = self.input_ids.np[batch_rows]
        if (tokens < 0).any():  # vLLM pads some first decodes with drafts of -1
            self.input_ids.gpu[self._to_device(batch_rows[tokens < 0])] = 0
        flat = np.concatenate(parents)
        rows = Rows(tokens, flat, starts, row_depths(flat, starts))
        before = batch.num_computed_tokens_cpu[:num_reqs] + num_scheduled - counts - 1
        before_root = np.where(
            before >= 0, batch.token_ids_cpu[np.arange(num_reqs), np.maximum(before, 0)], -1
        ).astype(np.int32)
        lengths = batch.num_computed_tokens_cpu[:num_reqs] + num_scheduled
        tree_attention = has_tree
        if counts.max() > 1 and self._faster_than_stock:
            tree_attention = num_scheduled == counts
        return Step(
            shape=StepShape(
                requests=num_reqs,
                rows=len(flat),
                context=int(lengths.sum()),
                prompt_rows=int(num_scheduled.sum()) - len(flat),
                tree=bool(has_tree.any()),
            ),
            rows=rows,
            batch_rows=batch_rows,
            tree_attention=tree_attention,
            num_scheduled=num_scheduled,
            previous=_previous_tokens(tokens, flat, starts, before_root),
        )

    # -- attention ------------------------------------------------------------

    def _build_attention_metadata(self, *args, **kwargs):
        metadata, common = super()._build_attention_metadata(*args, **kwargs)
        step = self._step
        if step is None or (self._pictures is None and not step.tree_attention.any()):
            return metadata, common
        if len(self.attn_groups) != 1:
            raise RuntimeError("vllm-specplus supports models with one KV cache group")
        for group in self.attn_groups[0]:
            # One tree object serves every layer of the group.
            if not getattr(group.backend, "sees_prompt", True):
                tree = self._pictures.attention(
                    self.input_batch, common, step.num_scheduled, step.rows, step.batch_rows,
                    self.device.type,
                )  # fmt: skip
            elif step.tree_attention.any():
                tree = self._tree_metadata(step, common, group)
            else:
                continue
            attention.attach(metadata, group, self.compilation_config.static_forward_context, tree)
        return metadata, common

    def _tree_metadata(self, step: Step, common, group) -> TreeAttentionMetadata:
        trees = np.flatnonzero(step.tree_attention)
        rows = step.rows
        counts = np.diff(rows.starts)
        of_tree = np.repeat(step.tree_attention, counts)
        starts = np.zeros(len(trees) + 1, np.int32)
        np.cumsum(counts[trees], out=starts[1:])
        parents = rows.parents[of_tree]
        max_rows = int(counts[trees].max())
        contexts = self.input_batch.num_computed_tokens_cpu[trees].astype(np.int32)
        mask = None
        if self.device.type != "cpu":
            mask = self._to_device(ancestor_mask(parents, starts, max_rows))
        other_rows = other = None
        if len(trees) < len(step.tree_attention):
            other_rows, other = self._other_metadata(step, common, group)
        return TreeAttentionMetadata(
            rows=self._to_device(step.batch_rows[of_tree]),
            query_start_loc=self._to_device(starts),
            context_lens=self._to_device(contexts),
            block_table=common.block_table_tensor[self._to_device(trees)].contiguous(),
            parents=self._to_device(parents),
            ancestors=mask,
            max_rows=max_rows,
            max_context_len=int(contexts.max()),
            other_rows=other_rows,
            other=other,
        )

    def _other_metadata(self, step: Step, common, group):
        """Stock metadata of the requests without a tree, and their batch rows."""
        others = np.flatnonzero(~step.tree_attention)
        lengths = step.num_scheduled[others]
        starts = np.zeros(len(others) + 1, np.int32)
        np.cumsum(lengths, out=starts[1:])
        of_other = np.repeat(~step.tree_attention, step.num_scheduled)
        rows = self._to_device(np.flatnonzero(of_other))
        index = self._to_device(others)
        seq_lens = self.optimistic_seq_lens_cpu[torch.from_numpy(others)]
        sub = replace(
            common,
            query_start_loc=self._to_device(starts),
            query_start_loc_cpu=torch.from_numpy(starts),
            seq_lens=common.seq_lens[index],
            seq_lens_cpu_upper_bound=seq_lens,
            num_reqs=len(others),
            num_actual_tokens=int(starts[-1]),
            max_query_len=int(lengths.max()),
            max_seq_len=int(seq_lens.max()),
            block_table_tensor=common.block_table_tensor[index],
            slot_mapping=common.slot_mapping[rows],
            is_prefilling=common.is_prefilling[torch.from_numpy(others)],
            positions=None if common.positions is None else common.positions[rows],
        )
        return rows, group.build_metadata(sub, 0)

    # -- verification -----------------------------------------------------------

    def _sample(self, logits, spec_decode_metadata) -> SamplerOutput:
        step = self._step
        if step is None:
            return super()._sample(logits, spec_decode_metadata)
        start = time.perf_counter()
        verdict = self.verifier.verify(logits, self._verify_batch(step))
        step.acceptance, step.top_ids = verdict.acceptance, verdict.top_ids
        step.target_probs = verdict.target_probs
        verified = time.perf_counter()
        self.drafter.counters.add("verify_seconds", verified - start)
        self._compact(step, step.acceptance)
        self.drafter.counters.add("compact_seconds", time.perf_counter() - verified)
        # vLLM reads the output back at once; on the host it costs no second copy.
        output = torch.from_numpy(step.acceptance.output)
        return SamplerOutput(sampled_token_ids=output, logprobs_tensors=verdict.logprobs)

    def _verify_batch(self, step: Step) -> VerifyBatch:
        batch, num_reqs = self.input_batch, self.input_batch.num_reqs
        outside = None
        if self._pictures is not None:
            outside = self._pictures.outside(step.batch_rows[step.rows.starts[:-1]])
        return VerifyBatch(
            request_ids=batch.req_ids,
            rows=step.rows,
            metadata=batch.sampling_metadata,
            temperature=batch.temperature_cpu[:num_reqs],
            top_k=batch.top_k_cpu[:num_reqs],
            top_p=batch.top_p_cpu[:num_reqs],
            discarded=self.discard_request_mask.np[:num_reqs],
            relaxed_stops=[self._wishes_of(name).relaxed_stops for name in batch.req_ids],
            outside_pictures=outside,
            hidden=self._hidden,
        )

    def _compact(self, step: Step, acceptance: Acceptance) -> None:
        if not step.tree_attention.any():
            return
        request, source, destination = moves(acceptance.path)
        if not len(request):
            return
        # Only trees move, and a tree's root is the first row of its request.
        root = self.input_batch.num_computed_tokens_cpu[request].astype(np.int64)
        self._pages().move(
            self._slots(request, root + source), self._slots(request, root + destination)
        )
        self.drafter.counters.add("kv_slots_moved", len(request))

    def _pages(self) -> PageCache:
        """The KV caches of all layers; built when they are first needed."""
        if self._page_cache is None:
            self._page_cache = attention.page_cache(attention.cached_layers(self.vllm_config))
        return self._page_cache

    def _slots(self, request: np.ndarray, position: np.ndarray) -> np.ndarray:
        """Cache slot, int64 [n], of each (request, position in its text)."""
        table = self.input_batch.block_table[0]
        page = table.block_table.np[request, position // table.block_size]
        return page.astype(np.int64) * table.block_size + position % table.block_size

    def _read_kv(self, requests: np.ndarray, positions: np.ndarray):
        """Keys and values, layer by layer, at positions of requests of the batch."""
        return self._pages().read(self._slots(requests, positions))

    # -- drafting -----------------------------------------------------------------

    def _input_fits_in_drafter(self, common_attn_metadata) -> bool:
        """Always: the stock answer near max_model_len schedules drafts of zeros."""
        return True

    def propose_draft_token_ids(
        self, scheduler_output, sampled_token_ids, sampling_metadata, hidden_states,
        sample_hidden_states, aux_hidden_states, *args, **kwargs,
    ):  # fmt: skip
        step, batch = self._step, self.input_batch
        num_reqs = batch.num_reqs
        if self.drafter.proposer.reads_prompt and step.shape.prompt_rows:
            self._show_prompt(step, hidden_states)  # every rank: the output layer is collective
        if get_tensor_model_parallel_rank() != 0:
            return [[] for _ in range(num_reqs)]  # vLLM takes rank 0's drafts
        decoding = np.fromiter((bool(t) for t in sampled_token_ids), bool, num_reqs)
        self._count(step, decoding)
        accepted = np.zeros(len(step.rows.tokens), bool)
        path = step.acceptance.path
        request, column = np.nonzero(path >= 0)
        accepted[step.rows.starts[request] + path[request, column]] = True
        num_tokens = batch.num_tokens_no_spec[:num_reqs].astype(np.int32)
        room = np.minimum(self.num_spec_tokens, self.max_model_len - 1 - num_tokens)
        wishes = [self._wishes_of(name) for name in batch.req_ids]
        room = np.minimum(room, [each.max_nodes for each in wishes])
        max_nodes = np.where(decoding, np.maximum(room, 0), 0).astype(np.int32)
        chain_only = np.array([each.chain_only for each in wishes], bool)
        self.drafter.counters.add("chain_fallbacks:structured_output", int(chain_only.sum()))
        drafts = self.drafter.draft(
            StepContext(
                request_ids=batch.req_ids,
                token_ids=batch.token_ids_cpu,
                num_tokens=num_tokens,
                max_nodes=max_nodes,
                chain_only=chain_only,
                observation=Observation(step.rows.tokens, step.previous, step.top_ids, accepted),
                num_prompt_tokens=batch.num_prompt_tokens[:num_reqs],
                cache_salts=[each.cache_salt for each in wishes],
                sampling=Sampling(
                    temperature=batch.temperature_cpu[:num_reqs],
                    top_k=batch.top_k_cpu[:num_reqs],
                    top_p=batch.top_p_cpu[:num_reqs],
                    seeds=[each.seed for each in wishes],
                ),
                target_kv=self._read_kv,
                row_starts=step.rows.starts,
                target_probs=step.target_probs,
                latents=self._latents(),
            ),
            lambda: self._target_rows(step, hidden_states, aux_hidden_states),
        )
        split = drafts.split()
        return split if self._pictures is None else self._pictures.cut(split, batch)

    def _target_rows(
        self, step: Step, hidden: torch.Tensor, layers: list[torch.Tensor] | None
    ) -> TargetRows | None:
        """What was computed for the rows that are on the kept texts: of a prompt all, of a tree
        the accepted path."""
        if not self.drafter.proposer.reads_hidden:
            return None
        path, counts = step.acceptance.path, np.diff(step.rows.starts)
        before = step.num_scheduled - counts  # rows of a prompt that are not verified
        kept = before + step.acceptance.lengths
        starts = np.zeros(len(kept) + 1, np.int64)
        np.cumsum(kept, out=starts[1:])
        within = np.arange(starts[-1]) - np.repeat(starts[:-1], kept)
        rows = np.repeat(np.cumsum(step.num_scheduled) - step.num_scheduled, kept) + within
        request, column = np.nonzero(path >= 0)
        at = starts[request] + before[request] + column
        rows[at] = step.batch_rows[step.rows.starts[request] + path[request, column]]
        positions = within + np.repeat(self.input_batch.num_computed_tokens_cpu[: len(kept)], kept)
        index = self._to_device(rows)
        states = [hidden] if layers is None else layers
        return TargetRows(
            states=torch.cat([each[index] for each in states], -1),
            positions=positions.astype(np.int64),
            starts=starts,
            pages=self.input_batch.block_table[0].block_table.np,
        )

    def _latents(self) -> LatentStep | None:
        """Of a model whose tokens are latents."""
        return None

    def _wishes_of(self, request_id: str) -> Wishes:
        wishes = self._wishes.get(request_id)
        if wishes is None:
            params = self.requests[request_id].sampling_params
            # Checked in the front end; nothing here can fail for a request that got in.
            controls = RequestControls(enabled=False)
            if params is not None:
                controls = request_controls.parse(params.extra_args)
            wishes = self._wishes[request_id] = Wishes(
                max_nodes=self.num_spec_tokens if controls.limit is None else controls.limit,
                chain_only=params is not None and params.structured_outputs is not None,
                cache_salt=controls.cache_salt,
                seed=None if params is None else params.seed,
                relaxed_stops=_relaxed_stops(params, controls),
            )
        return wishes

    def _count(self, step: Step, decoding: np.ndarray) -> None:
        """Count decoding steps; a prompt's last chunk makes its first token, not a step."""
        batch = self.input_batch
        num_reqs = len(decoding)
        in_output = (
            batch.num_computed_tokens_cpu[:num_reqs] >= batch.num_prompt_tokens[:num_reqs]
        ) & decoding
        drafted = np.diff(step.rows.starts) - 1
        lengths = step.acceptance.lengths
        counters = self.drafter.counters
        counters.add("request_steps", int(in_output.sum()))
        counters.add("output_tokens", int(lengths[in_output].sum()))
        counters.add("nodes_drafted", int(drafted[in_output].sum()))
        counters.add("nodes_accepted", int(lengths[in_output].sum() - in_output.sum()))

    def _show_prompt(self, step: Step, hidden_states: torch.Tensor) -> None:
        """Let the proposer see what follows every prompt token read in this step."""
        start = time.perf_counter()
        # The verified rows, a request's last ones, are observed with the step.
        unverified = step.num_scheduled - np.diff(step.rows.starts)
        ends = np.cumsum(step.num_scheduled) - step.num_scheduled + unverified
        for i in np.flatnonzero(unverified):
            known = int(self.input_batch.num_computed_tokens_cpu[i] + unverified[i])
            for ahead in range(int(unverified[i]), 0, -PROMPT_CHUNK):
                size = min(PROMPT_CHUNK, ahead)
                first = int(ends[i]) - ahead
                logits = self.model.compute_logits(hidden_states[first : first + size])
                if get_tensor_model_parallel_rank() == 0:
                    self._show_prompt_rows(int(i), known - ahead, size, logits)
        self.drafter.counters.add("draft_seconds", time.perf_counter() - start)

    def _show_prompt_rows(self, request: int, begin: int, size: int, logits: torch.Tensor) -> None:
        """Rows ``begin``.. of a request's text, with the logits after each of them."""
        ids = top_ids(logits, self.drafter.proposer.top_k).cpu().numpy()
        text = self.input_batch.token_ids_cpu[request]
        previous = np.full(size, -1, np.int32)
        head = min(begin, 1)  # the very first token has none before it
        previous[1 - head :] = text[begin - head : begin + size - 1]
        self.drafter.observe_prompt(text[begin : begin + size], previous, ids)

    def sample_tokens(self, grammar_output):
        if self.verifier.reads_hidden and self.execute_model_state is not None:
            # Image models may have more than the hidden units in a row.
            size = self.model_config.get_hidden_size()
            self._hidden = self.execute_model_state.sample_hidden_states[:, :size]
        try:
            return super().sample_tokens(grammar_output)
        finally:
            self._step = self._hidden = None

    def _on_request_state_removed(self, req_id, req_state) -> None:
        super()._on_request_state_removed(req_id, req_state)
        self._wishes.pop(req_id, None)
        self.drafter.forget(req_id)

    def close_drafter(self) -> None:
        if get_tensor_model_parallel_rank() == 0:
            self.drafter.close()


def _relaxed_stops(params, controls: RequestControls) -> frozenset[int] | None:
    """``Wishes.relaxed_stops``: a lossy rule sees the model's distribution, so it is not for
    requests that change it or want to know it."""
    if params is None or controls.lossless:
        return None
    changed = (
        params.structured_outputs, params.bad_words, params.allowed_token_ids, params.min_tokens,
        params.presence_penalty, params.frequency_penalty, params.repetition_penalty != 1,
        params.logprobs is not None,
    )  # fmt: skip
    return None if any(changed) else frozenset(params.all_stop_token_ids)


def _chain(count: int) -> np.ndarray:
    """int32 [count] parent rows of a chain: -1, 0, 1, ..."""
    return np.arange(-1, count - 1, dtype=np.int32)


class DiscardedDrawsMixin:
    """vLLM takes a discarded draw back by moving the generator's offset, which CPU generators do
    not have: a seeded request whose prompt is read in chunks stops the stock engine. Ours has
    not drawn for it: hide it."""

    def _bookkeeping_sync(self, *args, **kwargs):
        generators = self.input_batch.generators
        discarded = np.flatnonzero(self.discard_request_mask.np[: self.input_batch.num_reqs])
        hidden = {i: generators.pop(i) for i in discarded.tolist() if i in generators}
        try:
            return super()._bookkeeping_sync(*args, **kwargs)
        finally:
            generators.update(hidden)


class UndraftedMixin:
    """A stock runner under a worker of ours."""

    def kv_share(self) -> float:
        """Nobody shares it."""
        return 1.0

    def profile_step_cost(self) -> None:
        """Nothing would be decided by it."""

    def close_drafter(self) -> None:
        """There is none."""


class ImageCPUModelRunner(UndraftedMixin, ImageRowsMixin, DiscardedDrawsMixin, CPUModelRunner):
    pass


class ImageGPUModelRunner(UndraftedMixin, ImageRowsMixin, GPUModelRunner):
    pass


class TreeCPUModelRunner(TreeRunnerMixin, DiscardedDrawsMixin, CPUModelRunner):
    @property
    def _faster_than_stock(self) -> bool:
        """With several rows per request the stock kernel takes longer, and dividing a
        batch among two kernels costs copies in every layer."""
        return native.library() is not None


class TreeGPUModelRunner(TreeRunnerMixin, GPUModelRunner):
    pass
