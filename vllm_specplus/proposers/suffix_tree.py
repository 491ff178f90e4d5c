"""Suffix decoding, as trees: what this request and earlier responses went on with.

"SuffixDecoding: Extreme Speculative Decoding for Emerging AI Applications" (arXiv
2411.04975). Two kinds of suffix trees: one per running request over its prompt and output,
and one shared over responses (prompts are not stored). Each is asked for what follows the longest
suffixes of the context, at most ``max_spec_factor`` tokens per matched one (sec. 4), and scored by
the tokens that it may be expected to bring. The paper drafts from the one that scores higher
(``"combine": "higher_score"``), vLLM's own ``suffix`` a chain of it; here both trees are fused
by default, and the controller decides by learnt acceptance.

The trees are those of ``arctic-inference``, which vLLM's method uses too: C++, and memory
that grows with the tokens stored. Responses are kept per *cache salt*, in a shared
tree of their own: a request draws only on responses of its salt. Over all salts the
oldest finished responses go once ``max_memory_mb`` is reached, running requests' trees included,
which get half of it at most and grow no further then. A long prompt is read in parts, a step each.
"""

from __future__ import annotations

import importlib.util
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
from numba import njit
from pydantic import Field, model_validator

from vllm_specplus.config import Megabytes, MethodConfig
from vllm_specplus.drafting.trees import Fusion
from vllm_specplus.proposer import Proposer, Services
from vllm_specplus.registry import register_method
from vllm_specplus.retrieval.evidence import evidence_class, evidence_sources
from vllm_specplus.step import StepContext, bare_step
from vllm_specplus.tree import DraftBatch

#: Tokens of a request's text that its own tree takes in a step, and the share of the memory that
#: all such trees may have.
MOST_READ, OWN_SHARE = 4096, 0.5
#: Tokens that a shared tree is told of at once, where nobody is waiting for them.
TAIL = 16
#: Bytes that a token takes in a tree, until it is measured.
FIRST_GUESS = 300.0
#: Memory is estimated anew when the stored tokens that came are this share of those stored.
REESTIMATE = 0.1
#: Stands for "many" where a tree tells frequencies and not counts.
PLACES = 1000

_EMPTY = np.empty(0, np.int32)


class _Draft(NamedTuple):
    """What followed a context in one tree: int32 [N] each."""

    tokens: np.ndarray = _EMPTY
    parents: np.ndarray = _EMPTY
    sources: np.ndarray = _EMPTY
    score: float = 0.0
    """Tokens that it is expected to bring, by the tree's frequencies."""


_NOTHING = _Draft()


@dataclass(slots=True)
class _Shared:
    """The responses of one cache salt."""

    tree: Any
    tokens: int = 0


@dataclass(slots=True)
class _Request:
    salt: str
    local: Any
    """Suffix tree of its prompt and output."""
    response: int
    """Sequence number of its response in the shared tree."""
    ends: frozenset[int] = frozenset()
    """Ids behind which nothing is said."""
    known: int = 0
    """Tokens of its text that are in its own tree, which is read when drafts are asked for."""
    said: int = 0
    """Tokens of its text that are in ``tail`` or have been, those of the prompt counted."""
    stored: int = 0
    """Tokens of its response that are in the shared tree."""
    tail: np.ndarray = field(default_factory=lambda: np.empty(TAIL, np.int32))
    """int32 [TAIL] what it has said since, for the shared tree."""
    waiting: int = 0
    """Tokens of ``tail``."""
    over: bool = False
    """Is what comes behind its turn's end? That was never said."""


@njit(cache=True)
def _classes(parents, probability, length):
    """Class of evidence int32 [N] of a draft's nodes; ``probability`` float32 [N] is that of
    the path, the match had ``length`` tokens."""
    out = np.empty(parents.shape[0], np.int32)
    depths = np.empty(parents.shape[0], np.int32)
    for i in range(parents.shape[0]):
        parent = parents[i]
        depths[i] = 1 if parent < 0 else depths[parent] + 1
        above = 1.0 if parent < 0 else probability[parent]
        places = round(PLACES * probability[i] / above)
        out[i] = evidence_class(length + depths[i] - 1, places, PLACES)
    return out


