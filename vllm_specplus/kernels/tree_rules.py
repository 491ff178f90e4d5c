"""Verification of sampled trees on the GPU: the lossless rules for drawn nodes, in Triton.

One program per request walks its tree; nothing is read back to the host.

What a rule has left of the target's distribution at a node is always ``(p - c q)+`` for one
number ``c``, up to a factor: subtracting ``q`` again, with any weight, only adds to ``c``,
because what was clipped at 0 stays there. With ``t`` the sum of ``(p - c q)+``, ``z`` that of
``q`` without the rejected siblings (1 where draws are with replacement) and ``a`` the
probability to come here (1 but for traversal), a rejection means::

    c += t / (a z),    a = R / (R + 1 - a) with R = a t' / t

where ``t'`` is the new ``t``. So the state of a node is a few numbers and never a vector of
the vocabulary's size, each rejection is one pass over ``p`` and ``q``, and an accepted first
child is none. Block verification has ``c = 1 / a``. SpecTr leaves ``(p - f min(q, p / rho))+``;
all of them are :func:`_left`, with ``cap = 1 / rho``, or a huge one.

Sums over blocks of the vocabulary are float32, those over the blocks, and all scalars, float64.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from vllm_specplus.step import DraftProbs, Rows

#: Tokens of the vocabulary per step of a program.
BLOCK = 4096
NUM_WARPS = 8

#: Rows of the matrix that carries a step's int32 arrays to the device, in one copy.
TOKENS, PARENTS, CHILDREN, FIRST_CHILDREN, INDEX, DRAWN, STARTS, REQUESTS, NEXT = (
    tl.constexpr(i) for i in range(9)
)
NUM_ARRAYS = 9


class _Launch:
    """What the kernels of a step are launched with; see ``SampledRule`` for the arguments."""

    def __init__(
        self, target_probs: torch.Tensor, rows: Rows, draft_probs: DraftProbs,
        accept_noise: torch.Tensor, output_noise: torch.Tensor,
    ):  # fmt: skip
        num_rows, p = len(rows.tokens), target_probs
        host, has_draws = _arrays(rows, draft_probs)
        tree = torch.from_numpy(host)
        if p.device.type == "cuda":
            tree = tree.pin_memory().to(p.device, non_blocking=True)
        self.out = torch.full((num_rows,), -1, dtype=torch.int32, device=p.device)
        # A step without draws may come without draft probabilities.
        q = draft_probs.q if has_draws.any() else p
        assert p.stride(1) == q.stride(1) == 1
        noise = accept_noise.double(), output_noise.double()
        self._arguments = (self.out, p, q, *noise, tree, tree.stride(0))
        self._sizes = (p.shape[1], q.shape[1], p.stride(0), q.stride(0))
        # Requests without draws are walked whatever the rule, those with draws come first.
        self._drawn, self._requests = int(has_draws.sum()), len(has_draws)

    def walk(self, first: int, k_seq: bool, renormalise: bool) -> torch.Tensor:
        """Walks the requests from ``first`` on level by level; returns the output, int32 [L]."""
        if first < self._requests:
            _walk_kernel[(self._requests - first,)](
                *self._arguments,
                first,
                *self._sizes,
                K_SEQ=k_seq,
                RENORMALISE=renormalise,
                BLOCK=BLOCK,
                num_warps=NUM_WARPS,
            )
        return self.out

    def whole_trees(self, kernel) -> torch.Tensor:
        """Runs ``kernel`` on requests with draws and walks the others; returns the output."""
        if self._drawn:
            state = torch.empty(len(self.out), 4, dtype=torch.float64, device=self.out.device)
            kernel[(self._drawn,)](
                *self._arguments, state, *self._sizes, BLOCK=BLOCK, num_warps=NUM_WARPS
            )
        return self.walk(self._drawn, k_seq=False, renormalise=False)


def walk_with_replacement(*step) -> torch.Tensor:
    """Verifies as ``samplers.sampled.WithReplacement`` does."""
    return _Launch(*step).walk(0, k_seq=False, renormalise=False)


def walk_without_replacement(*step) -> torch.Tensor:
    """Verifies as ``samplers.sampled.WithoutReplacement`` does."""
    return _Launch(*step).walk(0, k_seq=False, renormalise=True)


def walk_k_seq(*step) -> torch.Tensor:
    """Verifies as ``samplers.sampled.KSeq`` does."""
    return _Launch(*step).walk(0, k_seq=True, renormalise=False)


def verify_block(*step) -> torch.Tensor:
    """Verifies as ``samplers.sampled.Block`` does."""
    return _Launch(*step).whole_trees(_block_kernel)


def verify_traversal(*step) -> torch.Tensor:
    """Verifies as ``samplers.sampled.Traversal`` does."""
    return _Launch(*step).whole_trees(_traversal_kernel)


def _arrays(rows: Rows, draft_probs: DraftProbs) -> tuple[np.ndarray, np.ndarray]:
    """Lays out what the kernels read, int32 [NUM_ARRAYS, at least L + 1], and says which requests
    have draws, bool [R].

    ``PARENTS`` and ``CHILDREN`` are rows of the step; those of row ``i`` are
    ``CHILDREN[FIRST_CHILDREN[i] : FIRST_CHILDREN[i + 1]]``, in draw order.
    """
    num_rows, num_requests = len(rows.tokens), len(rows.starts) - 1
    # Rows of a multiple of 16 bytes: an array's alignment must not select another variant.
    out = np.zeros((NUM_ARRAYS, -(-(num_rows + 1) // 4) * 4), np.int32)
    starts = np.repeat(rows.starts[:-1], np.diff(rows.starts))
    nodes = np.flatnonzero(rows.parents >= 0)
    parents = (starts + rows.parents)[nodes]
    out[TOKENS.value, :num_rows] = rows.tokens
    out[PARENTS.value, nodes] = parents
    out[CHILDREN.value, : len(nodes)] = nodes[np.argsort(parents, kind="stable")]
    counts = np.bincount(parents, minlength=num_rows)
    out[FIRST_CHILDREN.value, 1 : num_rows + 1] = np.cumsum(counts)
    out[INDEX.value, :num_rows] = draft_probs.index
    out[DRAWN.value, :num_rows] = draft_probs.drawn
    out[STARTS.value, : num_requests + 1] = rows.starts
    has_draws = np.add.reduceat(draft_probs.drawn, rows.starts[:-1]) > 0
    order = np.concatenate([np.flatnonzero(has_draws), np.flatnonzero(~has_draws)])
    out[REQUESTS.value, :num_requests] = order
    out[NEXT.value] = out[FIRST_CHILDREN.value]
    return out, has_draws


@triton.jit
def _left(p, q, ids, c, cap, vocab, q_vocab):
    """Computes (p - c min(q, p cap))+ at tokens ``ids``; ``p`` and ``q`` point to a node's rows."""
    # Finite in float32: infinity times a q of 0 is NaN.
    c, cap = tl.minimum(c, 1e38).to(tl.float32), cap.to(tl.float32)
    target = tl.load(p + ids, mask=ids < vocab, other=0.0)
    draft = tl.load(q + ids, mask=ids < q_vocab, other=0.0)
    return tl.maximum(target - c * tl.minimum(draft, target * cap), 0.0)


