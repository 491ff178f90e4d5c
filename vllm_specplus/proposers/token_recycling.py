"""Token Recycling: successors the target already computed, reused as a draft tree.

"Turning Trash into Treasure: Accelerating Inference of Large Language Models
with Token Recycling" (arXiv 2408.08696). The adjacency matrix ``M`` [V, k] holds
for every token the k most probable successors last seen after it (sec. 3.2 of
the paper). Drafting walks it breadth first below the newest token; every
verified row, rejected ones too, then overwrites its token's row.

Three things are ours, each with an ablation in ``docs/token_recycling.md``:

* rows keyed by the last *two* tokens, with the one-token row as fall-back,
* the continuation of the longest match of the text's own suffix (prompt lookup)
  as one more successor,
* instead of a fixed template the tree is grown best first: a node's score is the
  product of the acceptance probabilities along its path, by where each successor comes
  from (its rank in a row, the length of the match), which the controller keeps learning.
  Any budget gets the most probable nodes for it. The paper's template remains as
  ``"tree": "2.2.2"``.
"""

from __future__ import annotations

import itertools
import logging
from collections import OrderedDict
from collections.abc import Collection
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numba import njit
from pydantic import Field, model_validator
from safetensors import safe_open

from vllm_specplus.config import Megabytes, MethodConfig
from vllm_specplus.files import check_readable, check_writable, tensor_shapes
from vllm_specplus.proposer import Proposer, Services
from vllm_specplus.registry import register_method
from vllm_specplus.retrieval.own_text import FEWEST, OwnTexts
from vllm_specplus.step import Observation, Source, StepContext, bare_step
from vllm_specplus.strict import quoted
from vllm_specplus.tree import DraftBatch

logger = logging.getLogger(__name__)

#: Matrix, keys and rows of pairs.
Tables = tuple[np.ndarray, np.ndarray, np.ndarray]

STATE_FORMAT = "vllm-specplus token_recycling 1"

PAIR_SLOTS = 16384
PAIR_WIDTH = 4
"""Two-token rows: a direct-mapped table, newest entry wins. With the matrix
(49152 x 8 x 4 B = 1.57 MB for SmolLM2) it keeps the state below 2 MB."""

UNSET = -1
"""A row never written: nothing is drafted below it."""

#: The paper's template "2.2.2" (its code's ``tree_template_.py``): number of children
#: of each inner node, named by its path of successor ranks. A node with c children
#: owns ranks 0..c-1.
TEMPLATE_222 = {
    (): 8,
    (0,): 8, (1,): 4, (2,): 3, (3,): 2, (4,): 1, (5,): 1, (6,): 1, (7,): 1,
    (0, 0): 8, (0, 1): 3, (0, 2): 2, (0, 3): 1, (0, 4): 1, (0, 5): 1, (0, 6): 1, (0, 7): 1,
    (1, 0): 2, (1, 1): 1, (2, 0): 1, (3, 0): 1, (4, 0): 1, (5, 0): 1,
    (0, 0, 0): 5, (0, 0, 1): 2, (0, 0, 2): 1, (0, 0, 3): 1, (0, 0, 4): 1, (0, 1, 0): 1,
    (0, 2, 0): 1, (1, 0, 0): 1, (2, 0, 0): 1, (3, 0, 0): 1,
    (0, 0, 0, 0): 3, (0, 0, 0, 1): 1, (0, 0, 0, 2): 1, (0, 0, 1, 0): 1, (0, 1, 0, 0): 1,
    (1, 0, 0, 0): 1,
    (0, 0, 0, 0, 0): 2, (0, 0, 0, 1, 0): 1,
}  # fmt: skip

#: Probability that a child is the target's token, given that its parent was, by the
#: child's rank: measured by benchmarks/token_recycling_ablation.py on Spec-Bench.
TOKEN_RANK_ACCEPTANCE = (0.35, 0.10, 0.06, 0.055, 0.03, 0.03, 0.015, 0.01)
PAIR_RANK_ACCEPTANCE = (0.51, 0.07, 0.04, 0.02)
#: The same for the suffix match's continuation, by length of the match, from 1; alone,
#: and where a row proposes the same token.
MATCH_ACCEPTANCE = (0.17, 0.50, 0.64, 0.68, 0.70, 0.74, 0.80, 0.86)
AGREED_ACCEPTANCE = (0.40, 0.66, 0.72, 0.76, 0.80, 0.85, 0.89, 0.92)


