"""What a request's parameters say about drafting and acceptance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vllm_specplus.control.requests import RequestControls, parse, salt_of

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """Fixed for a request's life, or a turn of a session of streaming input."""

    max_nodes: int
    chain_only: bool
    """Structured output: grammar states know no branches."""
    cache_salt: str
    seed: int | None
    relaxed_stops: frozenset[int] | None
    """Its stop tokens; None: it must be verified losslessly."""
    tpot_target: float
    """Seconds per token that it asks for; NaN: it does not."""
    ends: np.ndarray
    """int32 [K] tokens that end it; with ``ignore_eos`` only those it names itself."""

    @classmethod
    def of(
        cls, params: SamplingParams | None, most_nodes: int, adapter: str = ""
    ) -> RequestOptions:
        """Of a request that was admitted: its parameters have been checked in the front end, so
        that nothing here can fail. A request without any is not drafted.

        Texts of another ``adapter`` are those of another model: what is learnt from them is kept
        apart, as by a cache salt.
        """
        if params is None:
            return cls(0, False, "", None, None, np.nan, np.empty(0, np.int32))
        controls = parse(params.extra_args)
        ends = params.stop_token_ids if params.ignore_eos else params.all_stop_token_ids
        return cls(
            max_nodes=most_nodes if controls.limit is None else controls.limit,
            chain_only=params.structured_outputs is not None,
            cache_salt=_salt(salt_of(params.extra_args, controls), adapter),
            seed=params.seed,
            relaxed_stops=_relaxed_stops(params, controls),
            tpot_target=np.nan if controls.tpot_ms is None else controls.tpot_ms / 1000,
            ends=np.array(sorted(ends or ()), np.int32),
        )


def _salt(cache_salt: str, adapter: str) -> str:
    # A salt that looks like one beside an adapter gets the name of none in front.
    return f"{adapter}\0{cache_salt}" if adapter or "\0" in cache_salt else cache_salt


def _relaxed_stops(params: SamplingParams, controls: RequestControls) -> frozenset[int] | None:
    """A lossy rule sees the model's distribution, so it is not for requests that change it or
    want to know it."""
    if controls.lossless:
        return None
    changed = (
        params.structured_outputs, params.bad_words, params.allowed_token_ids, params.min_tokens,
        params.presence_penalty, params.frequency_penalty, params.repetition_penalty != 1,
        params.logprobs is not None, params.min_p, params.logit_bias,
    )  # fmt: skip
    return None if any(changed) else frozenset(params.all_stop_token_ids)
