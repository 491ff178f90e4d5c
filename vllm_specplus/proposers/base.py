"""What a drafting method sees and returns.

A proposer never touches a vLLM runner: once per step it gets a
:class:`StepContext` and answers with a :class:`~vllm_specplus.tree.DraftBatch`.
All arrays are on the host, where vLLM's scheduler needs the drafts anyway; what
the target computed on the device (``top_ids``) travels with the sampled tokens,
in the one copy per step that every speculative method of this runner makes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_specplus.control.acceptance import Source, prior_tables
from vllm_specplus.tree import DraftBatch

if TYPE_CHECKING:
    import torch

    from vllm_specplus.drafting.graphs import Record
    from vllm_specplus.drafting.model import LayeredModel
    from vllm_specplus.drafting.self_speculation import ReadKV
    from vllm_specplus.image.continuous.slots import LatentSlots
    from vllm_specplus.samplers.sampled import Rule


@dataclass(slots=True)
class Observation:
    """Rows whose next-token distribution the target has just computed.

    ``L`` rows in all: those of a step's verified trees (and plain decodes, whose
    only row is the root), or a chunk of a prompt.
    """

    tokens: np.ndarray
    """int32 [L] input token of each row; -1 for padding, and ids beyond the vocabulary
    for placeholders of other modalities: nothing to learn from either."""
    previous: np.ndarray
    """int32 [L] the token before it on its path; -1 at the start of a prompt."""
    top_ids: np.ndarray
    """int32 [L, k] the k most probable next tokens, best first; k is the
    proposer's ``top_k``."""
    accepted: np.ndarray
    """bool [L] is the row on the text that was kept? (always true in a prompt)"""


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

    slots: LatentSlots
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
    acceptance: np.ndarray | None = None
    """float32 [R, depths, S] probability that a node is accepted if its parent was, by
    depth (the last entry serves all deeper ones) and source; set by the controller."""
    sampling: Sampling | None = None
    """None: all requests are greedy."""
    row_starts: np.ndarray | None = None
    """int32 [R + 1] first row of each request in ``observation``."""
    laws: torch.Tensor | None = None
    """float32 [L, V] on the target's device, for proposers that ask (``wants_laws``): the
    target's distribution at every row, as the request samples; None: all are greedy."""
    target_kv: ReadKV | None = None
    """Reads what the target computed for positions of the known texts, the newest token of
    each not yet included."""
    latents: LatentStep | None = None
    """None: tokens are tokens."""
    target_rows: TargetRows | None = None
    """For proposers that ask (``reads_hidden``)."""


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


class Proposer(ABC):
    """A drafting method. One instance per engine, on the rank that drafts."""

    top_k: int = 0
    """Most probable ids per row the method wants in ``Observation.top_ids``."""
    sources: tuple[Source, ...] = (Source("draft", "draft", 0.5),)
    """The rules that propose nodes, for ``DraftBatch.sources``: the controller learns
    each one's acceptance."""
    levels: tuple[int, ...] | None = None
    """For a method whose drafting costs a forward pass per level of the tree: nodes of
    each level. The controller then decides *before* drafting how many levels each request
    gets, and verifies all that is drafted."""
    rule: Rule | None = None
    """How its sampled nodes are verified; None: it never draws."""
    wants_laws: bool = False
    """Does it draft from the distributions of the verified rows?"""
    reads_prompt: bool = False
    """Does :meth:`observe_prompt` want the prompt's rows? They cost the target's
    output layer over the whole prompt."""

    reads_hidden: bool = False
    """Does it draft from the target's hidden states?"""
    hidden_layers: tuple[int, ...] | None = None
    """Those entering these layers, as vLLM counts for EAGLE-3; empty: its choice for the
    target; None: those behind the target's last norm."""

    def __init__(self, config: Any, vocab_size: int, fingerprint: str):
        """``config``: the method's model from :mod:`vllm_specplus.config`;
        ``vocab_size``: the target's, padding included; ``fingerprint``: names the
        target model and its tokenizer, for anything kept across runs."""
        self.config = config
        self.vocab_size = vocab_size
        self.fingerprint = fingerprint
        self.report: Callable[[Exception], None] = lambda error: None
        """Set by the engine: counts and logs a fault that costs only some of the drafts.
        Exceptions need no report: the engine sees them, and the step goes on undrafted."""
        self.count: Callable[[str], None] = lambda name: None
        """Set by the engine: adds 1 to a counter of ``metrics.COUNTERS``."""
        self.target_layers: Callable[[], LayeredModel]
        """Set by the engine before :meth:`load_draft`: the target's own layers, for a method
        that drafts with them."""
        self.record: Record | None = None
        """Set by the engine before :meth:`load_draft`: makes CUDA graphs of recurring passes."""

    @abstractmethod
    def propose(self, step: StepContext) -> DraftBatch:
        """Learn from ``step.observation``, then draft for every request.

        Grow trees best first by ``step.acceptance`` and label the nodes with their
        source; the controller verifies the part that pays. (With ``levels``: draft
        ``step.max_nodes``, a prefix of the tree level by level; all are verified.)
        """

    # The rest is optional; a method overrides what it needs.

    def observe_prompt(self, observation: Observation) -> None:  # noqa: B027
        """Learn from rows of a prompt, read in this step (if ``reads_prompt``)."""

    def load_draft(self, device: torch.device, dtype: torch.dtype) -> None:  # noqa: B027
        """Load the method's own model, if it has one, to the target's device and dtype."""

    def slot_bytes(self) -> int:
        """What it keeps for every slot of the target's KV cache, which is made smaller for it."""
        return 0

    def share_pages(self, pages: int, page: int, max_requests: int) -> None:  # noqa: B027
        """The target has its KV cache: so many pages of ``page`` slots, for a batch of at most
        ``max_requests``."""

    def warm_up(self) -> None:  # noqa: B027
        """Compile or load whatever else the first step should not wait for."""

    def forget(self, request_id: str) -> None:  # noqa: B027
        """The request is gone: finished, aborted or never to be resumed."""

    def close(self) -> None:  # noqa: B027
        """The engine shuts down."""