def template_nodes(children: dict[tuple[int, ...], int]) -> tuple[np.ndarray, np.ndarray]:
    """(parents, ranks), int32 [N] each, of a static tree in the paper's node order:
    level by level, within a level lexicographic by path."""
    paths = sorted(
        ((*path, rank) for path, count in children.items() for rank in range(count)),
        key=lambda path: (len(path), path),
    )
    index = {path: i for i, path in enumerate(paths)}
    parents = [index.get(path[:-1], -1) for path in paths]
    return np.array(parents, np.int32), np.array([path[-1] for path in paths], np.int32)


def template_subset(budget: int) -> tuple[np.ndarray, np.ndarray]:
    """The ``budget`` most probable nodes of template "2.2.2", the best first, as (parents, ranks):
    its first n nodes are the best n."""
    parents, ranks = template_nodes(TEMPLATE_222)
    score = np.empty(len(parents))
    for i, (parent, rank) in enumerate(zip(parents, ranks, strict=False)):
        score[i] = TOKEN_RANK_ACCEPTANCE[rank] * (score[parent] if parent >= 0 else 1.0)
    # A child scores below its parent, so the best nodes are closed under parents, which come
    # before their children.
    kept = np.argsort(-score, kind="stable")[:budget]
    renumber = np.full(len(parents) + 1, -1, np.int32)  # the last entry maps the root's -1
    renumber[kept] = np.arange(len(kept))
    return renumber[parents[kept]], ranks[kept]


@njit(cache=True)
def pair_slot(previous, token, slots):
    """Home slot of the key (previous, token) in a table of ``slots`` (a power of two)."""
    h = np.uint64(previous) * np.uint64(0x9E3779B97F4A7C15)
    h ^= np.uint64(token) * np.uint64(0xC2B2AE3D27D4EB4F)
    h ^= h >> np.uint64(29)
    return np.int64(h & np.uint64(slots - 1))


@njit(cache=True)
def recycle(matrix, pair_keys, pair_rows, tokens, previous, top_ids, accepted):
    """Overwrite the rows of all observed tokens (sec. 3.2: latest wins).

    The same token may stand in several rows; accepted rows are written last, and
    among equals the last one wins, so the result does not depend on scheduling.
    """
    vocab, k = matrix.shape
    slots, pair_k = pair_rows.shape
    for kept in (False, True):
        for i in range(tokens.shape[0]):
            token = tokens[i]
            # Padding, and placeholders of other modalities, have no row.
            if accepted[i] != kept or token < 0 or token >= vocab:
                continue
            for j in range(k):
                matrix[token, j] = top_ids[i, j]
            if slots and previous[i] >= 0:
                slot = pair_slot(previous[i], token, slots)
                pair_keys[slot, 0] = previous[i]
                pair_keys[slot, 1] = token
                for j in range(pair_k):
                    pair_rows[slot, j] = top_ids[i, j]


#: A node that may be taken next. Its score, the probability that the text follows to it, is kept
#: apart, since the scores are searched for every node that is taken.
_CANDIDATE = np.dtype(
    [
        ("token", np.int32),
        ("parent", np.int32),  # taken node, -1 = root
        ("source", np.int32),
        ("depth", np.int32),  # from 1
        ("match", np.int32),  # where in the text the suffix match goes on, -1: it is of none
        ("length", np.int32),  # of the match up to there
    ]
)


@njit(cache=True)
def _pair_row(pair_keys, previous, token):
    """The row of ``token`` after ``previous``, -1: none."""
    if pair_keys.shape[0] == 0 or previous < 0:
        return -1
    slot = pair_slot(previous, token, pair_keys.shape[0])
    return slot if pair_keys[slot, 0] == previous and pair_keys[slot, 1] == token else -1


