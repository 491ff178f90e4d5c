"""What a drafting method is given and what it returns.

A proposer never touches a vLLM runner: once per step it gets a
:class:`~vllm_specplus.step.StepContext` and answers with a
:class:`~vllm_specplus.tree.DraftBatch`; whatever else it needs of the engine are its
:class:`Services`. All arrays are on the host, where vLLM's scheduler needs the drafts anyway;
what the target computed on the device (``top_ids``) travels with the sampled tokens, in the one
copy per step that every speculative method of this runner makes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from vllm_specplus.step import Observation, Source, StepContext
from vllm_specplus.target import TargetDevice
from vllm_specplus.tree import DraftBatch

if TYPE_CHECKING:
    import torch

    from vllm_specplus.config import MethodConfig
    from vllm_specplus.drafting.graphs import Record
    from vllm_specplus.drafting.lockstep import Lockstep


def _no_target() -> Any:
    raise RuntimeError("there is no target model that could help to draft")


@dataclass(frozen=True)
class Services:
    """What the engine does for a proposer. The defaults serve tools that draft without one."""

    vocab_size: int
    """The target's, padding included."""
    fingerprint: str = ""
    """Names the target model and its tokenizer, for anything that is kept across runs."""
    report: Callable[[Exception], None] = lambda error: None
    """Counts and logs a fault that costs only some of the drafts. Exceptions need no report: the
    engine sees them, and the step goes on undrafted."""
    count: Callable[[str], None] = lambda name: None
    """Adds 1 to a counter of ``metrics.COUNTERS``."""
    target_layers: Callable[[], Any] = _no_target
    """Returns the target's own layers (``drafting.model.LayeredModel``), for a method that drafts
    with them; from :meth:`Proposer.load_draft` on."""
    target_vocabulary: Callable[[], Any] = _no_target
    """Returns the target's embedding and output layer (``drafting.eagle.Vocabulary``), for a method
    that ``borrows_vocabulary``; from :meth:`Proposer.load_draft` on."""
    codebook: Callable[[], Any] = lambda: None
    """Returns an image model's codebook, a tensor [V', d] with rows of zeros for tokens that are no
    codes, or None of a model that has none; from :meth:`Proposer.load_draft` on."""
    load_tokenizer: Callable[[], Any] = lambda: None
    """Returns the target's Hugging Face tokenizer, or None if the engine runs without one."""
    context_pages: Callable[[], Any] = _no_target
    """Returns the pages of the target's last layer of full attention
    (``drafting.context_pages.ContextPages``), for a method that ``reads_context``; from
    :meth:`Proposer.share_pages` on."""
    target_devices: Callable[[], list[TargetDevice]] = list
    """Returns the devices of the target's ranks, in their order, for a method that
    ``places_processes``; from :meth:`Proposer.load_draft` on."""
    target_bytes: Callable[[], int] = lambda: 0
    """Returns the bytes of the target's weights on this rank, from :meth:`Proposer.load_draft`
    on."""
    record: Record | None = None
    """Makes CUDA graphs of recurring passes; None: they are run as they are."""
    num_layers: int = 0
    """Of the target; 0: nobody knows."""
    gives_layers: Callable[[], bool] = lambda: False
    """Does vLLM hand out the hidden states that enter the target's layers?"""
    lockstep: Lockstep | None = None
    """The ranks that the target's layers are divided among; None: one rank has them."""


class Proposer(ABC):
    """A drafting method. An engine makes one instance per rank, and drafts on the first rank."""

    config_class: ClassVar[type[MethodConfig]]
    """What a user may write for it; :func:`~vllm_specplus.registry.register_method` reads the
    method's name there."""
    top_k: int = 0
    """How many of the most probable ids per row it wants in ``Observation.top_ids``."""
    sources: tuple[Source, ...] = (Source("draft", "draft", 0.5),)
    """The rules that propose nodes, for ``DraftBatch.sources``: the controller learns
    each one's acceptance."""
    levels: tuple[int, ...] | None = None
    """For a method whose drafting costs a forward pass per level of the tree: nodes of
    each level. The controller then decides *before* drafting how many levels each request
    gets, and verifies all that is drafted."""
    reads_target_probs: bool = False
    """Does it draft from the distributions of the verified rows?"""
    reads_prompt: bool = False
    """Does :meth:`observe_prompt` want the prompt's rows? They cost the target's
    output layer over the whole prompt."""

    tells_next: bool = False
    """Are ``DraftBatch.next_probs`` asked for, of a method that knows them?"""

    reads_hidden: bool = False
    """Does it draft from the target's hidden states?"""
    may_miss: bool = False
    """May it be shown them of some steps only? Others could not make up for those that they have
    not seen."""
    reads_context: bool = False
    """Does it draft from what a layer of the target has in its KV cache?"""
    borrows_vocabulary: bool = False
    """Does it draft with the target's embedding or output layer, and none of its layers?"""
    places_processes: bool = False
    """Does it start processes on other devices, which have to know those of the target?"""
    hidden_layers: tuple[int, ...] | None = None
    """It reads those entering these layers, as vLLM counts for EAGLE-3; empty: vLLM's choice for
    the target; None: those behind the target's last norm."""

    def __init__(self, config: Any, services: Services):
        """``config`` is an instance of ``config_class``."""
        self.config = config
        self.services = services

    @property
    def rule(self) -> str | None:
        """Name of the rule (``samplers.sampled``) that verifies its drawn nodes; None: it never
        draws."""
        return self.config.rule

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

    def load_share(self, device: torch.device, dtype: torch.dtype) -> None:  # noqa: B027
        """On a rank that does not draft, load what the one that does cannot draft without: with
        ``Services.lockstep``, the same as there and in the same order."""

    def held_bytes(self) -> int:
        """Return the most that it keeps in memory of its own while serving: without weights, and
        without what :meth:`slot_bytes` takes of the target's cache."""
        return 0

    def slot_bytes(self) -> int:
        """Return how much it keeps for every slot of the target's KV cache, which is made
        smaller for it."""
        return 0

    def share_pages(self, pages: int, page: int, max_requests: int) -> None:  # noqa: B027
        """Take note that the target has its KV cache now: ``pages`` of ``page`` slots each, 0 where
        groups of layers have pages of their own; for a batch of at most ``max_requests``."""

    def warm_up(self) -> None:  # noqa: B027
        """Compile or load whatever else the first step should not wait for."""

    def charged(self, seconds: float) -> float:
        """Return for how much of the ``seconds`` that :meth:`propose` has just taken drafts like
        these are to blame: all of it, unless the method knows better what they will cost."""
        return seconds

    def forget(self, request_id: str) -> None:  # noqa: B027
        """Drop what is kept for a request that is gone: finished, aborted or never resumed."""

    def close(self) -> None:  # noqa: B027
        """Write or release what must be when the engine shuts down."""
