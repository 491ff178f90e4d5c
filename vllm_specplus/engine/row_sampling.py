"""Sampling at every verified row with vLLM's own sampler.

Two ways. Drafts that are a function of the past need one draw of the target per row
(:func:`sample_rows`). Drafts that were themselves drawn are judged by their distribution
(:meth:`RuleSampler.judge_rows`): there vLLM's sampler does everything up to its last step,
the draw.

One draw per row
----------------

vLLM's sampler works per request; a draft tree needs one draw per *row*. So the
step's ``SamplingMetadata`` is expanded to one entry per row, where a row's past
output is the request's output plus the tokens on the row's path: bad words, allowed
tokens, top-k/top-p, temperature and logprobs then hold per node. Logits processors
(min_tokens, logit_bias, min_p) are built anew per row, see ``row_processors.py``, and penalties,
which vLLM counts anew in every step, take the place of one: see ``row_penalties.py``.

Seeded requests: all rows of one depth share the draw that their generator would make
at that position in plain decoding (``row_seeds.py``), and the generator advances by exactly the
tokens that were output. The same seed therefore gives the same text whatever was
drafted, and whatever else is in the batch. (Exact: only one row per depth is ever
visited, so the draws along a path stay independent.)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p
from vllm.v1.sample.sampler import Sampler

from vllm_specplus.drafting.noise import VERDICTS, stream
from vllm_specplus.engine import row_processors
from vllm_specplus.engine.row_penalties import RowPenalties
from vllm_specplus.engine.row_seeds import RowSampler, SeededDraws, processed_logprobs
from vllm_specplus.engine.uploads import upload
from vllm_specplus.samplers.relaxed_sampling import Relaxation
from vllm_specplus.samplers.sampled import SampledRule
from vllm_specplus.step import Acceptance, DraftProbs, Rows


@dataclass(slots=True)
class RowSamples:
    """The token at every row that the walk down a tree follows."""

    tokens: torch.Tensor
    """int32 [L]; -1 where a rule has judged, off the accepted paths."""
    logprobs: LogprobsTensors | None = None
    """Of every row, or None."""
    seeded: SeededDraws | None = None
    """Draws by which generators have to be advanced, when it is known how many became text."""
    target_probs: torch.Tensor | None = None
    """float32 [L, V] what they were drawn from, where rules judge by it."""


def is_plain_greedy(metadata: SamplingMetadata) -> bool:
    """Says whether every draw is the argmax of the raw logits, with nothing to report."""
    return (
        metadata.all_greedy
        and metadata.no_penalties
        and metadata.max_num_logprobs is None
        and not metadata.logprob_token_ids
        and metadata.allowed_token_ids_mask is None
        and not metadata.bad_words_token_ids
        and not row_processors.changes_argmax(metadata.logitsprocs)
    )


def sample_rows(
    sampler: RowSampler, logits: torch.Tensor, metadata: SamplingMetadata, rows: Rows,
    penalties: RowPenalties | None,
) -> RowSamples:  # fmt: skip
    """Draws one token per row. May change ``logits`` [L, V] in place. ``penalties`` are those of
    ``metadata``, None if it has none."""
    draws = SeededDraws(metadata.generators, rows) if metadata.generators else None
    one_each = len(rows.tokens) == len(rows.starts) - 1
    if not one_each or penalties is not None:  # else there is nothing to expand
        metadata = _expand(metadata, rows, logits, penalties)
    out = sampler.sample_rows(logits, metadata, draws)
    return RowSamples(out.sampled_token_ids[:, 0], out.logprobs_tensors, draws)


class _RuleInsteadOfDraw(torch.nn.Module):
    """In the place of vLLM's ``TopKTopPSampler``, the last step of its sampler."""

    def __init__(self, logprobs_mode: str, rule: SampledRule):
        super().__init__()
        self._logprobs_mode = logprobs_mode
        self._rule = rule
        self.step: tuple | None = None
        """Arguments of ``SampledRule.verify`` behind the target's probabilities."""
        self.tokens: torch.Tensor | None = None
        self.target_probs: torch.Tensor | None = None

    def forward(self, logits, generators, k, p):
        logits = apply_top_k_top_p(logits, k, p)
        processed = processed_logprobs(logits, self._logprobs_mode)
        self.target_probs = logits.softmax(-1, dtype=torch.float32)
        self.tokens = self._rule.verify(self.target_probs, *self.step)
        # Rows off the accepted paths output nothing; any id serves their logprobs.
        return self.tokens.clamp(min=0).long(), processed


