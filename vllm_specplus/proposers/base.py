"""What a drafting method sees and returns.

A proposer never touches a vLLM runner: once per step it gets a
:class:`StepContext` and answers with a :class:`~vllm_specplus.tree.DraftBatch`.
All arrays are on the host, where vLLM's scheduler needs the drafts anyway; what
the target computed on the device (``top_ids``) travels with the sampled tokens,
in the one copy per step that every speculative method of this runner makes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm_specplus.step import Observation, Source, StepContext
from vllm_specplus.tree import DraftBatch

if TYPE_CHECKING:
    import torch

    from vllm_specplus.drafting.graphs import Record
    from vllm_specplus.drafting.model import LayeredModel


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
    rule: str | None = None
    """Name of the rule (``samplers.sampled``) that verifies its drawn nodes; None: it never
    draws."""
    reads_target_probs: bool = False
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