@triton.jit
def _without(values, ids, tree, tree_stride, low, high):
    """Zeroes those of ``values`` [BLOCK] of the children ``low`` .. ``high`` (exclusive)."""
    for child in range(low, high):
        row = tl.load(tree + CHILDREN * tree_stride + child)
        token = tl.load(tree + TOKENS * tree_stride + row)
        values = tl.where(ids == token, 0.0, values)
    return values


@triton.jit
def _sums(
    p, q, tree, tree_stride, low, high, c, cap, vocab, q_vocab, BLOCK: tl.constexpr
):  # fmt: skip
    """Sums what is left, and ``q``, float64, both without the children low .. high.

    ``q`` has to be summed anew and without them, not less them: what remains of a sharp ``q``
    is far below the rounding of its sum.
    """
    left_sum = tl.full((), 0.0, tl.float64)
    draft_sum = tl.full((), 0.0, tl.float64)
    for start in range(0, vocab, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        left = _left(p, q, ids, c, cap, vocab, q_vocab)
        draft = tl.load(q + ids, mask=ids < q_vocab, other=0.0)
        left = _without(left, ids, tree, tree_stride, low, high)
        draft = _without(draft, ids, tree, tree_stride, low, high)
        left_sum += tl.sum(left, 0).to(tl.float64)
        draft_sum += tl.sum(draft, 0).to(tl.float64)
    return left_sum, draft_sum


@triton.jit
def _draw(
    p, q, tree, tree_stride, low, high, c, cap, noise, vocab, q_vocab, BLOCK: tl.constexpr
):  # fmt: skip
    """Draws a token with probability proportional to what is left, never one of probability 0.

    The children low .. high were rejected, so nothing is left of them; rounding must not say
    otherwise. Where rounding says that nothing is left at all, ``p`` and ``q`` are equal, and
    the draw is from ``p`` without the children. Where ``p`` has nothing else it is from ``p``:
    ``tree.accepted_paths`` does not enter a child that has no output of its own.
    """
    total, _ = _sums(p, q, tree, tree_stride, low, high, c, cap, vocab, q_vocab, BLOCK)
    if total <= 0.0:
        c = c * 0.0
        total, _ = _sums(p, q, tree, tree_stride, low, high, c, cap, vocab, q_vocab, BLOCK)
        if total <= 0.0:
            high = low
            total, _ = _sums(p, q, tree, tree_stride, low, high, c, cap, vocab, q_vocab, BLOCK)
    point = noise.to(tl.float64) * total
    before = tl.full((), 0.0, tl.float64)
    token = vocab
    last = 0  # the last token that has weight
    start = 0
    while (start < vocab) & (token == vocab):
        ids = start + tl.arange(0, BLOCK)
        left = _left(p, q, ids, c, cap, vocab, q_vocab)
        left = _without(left, ids, tree, tree_stride, low, high)
        after = before + tl.sum(left, 0).to(tl.float64)
        last = tl.maximum(last, tl.max(tl.where(left > 0.0, ids, 0), 0))
        if after > point:
            # The scan may round otherwise than the sum and not reach the point: then it is
            # the block's last token.
            cdf = before + tl.cumsum(left.to(tl.float64), 0)
            hit = tl.min(tl.where((left > 0.0) & (cdf > point), ids, vocab), 0)
            token = tl.minimum(hit, last)
        before = after
        start += BLOCK
    return tl.minimum(token, last)


@triton.jit
def _is_repeated(tree, tree_stride, low, child, token):
    """Is ``token`` among the siblings before ``child``?"""
    repeated = False
    for earlier in range(low, child):
        row = tl.load(tree + CHILDREN * tree_stride + earlier)
        repeated = repeated | (tl.load(tree + TOKENS * tree_stride + row) == token)
    return repeated


@triton.jit
def _node(p, q, tree, tree_stride, row, p_stride, q_stride):
    """Finds the rows of ``p`` and ``q`` of a node, and the range of its children."""
    # Without draws this one is not used.
    draft_row = tl.maximum(tl.load(tree + INDEX * tree_stride + row), 0)
    low = tl.load(tree + FIRST_CHILDREN * tree_stride + row)
    high = tl.load(tree + FIRST_CHILDREN * tree_stride + row + 1)
    # int64: a batch's distributions have more than 2**31 elements.
    return p + row.to(tl.int64) * p_stride, q + draft_row.to(tl.int64) * q_stride, low, high


@triton.jit
def _candidate(p, q, tree, tree_stride, low, child, c, cap, vocab, q_vocab):
    """Reads a child's row and token, what is left of its probability, and its ``q``, float64.

    Draws without replacement that repeat a sibling stand for a ``q`` that had no more tokens.
    Of a repeated sibling nothing is left, whatever rounding says.
    """
    row = tl.load(tree + CHILDREN * tree_stride + child)
    token = tl.load(tree + TOKENS * tree_stride + row)
    draft = tl.load(q + token, mask=token < q_vocab, other=0.0)
    left = _left(p, q, token, c, cap, vocab, q_vocab)
    repeated = _is_repeated(tree, tree_stride, low, child, token)
    left = tl.where(repeated, 0.0, left)
    draft = tl.where(repeated, 0.0, draft)
    return row, left.to(tl.float64), draft.to(tl.float64)


@triton.jit
def _power(base, exponent):
    out = base * 0.0 + 1.0
    for _ in range(exponent):
        out *= base
    return out


@triton.jit
def _best_rho(p, q, k, vocab, q_vocab, BLOCK: tl.constexpr):
    """Finds SpecTr's rho* in [1, k] and its beta; see ``samplers.sampled.best_rho``.

    Each pass over the vocabulary tries three points between the ends, which leaves a quarter.
    """
    # A quarter, 12 times: float32 knows no finer. One sibling leaves nothing to search.
    passes = tl.where(k > 1, 12, 1)
    low = tl.full((), 1.0, tl.float64)
    high = k.to(tl.float64)
    beta = tl.full((), 0.0, tl.float64)
    parts = tl.arange(0, 4)
    for _ in range(passes):
        rho = low + (high - low) * ((parts + 1) / 4.0)
        cap = (1.0 / rho).to(tl.float32)
        betas = tl.zeros([4], tl.float64)
        for start in range(0, vocab, BLOCK):
            ids = start + tl.arange(0, BLOCK)
            target = tl.load(p + ids, mask=ids < vocab, other=0.0)
            draft = tl.load(q + ids, mask=ids < q_vocab, other=0.0)
            common = tl.minimum(draft[None, :], target[None, :] * cap[:, None])
            betas += tl.sum(common, 1).to(tl.float64)
        # The last point is the upper end, where it is known to hold.
        short = (1.0 - _power(1.0 - betas, k) > rho * betas) & (parts < 3)
        found = parts == tl.sum(short.to(tl.int32), 0)
        beta = tl.sum(tl.where(found, betas, 0.0), 0)
        width = (high - low) / 4.0
        high = tl.sum(tl.where(found, rho, 0.0), 0)
        low = high - width
    return high, beta


@triton.jit(do_not_specialize=["tree_stride", "first_request"])
def _walk_kernel(
    out,  # int32 [L]
    p,  # float32 [L, vocab]
    q,  # float32 [M, q_vocab]
    accept_noise,  # float64 [L]
    output_noise,  # float64 [R]
    tree,  # int32 [NUM_ARRAYS, tree_stride]
    tree_stride,
    first_request,
    vocab,
    q_vocab,
    p_stride,
    q_stride,
    K_SEQ: tl.constexpr,
    RENORMALISE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Walks from the root down, one level at a time."""
    NO_CAP: tl.constexpr = 3e38
    request = tl.load(tree + REQUESTS * tree_stride + first_request + tl.program_id(0))
    row = tl.load(tree + STARTS * tree_stride + request)
    walking = True
    while walking:
        p_row, q_row, low, high = _node(p, q, tree, tree_stride, row, p_stride, q_stride)
        drawn = low + tl.load(tree + DRAWN * tree_stride + row)
        c = tl.full((), 0.0, tl.float64)
        cap = tl.full((), NO_CAP, tl.float64)
        t = tl.full((), 1.0, tl.float64)
        z = tl.full((), 1.0, tl.float64)
        chosen = -1
        child = low
        if K_SEQ:
            if drawn > low:
                rho, beta = _best_rho(p_row, q_row, drawn - low, vocab, q_vocab, BLOCK)
                while (child < drawn) & (chosen < 0):
                    node = tl.load(tree + CHILDREN * tree_stride + child)
                    token = tl.load(tree + TOKENS * tree_stride + node)
                    target = tl.load(p_row + token).to(tl.float64)
                    draft = tl.load(q_row + token, mask=token < q_vocab, other=0.0).to(tl.float64)
                    noise = tl.load(accept_noise + node).to(tl.float64)
                    if (draft > 0.0) & (noise * rho * draft < target):
                        # The first of equal siblings is the one that has descendants.
                        for earlier in range(low, child + 1):
                            sibling = tl.load(tree + CHILDREN * tree_stride + earlier)
                            same = tl.load(tree + TOKENS * tree_stride + sibling) == token
                            chosen = tl.where(same & (chosen < 0), sibling, chosen)
                    child += 1
                if chosen < 0:
                    if beta > 0.0:
                        c = (1.0 - _power(1.0 - beta, drawn - low)) / beta
                    cap = 1.0 / rho
                    t, _ = _sums(
                        p_row, q_row, tree, tree_stride, low, drawn, c, cap, vocab, q_vocab, BLOCK
                    )
        else:
            while (child < drawn) & (chosen < 0):
                node, left, draft = _candidate(
                    p_row, q_row, tree, tree_stride, low, child, c, cap, vocab, q_vocab
                )
                noise = tl.load(accept_noise + node).to(tl.float64)
                child += 1
                if (draft > 0.0) & (noise * draft * t < left * z):
                    chosen = node
                elif z > 0.0:  # else nothing is left of q to subtract
                    less = c + t / z
                    rest, draft_sum = _sums(
                        p_row, q_row, tree, tree_stride, low, child, less, cap, vocab, q_vocab,
                        BLOCK,
                    )  # fmt: skip
                    # Where rounding leaves nothing, p and q are equal: p stays.
                    c = tl.where(rest > 0.0, less, c)
                    t = tl.where(rest > 0.0, rest, t)
                    if RENORMALISE:
                        z = draft_sum
        # Deterministic siblings: what is left loses them one by one.
        child = drawn
        while (child < high) & (chosen < 0):
            node, left, _ = _candidate(
                p_row, q_row, tree, tree_stride, low, child, c, cap, vocab, q_vocab
            )
            noise = tl.load(accept_noise + node).to(tl.float64)
            if (left > 0.0) & ((noise * t < left) | (t <= left)):
                chosen = node
            t -= left
            child += 1
        if chosen >= 0:
            tl.store(out + row, tl.load(tree + TOKENS * tree_stride + chosen))
            row = chosen
        else:
            noise = tl.load(output_noise + request)
            token = _draw(
                p_row, q_row, tree, tree_stride, low, high, c, cap, noise, vocab, q_vocab, BLOCK
            )
            tl.store(out + row, token)
            walking = False


@triton.jit(do_not_specialize=["tree_stride"])
def _block_kernel(
    out,
    p,
    q,
    accept_noise,
    output_noise,
    tree,
    tree_stride,
    state,  # float64 [L, 4]
    vocab,
    q_vocab,
    p_stride,
    q_stride,
    BLOCK: tl.constexpr,
):
    """Tests prefixes from the chain's end: the first that passes is the longest one."""
    NO_CAP: tl.constexpr = 3e38
    request = tl.load(tree + REQUESTS * tree_stride + tl.program_id(0))
    root = tl.load(tree + STARTS * tree_stride + request)
    last = tl.load(tree + STARTS * tree_stride + request + 1) - 1
    cap = tl.full((), NO_CAP, tl.float64)
    reach = tl.full((), 1.0, tl.float64)
    tl.store(state + root * 4, reach)
    row = root
    while row < last:
        p_row, q_row, _, _ = _node(p, q, tree, tree_stride, row, p_stride, q_stride)
        token = tl.load(tree + TOKENS * tree_stride + row + 1)
        target = tl.load(p_row + token).to(tl.float64)
        draft = tl.load(q_row + token, mask=token < q_vocab, other=0.0).to(tl.float64)
        ratio = reach * target / tl.where(draft > 0.0, draft, 1.0)
        reach = tl.where(draft > 0.0, tl.minimum(ratio, 1.0), 0.0)
        row += 1
        tl.store(state + row * 4, reach)
    # One thread stores a scalar, all of them load it.
    tl.debug_barrier()

    searching = True
    while searching:
        reach = tl.load(state + row * 4)
        p_row, q_row, low, high = _node(p, q, tree, tree_stride, row, p_stride, q_stride)
        c = tl.full((), 0.0, tl.float64)
        passes = reach
        if row < last:
            # Of a prefix that cannot be reached nothing is left.
            c = 1.0 / tl.where(reach > 0.0, reach, 1.0)
            if (row > root) & (reach > 0.0):
                rest, _ = _sums(
                    p_row, q_row, tree, tree_stride, low, low, c, cap, vocab, q_vocab, BLOCK
                )
                rest *= reach
                below = rest + 1.0 - reach
                passes = tl.where(below > 0.0, rest / tl.where(below > 0.0, below, 1.0), 1.0)
        accepted = row == root
        if row > root:
            accepted = tl.load(accept_noise + row).to(tl.float64) < passes
        if accepted:
            noise = tl.load(output_noise + request)
            token = _draw(
                p_row, q_row, tree, tree_stride, low, high, c, cap, noise, vocab, q_vocab, BLOCK
            )
            tl.store(out + row, token)
            searching = False
        else:
            row -= 1
    for above in range(root, row):
        tl.store(out + above, tl.load(tree + TOKENS * tree_stride + above + 1))


@triton.jit(do_not_specialize=["tree_stride"])
def _traversal_kernel(
    out,
    p,
    q,
    accept_noise,
    output_noise,
    tree,
    tree_stride,
    state,  # float64 [L, 4]: c, t, z and a of the nodes above the current one
    vocab,
    q_vocab,
    p_stride,
    q_stride,
    BLOCK: tl.constexpr,
):
    """Walks down to the first leaf; where its test fails it is cut off, and its parent, a leaf
    itself after its last child, goes on with what is left."""
    NO_CAP: tl.constexpr = 3e38
    request = tl.load(tree + REQUESTS * tree_stride + tl.program_id(0))
    root = tl.load(tree + STARTS * tree_stride + request)
    row = root
    cap = tl.full((), NO_CAP, tl.float64)
    one = tl.full((), 1.0, tl.float64)
    c, t, z, a = one * 0.0, one, one, one
    walking = True
    while walking:
        p_row, q_row, low, high = _node(p, q, tree, tree_stride, row, p_stride, q_stride)
        child = tl.load(tree + NEXT * tree_stride + row)
        accepted = (row == root) & (child == high)
        # Below a node that is reached with probability 0, so is every other.
        if (row > root) & ((child == high) | (a <= 0.0)):
            accepted = tl.load(accept_noise + row).to(tl.float64) < a
            child = high
        if child < high:
            node, left, draft = _candidate(
                p_row, q_row, tree, tree_stride, low, child, c, cap, vocab, q_vocab
            )
            tl.store(state + row * 4, c)
            tl.store(state + row * 4 + 1, t)
            tl.store(state + row * 4 + 2, z)
            tl.store(state + row * 4 + 3, a)
            possible = (draft > 0.0) & (z > 0.0)
            ratio = a * left * z / tl.where(possible, t * draft, 1.0)
            a = tl.where(possible, tl.minimum(ratio, 1.0), 0.0)
            c, t, z = one * 0.0, one, one
            row = node
        elif accepted:
            noise = tl.load(output_noise + request)
            token = _draw(
                p_row, q_row, tree, tree_stride, low, high, c, cap, noise, vocab, q_vocab, BLOCK
            )
            tl.store(out + row, token)
            walking = False
        else:
            row = tl.load(tree + PARENTS * tree_stride + row)
            c = tl.load(state + row * 4)
            t = tl.load(state + row * 4 + 1)
            z = tl.load(state + row * 4 + 2)
            a = tl.load(state + row * 4 + 3)
            p_row, q_row, low, high = _node(p, q, tree, tree_stride, row, p_stride, q_stride)
            child = tl.load(tree + NEXT * tree_stride + row) + 1
            # All threads have read before one of them writes.
            tl.debug_barrier()
            tl.store(tree + NEXT * tree_stride + row, child)
            # a > 0, or its subtree would not have been entered. Once z is 0 nothing is left
            # of q to subtract.
            less = tl.where(z > 0.0, c + t / tl.where(z > 0.0, a * z, 1.0), c)
            rest, draft_sum = _sums(
                p_row, q_row, tree, tree_stride, low, child, less, cap, vocab, q_vocab, BLOCK
            )
            mass = a * rest / t
            below = mass + 1.0 - a
            a = tl.where(below > 0.0, mass / tl.where(below > 0.0, below, 1.0), 1.0)
            c = tl.where(rest > 0.0, less, c)
            t = tl.where(rest > 0.0, rest, t)
            z = draft_sum
        # One thread stores a scalar, all of them load it.
        tl.debug_barrier()
    while row > root:
        above = tl.load(tree + PARENTS * tree_stride + row)
        tl.store(out + above, tl.load(tree + TOKENS * tree_stride + row))
        row = above