@njit(cache=True)
def _offer(
    candidates, scores, num, node, taken, score, matched, longest, matrix, pair_keys, pair_rows,
    previous, acceptance,
):  # fmt: skip
    """Add the children of ``node`` to ``num`` candidates; returns how many there are then.

    ``taken``: the candidate that became this node, with ``score``; ``matched``: the token with
    which its suffix match goes on, or UNSET. ``acceptance`` float32 [S] is that of its children.
    """
    first, token, top_k = num, taken.token, matrix.shape[1]
    of_match = top_k + pair_rows.shape[1] - 1 + min(taken.length, longest)
    if matched != UNSET:
        child = candidates[num]
        child.token, child.parent, child.depth = matched, node, taken.depth + 1
        child.source, scores[num] = of_match, score * acceptance[of_match]
        child.match, child.length = taken.match + 1, taken.length + 1
        num += 1
    pair, width = _pair_row(pair_keys, previous, token), top_k
    if pair >= 0:
        width = pair_rows.shape[1]
    elif token >= matrix.shape[0]:  # the root is a placeholder of another modality
        width = 0
    for rank in range(width):
        successor = pair_rows[pair, rank] if pair >= 0 else matrix[token, rank]
        if successor < 0:
            break
        if successor == matched:  # row and match agree: one node, of a source of its own
            source = of_match + longest
            candidates[first].source = source
            scores[first] = score * acceptance[source]
            continue
        child, source = candidates[num], rank + (top_k if pair >= 0 else 0)
        child.token, child.parent, child.depth = successor, node, taken.depth + 1
        child.source, scores[num] = source, score * acceptance[source]
        child.match, child.length = -1, 0
        num += 1
    return num


@njit(cache=True)
def _highest(scores):
    """Index of the highest score, the first among equals."""
    best = 0
    for i in range(1, scores.shape[0]):
        if scores[i] > scores[best]:
            best = i
    return best


@njit(cache=True)
def grow(
    matrix, pair_keys, pair_rows, acceptance, longest, text, n, match, budget, chain,
    tokens, parents, sources,
):  # fmt: skip
    """Grow one request's tree best first; returns the number of nodes.

    ``text`` int32 with ``n`` tokens, the last one the root; ``acceptance`` float32
    [depths, S]; ``match`` int32 [2] of the text's suffix, where it goes on and its length, of
    at most ``longest`` (0: none is looked for). Writes the tree to
    ``tokens``, ``parents`` and ``sources`` (numbered as :func:`sources_of` does).
    """
    candidates = np.empty((budget + 1) * (matrix.shape[1] + 1) + 1, _CANDIDATE)
    scores = np.empty(len(candidates), np.float32)
    taken = candidates[-1]  # the last one is no candidate but the node that was taken last
    taken.token, taken.depth, score = text[n - 1], 0, np.float32(1.0)
    taken.match, taken.length = match
    previous = text[n - 2] if n > 1 else np.int32(UNSET)
    num = count = 0
    while True:
        matched = text[taken.match] if 0 <= taken.match < n else np.int32(UNSET)
        if matched >= matrix.shape[0]:  # another modality's placeholder, which is no token
            matched = np.int32(UNSET)
        # Of a chain only the children of the newest node are candidates.
        first = num if chain else 0
        num = _offer(
            candidates, scores, num, count - 1, taken, score, matched, longest, matrix, pair_keys,
            pair_rows, previous, acceptance[min(taken.depth, acceptance.shape[0] - 1)],
        )  # fmt: skip
        if num == first or count == budget:
            return count
        best = first + _highest(scores[first:num])
        candidates[-1], score = candidates[best], scores[best]
        num -= 1  # fill the gap with the last candidate
        candidates[best], scores[best] = candidates[num], scores[num]
        tokens[count], parents[count] = taken.token, taken.parent
        sources[count] = taken.source
        previous = text[n - 1] if taken.parent < 0 else tokens[taken.parent]
        count += 1


@njit(cache=True)
def grow_template(
    matrix, template_parents, template_ranks, root, most, chain, tokens, parents, sources
):  # fmt: skip
    """Fill the first ``most`` nodes of a static tree, whose best ones come first, from the matrix;
    returns the number of nodes.

    Nodes below an unset successor are left out. ``chain`` keeps rank 0 only.
    """
    place = np.full(template_parents.shape[0], -1, np.int32)  # template node -> drafted node
    count = 0
    if root >= matrix.shape[0]:
        return count
    for i in range(template_parents.shape[0]):
        if count == most:
            break
        above = template_parents[i]
        if above >= 0 and place[above] < 0:
            continue
        if chain and template_ranks[i] > 0:
            continue
        parent = place[above] if above >= 0 else -1
        child = matrix[tokens[parent] if parent >= 0 else root, template_ranks[i]]
        if child < 0:
            continue
        tokens[count], parents[count], sources[count] = child, parent, template_ranks[i]
        place[i] = count
        count += 1
    return count


