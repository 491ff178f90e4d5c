"""What flows through a step: the nouns that every part of this package shares.

The target verifies *rows*; an acceptance rule decides which of them become text; what was seen
there is the proposer's *observation*; and the next drafts are made for a *step context*. Plain
data, on the host where not said otherwise. Nothing here imports another module of this package,
or vLLM.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

#: Reads keys and values [n, kv_heads, head_dim] of the target, layer by layer, at (request,
#: position in its text) int64 [n] each.
ReadKV = Callable[[np.ndarray, np.ndarray], "Iterator[tuple[torch.Tensor, torch.Tensor]]"]

#: Acceptance is estimated apart for depths 1, 2, 3 and "4 or more".
DEPTHS = 4
#: Classes of probabilities, by their upper ends: for sources that say how sure they are.
PROBABILITY_CLASSES = (0.05, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 1.0)


@dataclass(frozen=True, slots=True)
class Source:
    """A rule that proposes nodes."""

    name: str
    group: str
    """Sources of one group rise and fall together within a request."""
    prior: float
    """Conditional acceptance measured beforehand, in (0, 1)."""


@dataclass(slots=True)
class Rows:
    """The verified rows of a step on the host, request by request.

    ``L`` rows, ``R`` requests. A request without drafts has one row, its root.
    """

    tokens: np.ndarray
    """int32 [L] input token of each row."""
    parents: np.ndarray
    """int32 [L] parent row within the request; -1 for roots."""
    starts: np.ndarray
    """int32 [R + 1] first row of each request."""
    depths: np.ndarray
    """int32 [L] distance from the root."""


@dataclass(slots=True)
class Acceptance:
    """Outcome of a step."""

    path: np.ndarray
    """int32 [R, width] accepted rows of each request, the root's 0 first, -1 padded."""
    lengths: np.ndarray
    """int32 [R] rows on the path; also the number of output tokens."""
    output: np.ndarray
    """int32 [R, width] output tokens, -1 padded."""


@dataclass(slots=True)
class DraftProbs:
    """The draft's distributions that the nodes of a step's trees were drawn from."""

    q: torch.Tensor
    """float32 [M, V'], V' <= V: ids from V' on have probability 0."""
    index: np.ndarray
    """int32 [L] row of ``q`` that the children of a verified row were drawn from; -1: it
    has none, or deterministic ones."""
    drawn: np.ndarray
    """int32 [L] how many of its children, the first ones, were drawn."""


@dataclass(slots=True)
class Observation:
    """Rows whose next-token distribution the target has just computed.

    ``L`` rows in all: those of a step's verified trees (and plain decodes, whose
    only row is the root), or a chunk of a prompt.
    """

    tokens: np.ndarray
    """int32 [L] input token of each row; -1 for padding and behind a grammar's mask, ids beyond
    the vocabulary for placeholders of other modalities: nothing to learn from any of them."""
    previous: np.ndarray
    """int32 [L] the token before it on its path; -1 at the start of a prompt."""
    top_ids: np.ndarray
    """int32 [L, k] the k most probable next tokens, best first; k is the
    proposer's ``top_k``."""
    accepted: np.ndarray
    """bool [L] is the row on the text that was kept? (always true in a prompt)"""
    cache_salt: str = ""
    """Of a prompt's rows, its request's; those of a step have ``StepContext.cache_salts``."""


@dataclass(slots=True)
class Sampling:
    """How the R requests of a step sample; what a draft model imitates."""

    temperature: np.ndarray
    """float32 [R]; 0 is greedy."""
    top_k: np.ndarray
    """int32 [R]; the vocabulary's size where nothing is cut."""
    top_p: np.ndarray
    """float32 [R]; 1 where nothing is cut."""
    seeds: list[int | None]
    """[R] a seeded request's draws must depend on its seed and text only."""


@dataclass(slots=True)
class LatentStep:
    """Where the pictures of the R requests of a step are, if their tokens are latents."""

    slots: Any
    """``image.continuous.slots.LatentSlots``."""
    index: np.ndarray
    """int64 [R] slot of each request."""


