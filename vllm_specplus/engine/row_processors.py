"""vLLM's logits processors, made for the rows of a step.

vLLM's processors know requests; a step verifies several rows of a request, each a position of its
own. For such a step every processor is built anew with an entry per row, by its own class and from
what its requests asked for, so that vLLM's sampler applies it where and how it does in plain
decoding: behind the raw logprobs, and with all that the class itself takes care of.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, LogitsProcessors
from vllm.v1.sample.logits_processor.builtin import (
    LogitBiasLogitsProcessor,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)

from vllm_specplus.step import Rows


@dataclass(frozen=True, slots=True)
class _Asked:
    """What processors read of ``SamplingParams``, by its names."""

    min_tokens: int = 0
    all_stop_token_ids: frozenset[int] | set[int] = frozenset()
    structured_outputs: Any = None
    logit_bias: dict[int, float] | None = None
    min_p: float = 0.0


def changes_argmax(processors: LogitsProcessors) -> bool:
    """Says whether greedy requests of the batch have entries in ``processors``."""
    return any(_has_entries(each) for each in processors.non_argmax_invariant)


def _has_entries(processor: LogitsProcessor) -> bool:
    if isinstance(processor, MinTokensLogitsProcessor):
        return bool(processor.min_toks)
    return isinstance(processor, LogitBiasLogitsProcessor) and bool(processor.biases)


def complete(processors: LogitsProcessors, *args: Any) -> None:
    """Adds the processors of logit_bias and min_p, which vLLM leaves out beside speculation, made
    of ``args``; before the first request.

    ValueError with one sentence if ``processors`` are not those that vLLM leaves there: others
    would not be applied per row, and what is there already would be applied twice.
    """
    names = [type(each).__name__ for each in processors.all]
    if names != [MinTokensLogitsProcessor.__name__]:
        raise ValueError(
            f"vllm-specplus completes vLLM's logits processors beside speculation, "
            f"{MinTokensLogitsProcessor.__name__} alone, and found {', '.join(names) or 'none'}: "
            f"use a vLLM of the supported range"
        )
    processors.non_argmax_invariant.append(LogitBiasLogitsProcessor(*args))
    processors.argmax_invariant.append(MinPLogitsProcessor(*args))


def for_rows(processors: LogitsProcessors, rows: Rows, device: torch.device) -> LogitsProcessors:
    """Builds the processors of R requests for the L rows of a step, in the same order; those
    that no request uses are left out.

    TypeError for a processor that :func:`complete` does not know.
    """
    count = len(rows.tokens)
    config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=count))
    made = []
    for each in processors.all:
        added = [(row, asked, None, []) for row, asked in _entries(each, rows)]
        if added:
            # A class of vLLM's own, which takes of the config only the number of entries.
            one = type(each)(config, device, False)  # type: ignore[arg-type]
            one.update_state(BatchUpdate(count, removed=(), added=added, moved=()))  # type: ignore[arg-type]
            made.append(one)
    return LogitsProcessors(made)


def _entries(processor: LogitsProcessor, rows: Rows) -> Iterator[tuple[int, _Asked]]:
    """Lists the rows that a processor of requests applies to, and what is asked for there."""
    if isinstance(processor, MinTokensLogitsProcessor):
        for request, (minimum, output, stops, structured) in processor.min_toks.items():
            first, end = rows.starts[request : request + 2].tolist()
            asked = _Asked(
                min_tokens=minimum,
                all_stop_token_ids=stops,
                structured_outputs=structured or None,
            )
            # Rows whose path has not reached the minimum.
            short = np.flatnonzero(len(output) + rows.depths[first:end] < minimum) + first
            yield from ((row, asked) for row in short.tolist())
    elif isinstance(processor, LogitBiasLogitsProcessor):
        for request, biases in processor.biases.items():
            asked = _Asked(logit_bias=biases)
            yield from ((row, asked) for row in _span(rows, request))
    elif isinstance(processor, MinPLogitsProcessor):
        if processor.min_p_count:
            for request in range(len(rows.starts) - 1):
                asked = _Asked(min_p=processor.get_min_p_by_index(request))
                yield from ((row, asked) for row in _span(rows, request) if asked.min_p)
    else:
        raise TypeError(f"logits processor {type(processor).__name__} is not one of vLLM's own")


def _span(rows: Rows, request: int) -> range:
    return range(*rows.starts[request : request + 2].tolist())