@njit(cache=True)
def grow_batch(
    matrix, pair_keys, pair_rows, acceptance, longest, template_parents, template_ranks,
    token_ids, num_tokens, matches, max_nodes, chain_only, tokens, parents, sources, counts,
):  # fmt: skip
    """Drafts of all requests, back to back; returns the total number of nodes."""
    total = 0
    for r in range(num_tokens.shape[0]):
        counts[r] = 0
        if max_nodes[r] <= 0 or num_tokens[r] <= 0:
            continue
        text, n = token_ids[r], num_tokens[r]
        if template_parents.shape[0]:
            counts[r] = grow_template(
                matrix,
                template_parents,
                template_ranks,
                text[n - 1],
                max_nodes[r],
                chain_only[r],
                tokens[total:],
                parents[total:],
                sources[total:],
            )
        else:
            counts[r] = grow(
                matrix,
                pair_keys,
                pair_rows,
                acceptance[r],
                longest,
                text,
                n,
                matches[r],
                max_nodes[r],
                chain_only[r],
                tokens[total:],
                parents[total:],
                sources[total:],
            )
        total += counts[r]
    return total


def sources_of(top_k: int, pair_width: int, longest: int) -> tuple[Source, ...]:
    """Where a node can come from: ranks of one-token rows, ranks of two-token rows,
    matches of each length alone, and matches a row agrees with."""
    tables = (
        ("token rank", "token", 0, _padded(TOKEN_RANK_ACCEPTANCE, top_k)),
        ("pair rank", "pair", 0, _padded(PAIR_RANK_ACCEPTANCE, pair_width)),
        ("match of", "match", 1, MATCH_ACCEPTANCE[:longest]),
        ("agreed match of", "match", 1, AGREED_ACCEPTANCE[:longest]),
    )
    return tuple(
        Source(f"{name} {first + i}", group, p)
        for name, group, first, priors in tables
        for i, p in enumerate(priors)
    )


class TokenRecyclingConfig(MethodConfig):
    """``{"method": "token_recycling", ...}``."""

    method: Literal["token_recycling"] = "token_recycling"
    num_speculative_tokens: Annotated[int, Field(ge=1, le=80)] = 32
    tree: Literal["best_first", "2.2.2"] = "best_first"
    """Grown best first by acceptance probability, or the paper's static template."""
    top_k: Annotated[int, Field(ge=1, le=16)] = 8
    """Successors kept per token."""
    pair_keys: bool = True
    """Also keep successors keyed by the last two tokens."""
    match_context: bool = True
    """Merge the continuation of the longest match in the request's own text."""
    seed_from_prompt: bool = False
    """Fill the matrix from the prompt's logits (costs the output layer per prompt token)."""
    max_memory_mb: Megabytes = 256
    """Matrices of cache salts beside the unsalted one; the least recently used go beyond this."""
    load_matrix: str | None = None
    """Start from a matrix written by ``save_matrix``."""
    save_matrix: str | None = None
    """Write the matrix here when the engine shuts down."""

    @model_validator(mode="after")
    def _files_can_be_used(self):
        if self.load_matrix is not None:
            check_readable(self.load_matrix, "load_matrix")
            _read_format(self.load_matrix)
        if self.save_matrix is not None:
            check_writable(self.save_matrix, "save_matrix")
        return self

    @model_validator(mode="after")
    def _template_is_the_papers(self):
        if self.tree == "2.2.2":
            if self.top_k < 8:
                raise ValueError('tree "2.2.2" uses ranks 0..7: set top_k to 8 or more')
            for key in ("pair_keys", "match_context"):
                if getattr(self, key) and key in self.model_fields_set:
                    raise ValueError(
                        f'tree "2.2.2" is the paper\'s static tree and cannot use {key}: '
                        f'remove it, or use tree "best_first"'
                    )
        return self