class RuleSampler(Sampler):
    """vLLM's sampler with the draw replaced by a verification rule."""

    def __init__(self, logprobs_mode: str, rule: SampledRule, device: torch.device):
        super().__init__(logprobs_mode)
        self.topk_topp_sampler = self._judge = _RuleInsteadOfDraw(logprobs_mode, rule)
        # Apart from the global one, which all ranks of a tensor-parallel group advance alike.
        self._generator = stream(VERDICTS, device)

    def judge_rows(
        self, logits: torch.Tensor, metadata: SamplingMetadata, rows: Rows,
        penalties: RowPenalties | None, draft_probs: DraftProbs, discarded: np.ndarray,
        relaxation: Relaxation | None = None,
    ) -> RowSamples:  # fmt: skip
        """Judges the drafts like :func:`sample_rows`, but ``tokens`` are -1 off the accepted
        paths.

        ``discarded`` bool [R]: requests that output nothing in this step (their prompt is not
        read to its end), whose seeded generators stay as they are.
        """
        accept, output = self._noise(metadata, rows, discarded, logits.device)
        expanded = _expand(metadata, rows, logits, penalties)
        self._judge.step = rows, draft_probs, accept, output, relaxation
        try:
            out = self(logits=logits, sampling_metadata=expanded)
            tokens = out.sampled_token_ids[:, 0]
            if self._judge.tokens is not None:  # else all requests are greedy
                off_path = (self._judge.tokens < 0) & (expanded.temperature > 0)
                tokens = tokens.masked_fill(off_path, -1)
            target_probs = self._judge.target_probs
        finally:
            self._judge.step = self._judge.tokens = self._judge.target_probs = None
        return RowSamples(tokens, out.logprobs_tensors, target_probs=target_probs)

    def _noise(
        self, metadata: SamplingMetadata, rows: Rows, discarded: np.ndarray, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draws uniforms, float64: one per row [L] to judge it, one per request [R] to draw the
        output."""
        # Float32 has 24 bits: too few to draw one of 10^5 tokens.
        uniform = partial(torch.rand, dtype=torch.float64, device=device)
        accept = uniform(len(rows.tokens), generator=self._generator)
        output = uniform(len(rows.starts) - 1, generator=self._generator)
        for request, generator in metadata.generators.items():
            if discarded[request]:
                if device.type == "cuda":  # vLLM takes one draw back, whether or not it was made
                    torch.rand(1, generator=generator, device=device)
                continue
            first, end = rows.starts[request : request + 2].tolist()
            own = uniform(end - first + 1, generator=generator)
            accept[first:end], output[request] = own[:-1], own[-1]
        return accept, output


def gather_logprobs(
    logprobs: LogprobsTensors, rows: Rows, acceptance: Acceptance
) -> LogprobsTensors:
    """Picks logprobs of the accepted paths, [R * width] in the order of ``acceptance.output``."""
    index = rows.starts[:-1, None] + np.maximum(acceptance.path, 0)
    index = torch.from_numpy(index.reshape(-1).astype(np.int64)).to(logprobs.logprobs.device)
    # With "all logprobs" two of the three tensors are empty.
    return LogprobsTensors(*(t[index] if torch.is_tensor(t) and t.numel() else t for t in logprobs))


def _path_tokens(rows: Rows, row: int, first: int) -> list[int]:
    """Lists the tokens from the root's first descendant down to ``row`` (flat index)."""
    out = []
    while rows.parents[row] >= 0:
        out.append(int(rows.tokens[row]))
        row = first + rows.parents[row]
    return out[::-1]


def _past_outputs(metadata: SamplingMetadata, rows: Rows) -> list[list[int]]:
    """Lists the ends of every row's past output, as far back as its request's bad words reach."""
    past: list[list[int]] = [[]] * len(rows.tokens)
    for request, words in (metadata.bad_words_token_ids or {}).items():
        reach = max(map(len, words)) - 1
        output = metadata.output_token_ids[request]
        end = output[len(output) - reach :] if reach < len(output) else output
        first, last = rows.starts[request : request + 2].tolist()
        for row in range(first, last):
            past[row] = end + _path_tokens(rows, row, first)
    return past


def _expand(
    metadata: SamplingMetadata, rows: Rows, logits: torch.Tensor, penalties: RowPenalties | None
) -> SamplingMetadata:
    """Returns ``metadata`` with one entry per row, without generators: who draws has them."""
    if penalties is not None:
        index = penalties.request_of
    else:
        counts = np.diff(rows.starts)
        request_of = np.repeat(np.arange(len(counts)), counts)
        index = upload({"request_of": request_of}, logits.device)["request_of"]

    def per_row(tensor):
        return None if tensor is None else tensor[index]

    def spread(by_request):
        return {
            row: value
            for request, value in (by_request or {}).items()
            for row in range(rows.starts[request], rows.starts[request + 1])
        }

    processors = row_processors.for_rows(metadata.logitsprocs, rows, logits.device)
    if penalties is not None:  # vLLM applies its own behind these
        processors.non_argmax_invariant.append(penalties)  # type: ignore[arg-type]
    return replace(
        metadata,
        temperature=per_row(metadata.temperature),
        top_p=per_row(metadata.top_p),
        top_k=per_row(metadata.top_k),
        generators={},
        no_penalties=True,
        prompt_token_ids=None,
        output_token_ids=_past_outputs(metadata, rows),
        allowed_token_ids_mask=per_row(metadata.allowed_token_ids_mask),
        bad_words_token_ids=spread(metadata.bad_words_token_ids),
        logprob_token_ids=spread(metadata.logprob_token_ids) or None,
        logitsprocs=processors,
        spec_token_ids=None,
    )