@dataclass(slots=True)
class TargetRows:
    """What the target computed for the K rows of a step that are on the kept texts, prompts
    among them; request by request, consecutive positions."""

    states: torch.Tensor
    """[K, n * hidden] on its device: hidden states behind its last norm, or entering each of
    the layers a proposer asks for (``hidden_layers``)."""
    positions: np.ndarray
    """int64 [K] in the texts."""
    starts: np.ndarray
    """int64 [R + 1] first row of each request."""
    pages: np.ndarray
    """int32 [R, P] numbers of the target's KV pages that hold each text, a view."""


@dataclass(slots=True)
class StepContext:
    """One decoding step of R requests, after verification."""

    request_ids: list[str]
    token_ids: np.ndarray
    """int32 [R, max_model_len] prompt and output of each request, a view; only the
    first ``num_tokens`` of a row are meaningful."""
    num_tokens: np.ndarray
    """int32 [R] known tokens, the newest (not yet in the KV cache) included."""
    max_nodes: np.ndarray
    """int32 [R] nodes each request may draft; 0 where nothing may be drafted
    (prompt still being read, speculation off, end of the context window)."""
    chain_only: np.ndarray
    """bool [R] requests that must get a chain, not a tree (structured output)."""
    observation: Observation
    """The step's rows, request by request."""
    num_prompt_tokens: np.ndarray | None = None
    """int32 [R] how many of the known tokens are the prompt."""
    cache_salts: list[str] | None = None
    """[R] requests of different salts must not see each other's texts; None: all alike."""
    ends: list[np.ndarray] | None = None
    """[R] of int32 [K]: ids behind which a request has no text; None: there are none."""
    tpot_targets: np.ndarray | None = None
    """float64 [R] seconds per token that a request asks for, NaN where it does not; None: nowhere.
    """
    acceptance: np.ndarray | None = None
    """float32 [R, depths, S] probability that a node is accepted if its parent was, by
    depth (the last entry serves all deeper ones) and source; set by the controller."""
    sampling: Sampling | None = None
    """None: all requests are greedy."""
    versions: np.ndarray | None = None
    """int64 [R] a text of the version that it had in an earlier step has only grown since; None:
    nothing is known of earlier steps."""
    row_starts: np.ndarray | None = None
    """int32 [R + 1] first row of each request in ``observation``."""
    target_probs: torch.Tensor | None = None
    """float32 [L, V] on the target's device, for proposers that ask (``reads_target_probs``): the
    target's distribution at every row, as the request samples; None: all are greedy."""
    target_kv: ReadKV | None = None
    """Reads what the target computed for positions of the known texts, the newest token of
    each not yet included."""
    pages: np.ndarray | None = None
    """int32 [R, P] numbers of the target's KV pages that hold each text, a view; of a model with
    several groups of layers, those of the first one."""
    latents: LatentStep | None = None
    """None: tokens are tokens."""
    target_rows: TargetRows | None = None
    """For proposers that ask (``reads_hidden``)."""

    def versions_of(self, requests: np.ndarray) -> list[int] | None:
        """[A] of ``versions``, of the requests int [A]."""
        return None if self.versions is None else self.versions[requests].tolist()


def prior_tables(sources: Sequence[Source], num_requests: int) -> np.ndarray:
    """Float32 [R, DEPTHS, S]: the priors, for requests nothing is known about."""
    priors = np.array([source.prior for source in sources], np.float32)
    return np.broadcast_to(priors, (num_requests, DEPTHS, len(priors))).copy()


def bare_step(sources: Sequence[Source], texts: np.ndarray, max_nodes: int) -> StepContext:
    """A step in which every row of ``texts`` int32 [R, n] is a request that may draft
    ``max_nodes`` nodes: nothing observed, acceptance as ``sources`` state it.

    Of the types of a real step: for compiling loops, and for tools that draft without an
    engine.
    """
    requests, length = texts.shape
    none = np.empty(0, np.int32)
    return StepContext(
        request_ids=[f"request {r}" for r in range(requests)],
        token_ids=texts,
        num_tokens=np.full(requests, length, np.int32),
        max_nodes=np.full(requests, max_nodes, np.int32),
        chain_only=np.zeros(requests, bool),
        observation=Observation(none, none, none.reshape(0, 0), none > 0),
        num_prompt_tokens=np.zeros(requests, np.int32),
        acceptance=prior_tables(sources, requests),
    )
