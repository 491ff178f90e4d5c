"""REST: drafts from a datastore of text.

"REST: Retrieval-Based Speculative Decoding" (arXiv 2311.08252). The longest suffix of the
context that occurs in the datastore (16 to 2 tokens) is looked up; what follows it there
becomes a trie whose nodes weigh as many continuations as pass through them (sec. 3.2).

Where the paper's code keeps the 64 heaviest prefixes and cuts them to a budget afterwards
(``"tree": "heaviest"``), nodes are taken best first under the budget: by the acceptance
probabilities that the controller learns for each class of evidence (``retrieval/evidence.py``). The
first 5000 matches of the paper's code are replaced by an even sample, and its verification, which
is not lossless when sampling, by the engine's.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import numpy as np
from numba import njit
from pydantic import Field, model_validator

from vllm_specplus.config import MethodConfig
from vllm_specplus.drafting.trees import keep_best, renumber
from vllm_specplus.proposer import Proposer, Services
from vllm_specplus.registry import register_method
from vllm_specplus.retrieval import datastore
from vllm_specplus.retrieval.datastore import Datastore
from vllm_specplus.retrieval.evidence import evidence_class, evidence_sources
from vllm_specplus.retrieval.search import (
    NEAREST,
    SAMPLES,
    continuations_trie,
    heaviest,
    longest_match,
)
from vllm_specplus.retrieval.watch import Watch
from vllm_specplus.step import StepContext, bare_step
from vllm_specplus.target import Target
from vllm_specplus.tree import DraftBatch

SHORTEST, LONGEST = 2, 16
#: Defaults of the paper's code: matches followed, tokens that follow each, prefixes kept.
MATCHES, LONG, CHOICES = 5000, 10, 64


@njit(cache=True, nogil=True)
def retrieve(
    tokens, order, first, shards, vocab_size, heaviest_first, acceptance,
    token_ids, num_tokens, max_nodes, chain_only, out, counts,
):  # fmt: skip
    """Write the drafts of all requests, back to back, to ``out`` int32 [4, >= sum(max_nodes)]
    (tokens, parents, sources, -1: nothing is drawn), and their sizes to ``counts`` int32 [R].
    ``heaviest_first``: the nodes are those of the paper's code. Returns the total number of
    nodes."""
    most, deepest, capacity = SAMPLES, 0, SAMPLES * NEAREST
    if heaviest_first:
        most, deepest, capacity = MATCHES, LONG, MATCHES * LONG
    trie_tokens = np.empty(capacity, np.int32)
    trie_parents = np.empty(capacity, np.int32)
    weights = np.empty(capacity, np.int32)
    depths = np.empty(capacity, np.int32)
    sources = np.empty(capacity, np.int32)
    cut = np.empty((3, CHOICES), np.int32)
    drawn_from = np.full(capacity, -1, np.int32)  # nothing is drawn
    ranges = np.zeros((shards.shape[0], 2), np.int64)
    total = 0
    for r in range(num_tokens.shape[0]):
        counts[r] = 0
        if max_nodes[r] <= 0 or num_tokens[r] < SHORTEST:
            continue
        text, n = token_ids[r], num_tokens[r]
        length = longest_match(tokens, order, first, shards, text, n, SHORTEST, LONGEST, ranges)
        if length == 0:
            continue
        nodes, followed = continuations_trie(
            tokens, order, shards, vocab_size, ranges, most, deepest, trie_tokens, trie_parents,
            weights,
        )  # fmt: skip
        for i in range(nodes):
            parent = trie_parents[i]
            depth, passing = 1, followed
            if parent >= 0:
                depth, passing = depths[parent] + 1, weights[parent]
            depths[i] = depth
            sources[i] = evidence_class(length + depth - 1, weights[i], passing)
        if heaviest_first:
            kept = heaviest(
                trie_tokens[:nodes], trie_parents[:nodes], weights[:nodes], depths[:nodes], CHOICES
            )
            nodes = renumber(kept, (trie_tokens, trie_parents, sources), cut)
            trie_tokens[:nodes], trie_parents[:nodes] = cut[0, :nodes], cut[1, :nodes]
            sources[:nodes] = cut[2, :nodes]
        counts[r] = keep_best(
            trie_tokens[:nodes], trie_parents[:nodes], sources[:nodes], drawn_from[:nodes],
            acceptance[r : r + 1], max_nodes[r], chain_only[r], out[:, total:],
        )  # fmt: skip
        total += counts[r]
    return total


class RestConfig(MethodConfig):
    """``{"method": "rest", ...}``."""

    retrieves: ClassVar[bool] = True

    method: Literal["rest"] = "rest"
    num_speculative_tokens: Annotated[int, Field(ge=1, le=80)] = 32
    tree: Literal["best_first", "heaviest"] = "best_first"
    """Grown best first by acceptance probability, or what the paper's code makes of frequencies."""
    datastore: str
    """Folder written by ``vllm-specplus datastore build``."""

    @model_validator(mode="after")
    def _datastore_opens(self):
        datastore.Datastore.open(self.datastore)
        return self

    def check_target(self, target: Target) -> None:
        manifest = datastore.verify(self.datastore)
        datastore.check_target(manifest, self.datastore, target.load_tokenizer(), target.vocab_size)


@register_method
class Rest(Proposer):
    """Retrieval from one memory-mapped datastore."""

    config_class = RestConfig
    sources = evidence_sources("datastore", 0.7)

    def __init__(self, config: RestConfig, services: Services):
        super().__init__(config, services)
        self.datastore = Datastore.open(config.datastore)
        self._watch = Watch(self.datastore)
        self._out = np.empty((4, 0), np.int32)

    def propose(self, step: StepContext) -> DraftBatch:
        if (replaced := self._watch.check()) is not None:
            self.services.report(replaced)
        store = self.datastore
        capacity = int(step.max_nodes.sum())
        if self._out.shape[1] < capacity:
            self._out = np.empty((4, capacity), np.int32)
        counts = np.empty(len(step.num_tokens), np.int32)
        total = retrieve(
            store.tokens, store.order, store.first, store.shards, store.manifest.vocab_size,
            self.config.tree == "heaviest", step.acceptance, step.token_ids, step.num_tokens,
            step.max_nodes, step.chain_only, self._out, counts,
        )  # fmt: skip
        tokens, parents, sources, _ = self._out[:, :total]
        return DraftBatch(tokens, parents, counts, sources)

    def warm_up(self) -> None:
        """Compile the search (or load it from numba's cache) on a dummy request."""
        self.propose(
            bare_step(self.sources, np.zeros((1, 4), np.int32), self.config.num_speculative_tokens)
        )