def _read_format(path: str) -> dict[str, str]:
    """Metadata of a saved matrix; ValueError if the file is none."""
    tensor_shapes(Path(path), f"load_matrix {quoted(path)}")
    with safe_open(path, framework="numpy") as file:
        meta = file.metadata() or {}
    if meta.get("format") != STATE_FORMAT:
        raise ValueError(
            f"load_matrix {quoted(path)} is not a Token Recycling matrix: name one that "
            f"'save_matrix' wrote"
        )
    return meta


@register_method
class TokenRecycling(Proposer):
    """The adjacency matrix and its tree; state lives on the host, see ``base``."""

    config_class = TokenRecyclingConfig

    def __init__(self, config: TokenRecyclingConfig, services: Services):
        super().__init__(config, services)
        self.top_k = config.top_k
        self.reads_prompt = config.seed_from_prompt
        self._unsalted = self._new_tables()
        self.matrix, self.pair_keys, self.pair_rows = self._unsalted
        # The least recently used salt first.
        self._salted: OrderedDict[str, Tables] = OrderedDict()
        size = sum(table.nbytes for table in self._unsalted)
        self._most_salts = max(int(config.max_memory_mb * 1e6) // size, 1)
        self._start: Tables | None = None
        self.longest_match = len(MATCH_ACCEPTANCE) if config.match_context else 0
        self._own_texts = OwnTexts(self.longest_match) if self.longest_match else None
        self.sources = sources_of(config.top_k, self.pair_rows.shape[1], self.longest_match)
        none = np.empty(0, np.int32)
        self.template = (none, none)
        if config.tree == "2.2.2":
            self.template = template_subset(config.num_speculative_tokens)
        self._buffers = [np.empty(0, np.int32)] * 3
        if config.load_matrix:
            self.load(config.load_matrix)
            matrix, keys, rows = (table.copy() for table in self._unsalted)
            self._start = matrix, keys, rows

    def held_bytes(self) -> int:
        return sum(table.nbytes for table in self._unsalted)

    def propose(self, step: StepContext) -> DraftBatch:
        counts = np.empty(len(step.num_tokens), np.int32)
        capacity = int(step.max_nodes.sum())
        if len(self._buffers[0]) < capacity:
            self._buffers = [np.empty(capacity, np.int32) for _ in range(3)]
        tokens, parents, sources = self._buffers
        matches = self._matches(step)
        total = 0
        for first, end, tables in self._learn(step):
            own = slice(first, end)
            total += grow_batch(
                *tables, step.acceptance[own], self.longest_match, *self.template,
                step.token_ids[own], step.num_tokens[own], matches[own], step.max_nodes[own],
                step.chain_only[own], tokens[total:], parents[total:], sources[total:],
                counts[own],
            )  # fmt: skip
        return DraftBatch(tokens[:total], parents[:total], counts, sources[:total])

    def _matches(self, step: StepContext) -> np.ndarray:
        """int32 [R, 2] where each text's suffix occurred before: see ``OwnText.match``."""
        if self._own_texts is None or len(self.template[0]):
            return np.tile(np.array((-1, 0), np.int32), (len(step.request_ids), 1))
        return self._own_texts.matches(step)

    def forget(self, request_id: str) -> None:
        if self._own_texts is not None:
            self._own_texts.forget(request_id)

    def observe_prompt(self, observation: Observation) -> None:
        o, tables = observation, self._tables(observation.cache_salt, ())
        if tables is not None:
            recycle(*tables, o.tokens, o.previous, o.top_ids, o.accepted)

    # -- whose tables ---------------------------------------------------------------

    def _new_tables(self) -> Tables:
        config, vocab = self.config, self.services.vocab_size
        pairs = PAIR_SLOTS if config.pair_keys else 0
        return (
            np.full((vocab, config.top_k), UNSET, np.int32),
            np.full((pairs, 2), UNSET, np.int32),
            np.full((pairs, min(config.top_k, PAIR_WIDTH)), UNSET, np.int32),
        )

    def _tables(self, salt: str, busy: Collection[str]) -> Tables | None:
        """The tables of ``salt``; None where all that memory has room for are of ``busy`` salts,
        whose requests are in this step too."""
        if not salt:
            return self._unsalted
        tables = self._salted.get(salt)
        if tables is None:
            if len(self._salted) >= self._most_salts:
                oldest = next(iter(self._salted))
                if oldest in busy:
                    return None
                tables = self._salted.pop(oldest)
            tables = tables or self._new_tables()
            for i, table in enumerate(tables):
                table[...] = UNSET if self._start is None else self._start[i]
            self._salted[salt] = tables
        self._salted.move_to_end(salt)
        return tables

    def _learn(self, step: StepContext) -> list[tuple[int, int, Tables]]:
        """Learn from the step, every salt from its own rows; returns whose tables draft for
        which requests, as (first, end, tables), in the batch's order."""
        o, salts = step.observation, step.cache_salts
        if not salts or not any(salts):
            recycle(*self._unsalted, o.tokens, o.previous, o.top_ids, o.accepted)
            return [(0, len(step.num_tokens), self._unsalted)]
        names = list(dict.fromkeys(salts))
        # Those that have tables already first: a newcomer must not take them.
        names.sort(key=lambda salt: salt not in self._salted)
        busy = set(names)
        tables = {salt: self._tables(salt, busy) for salt in names}
        if len(o.tokens):
            owner = np.repeat(np.arange(len(salts)), np.diff(step.row_starts))
            for salt, own in tables.items():
                if own is not None:
                    of_salt = np.array([each == salt for each in salts])
                    rows = np.flatnonzero(of_salt[owner])
                    recycle(*own, o.tokens[rows], o.previous[rows], o.top_ids[rows],
                            o.accepted[rows])  # fmt: skip
        runs, first = [], 0
        for salt, run in itertools.groupby(salts):
            end = first + len(list(run))
            runs.append((first, end, tables[salt] or self._nothing))
            first = end
        return runs

    @cached_property
    def _nothing(self) -> Tables:
        """Tables that stay as they are, for salts that memory has no room for."""
        return self._start or self._new_tables()

    def warm_up(self) -> None:
        """Compile the loops (or load them from numba's cache) on a dummy request, long enough that
        its own text outgrows its first room."""
        text = np.arange(2 * FEWEST, dtype=np.int32) % self.services.vocab_size
        self.propose(bare_step(self.sources, text[None], self.config.num_speculative_tokens))

    def save(self, path: str) -> None:
        """Write the matrix and the pair table (safetensors), atomically."""
        from safetensors.numpy import save_file

        part = Path(path).with_suffix(".part")
        save_file(
            {"matrix": self.matrix, "pair_keys": self.pair_keys, "pair_rows": self.pair_rows},
            str(part),
            metadata={"format": STATE_FORMAT, "fingerprint": self.services.fingerprint},
        )
        part.replace(path)

    def load(self, path: str) -> None:
        """Read what :meth:`save` wrote. Raises ValueError for another model's file."""
        from safetensors.numpy import load_file

        # Checked first: others' tensors may be large or of types NumPy does not know.
        meta, state = _read_format(path), load_file(path)
        if meta.get("fingerprint") != self.services.fingerprint:
            raise ValueError(
                f"load_matrix {quoted(path)} was saved for another model or tokenizer "
                f"({meta.get('fingerprint')}, this one is {self.services.fingerprint})"
            )
        for name in ("matrix", "pair_keys", "pair_rows"):
            mine, saved = getattr(self, name), state.get(name)
            if saved is None or saved.shape != mine.shape or saved.dtype != mine.dtype:
                raise ValueError(
                    f"load_matrix {quoted(path)} was saved with other top_k or pair_keys settings"
                )
            if saved.size and (saved.min() < UNSET or saved.max() >= self.services.vocab_size):
                raise ValueError(
                    f"load_matrix {quoted(path)} holds token ids outside the vocabulary"
                )
            mine[...] = saved

    def close(self) -> None:
        if self.config.save_matrix:
            self.save(self.config.save_matrix)
            logger.info("Token Recycling matrix saved to %s", self.config.save_matrix)


def _padded(values: tuple[float, ...], width: int) -> list[float]:
    """``width`` values; ranks beyond the measured ones get the last one."""
    return [values[min(i, len(values) - 1)] for i in range(width)]