class SuffixTreeConfig(MethodConfig):
    """``{"method": "suffix_tree", ...}``."""

    retrieves: ClassVar[bool] = True

    method: Literal["suffix_tree"] = "suffix_tree"
    num_speculative_tokens: Annotated[int, Field(ge=1, le=80)] = 32
    max_depth: Annotated[int, Field(ge=2, le=256)] = 24
    """Longest match plus continuation the trees hold."""
    max_spec_factor: Annotated[float, Field(ge=0, le=256)] = 2.0
    """Most tokens drafted per matched token (the paper's is 1), ..."""
    max_spec_offset: Annotated[float, Field(ge=0, le=256)] = 2.0
    """... and beside these (0)."""
    min_token_prob: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Nodes whose path the tree finds less probable are not drafted (the library's is 0.1)."""
    combine: Literal["fuse", "higher_score"] = "fuse"
    """Draft what both trees find, or, as the paper, that of the one with the higher score."""
    max_memory_mb: Megabytes = 256
    """Of all trees; finished responses are forgotten, oldest first, beyond this."""

    @model_validator(mode="after")
    def _library_is_there(self):
        if importlib.util.find_spec("arctic_inference") is None:
            raise ValueError(
                "method 'suffix_tree' needs arctic-inference: pip install 'vllm-specplus[suffix]'"
            )
        return self


@register_method
class SuffixTree(Proposer):
    """Online suffix trees over requests and responses."""

    config_class = SuffixTreeConfig

    def __init__(self, config: SuffixTreeConfig, services: Services):
        super().__init__(config, services)
        # An optional library; the config has made sure that it is there.
        from arctic_inference.suffix_decoding.cache import SuffixTree as NativeTree

        self._fusion = Fusion(
            [evidence_sources("own text", 1.0), evidence_sources("responses", 0.55)]
        )
        self.sources = self._fusion.sources
        self._new_tree = lambda: NativeTree(config.max_depth)
        self._requests: dict[str, _Request] = {}
        self._shared: dict[str, _Shared] = {}
        # Sequence number -> (salt, tokens), in the order the responses were finished.
        self._finished: OrderedDict[int, tuple[str, int]] = OrderedDict()
        self._next_number = 0
        self._bytes_per_token = FIRST_GUESS
        # Tokens of responses in all shared trees, and of running requests in their own ones.
        self._stored = self._own = 0
        # Tokens that there were when the trees were measured, and that came since then.
        self._estimated_at = self._came = 0

    @property
    def stored_tokens(self) -> int:
        """Tokens of responses in all shared trees."""
        return self._stored

    # -- learning -----------------------------------------------------------------

    def _extend(self, step: StepContext) -> None:
        """Take in what has become text; a tree is only ever fed with accepted tokens.

        Of a request that is not to be drafted for, the shared tree gets it :data:`TAIL` tokens at a
        time: token by token that would take most of what a step costs here.
        """
        counts = zip(step.num_tokens.tolist(), step.num_prompt_tokens.tolist(), strict=True)
        for r, (name, (known, prompt)) in enumerate(zip(step.request_ids, counts, strict=True)):
            if known <= prompt:
                continue  # its prompt is still being read
            request = self._requests.get(name)
            if request is None:
                request = self._begin(step, r, prompt)
            text = step.token_ids[r]
            if request.said < prompt:  # another turn of a session
                self._tell(request)
                request.said, request.over = prompt, False
            while request.said < known:
                count = min(known - request.said, TAIL - request.waiting)
                end = request.waiting + count
                request.tail[request.waiting : end] = text[request.said : request.said + count]
                request.waiting, request.said = end, request.said + count
                if end == TAIL:
                    self._tell(request)
            if step.max_nodes[r] > 0:
                self._read(request, text[:known])
                self._tell(request)
        self._evict()

    def _begin(self, step: StepContext, r: int, prompt: int) -> _Request:
        """A request that is seen for the first time, whose prompt has ``prompt`` tokens."""
        salt = step.cache_salts[r] if step.cache_salts else ""
        ends = frozenset() if step.ends is None else frozenset(step.ends[r].tolist())
        request = _Request(salt, self._new_tree(), self._next_number, ends, said=prompt)
        self._requests[step.request_ids[r]] = request
        self._next_number += 1
        return request

    def _tell(self, request: _Request) -> None:
        """Let the shared tree of the request's salt grow by what it has said since, up to its
        end."""
        fresh, request.waiting = request.tail[: request.waiting], 0
        if request.over or not len(fresh):
            return
        ended = (i for i, token in enumerate(fresh.tolist(), 1) if token in request.ends)
        if (end := next(ended, None)) is not None:
            fresh, request.over = fresh[:end], True
        shared = self._shared_of(request.salt)
        shared.tree.extend_ndarray(request.response, fresh)
        shared.tokens += len(fresh)
        request.stored += len(fresh)
        self._stored += len(fresh)
        self._came += len(fresh)

    def _read(self, request: _Request, text: np.ndarray) -> None:
        """Let the request's own tree grow by what is new in ``text`` int32 [n]."""
        count = min(len(text) - request.known, MOST_READ)
        room = OWN_SHARE * self.config.max_memory_mb * 1e6
        if count <= 0 or (self._own + count) * self._bytes_per_token > room:
            return
        request.local.extend_ndarray(0, text[request.known : request.known + count])
        request.known += count
        self._own += count
        self._came += count

    def _shared_of(self, salt: str) -> _Shared:
        shared = self._shared.get(salt)
        if shared is None:
            shared = self._shared[salt] = _Shared(self._new_tree())
        return shared

    def forget(self, request_id: str) -> None:
        """The request's own tree goes; its response stays until memory is short."""
        request = self._requests.pop(request_id, None)
        if request is None:
            return
        self._own -= request.known
        self._tell(request)
        if request.stored:
            self._finished[request.response] = (request.salt, request.stored)
        self._evict()

    def _evict(self) -> None:
        """Oldest responses first, down to ``max_memory_mb``."""
        if self._came > REESTIMATE * self._estimated_at:
            trees = [shared.tree for shared in self._shared.values()]
            trees += [request.local for request in self._requests.values()]
            size = sum(tree.estimate_memory() for tree in trees)
            self._bytes_per_token = size / max(self._stored + self._own, 1)
            self._estimated_at, self._came = self._stored + self._own, 0
        allowed = self.config.max_memory_mb * 1e6
        while self._finished and (self._stored + self._own) * self._bytes_per_token > allowed:
            number, (salt, size) = self._finished.popitem(last=False)
            shared = self._shared[salt]
            shared.tree.remove(number)
            shared.tokens -= size
            self._stored -= size
            if not shared.tokens:
                del self._shared[salt]

    def held_bytes(self) -> int:
        return int(self.config.max_memory_mb * 1e6)

    # -- drafting -----------------------------------------------------------------

    def propose(self, step: StepContext) -> DraftBatch:
        self._extend(step)
        local: list[_Draft] = []
        shared: list[_Draft] = []
        for r, name in enumerate(step.request_ids):
            request, budget = self._requests.get(name), int(step.max_nodes[r])
            if request is None or budget <= 0:
                local.append(_NOTHING)
                shared.append(_NOTHING)
                continue
            text = step.token_ids[r, : step.num_tokens[r]]
            context = text[-self.config.max_depth :]
            local.append(self._query(request.local, context, budget))
            shared.append(self._query(self._shared_of(request.salt).tree, context, budget))
            if self.config.combine == "higher_score":
                worse = shared if local[-1].score >= shared[-1].score else local
                worse[-1] = _NOTHING
        return self._fusion.fuse([_batch(local), _batch(shared)], step)

    def _query(self, tree: Any, context: np.ndarray, budget: int) -> _Draft:
        """What followed ``context`` int32 [n] in a tree, at most ``budget`` nodes."""
        config = self.config
        found = tree.speculate_ndarray(
            context, budget, config.max_spec_factor, config.max_spec_offset,
            config.min_token_prob, True,
        )  # fmt: skip
        if not found.token_ids:
            return _NOTHING
        parents = np.array(found.parents, np.int32)
        sources = _classes(parents, np.array(found.probs, np.float32), found.match_len)
        return _Draft(np.array(found.token_ids, np.int32), parents, sources, found.score)

    def warm_up(self) -> None:
        """Compile the loops (or load them from numba's cache); the trees stay empty."""
        one = np.zeros(1, np.int32)
        _classes(one - 1, np.ones(1, np.float32), 1)
        nothing = _batch([_NOTHING])
        self._fusion.fuse(
            [nothing, nothing],
            bare_step(self.sources, np.zeros((1, 4), np.int32), self.config.num_speculative_tokens),
        )


def _batch(drafts: list[_Draft]) -> DraftBatch:
    tokens, parents, sources = (
        np.concatenate([getattr(draft, name) for draft in drafts])
        for name in ("tokens", "parents", "sources")
    )
    counts = np.array([len(draft.tokens) for draft in drafts], np.int32)
    return DraftBatch(tokens, parents, counts, sources)
