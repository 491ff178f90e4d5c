"""Attention over pages, against a gather of all pages under a dense mask; and that nothing which is
made for a pass grows with the texts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.drafting.test_drafting import VOCAB, save_draft
from vllm_specplus.drafting import executor as executor_module
from vllm_specplus.drafting.cache import PAGE, PageStore
from vllm_specplus.drafting.executor import PROMPT_CHUNK, DraftExecutor, pieces
from vllm_specplus.drafting.growth import Growth
from vllm_specplus.drafting.model import DraftModel
from vllm_specplus.drafting.passes import PagedAttention, Rows

HEADS, KV_HEADS, SIZE = 6, 2, 20
CPU = torch.device("cpu")
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


class GatheredAttention:
    """The reference: all pages of every request are gathered, and its KV heads repeated."""

    def __init__(self, store: PageStore, rows: Rows, readable: torch.Tensor | None = None):
        self._store, self._rows, self._readable = store, rows, readable

    def related(self, request: int, row: int) -> list[int]:
        """Which of its request's nodes a row sees."""
        rows = self._rows
        first, end = rows.key_starts[request : request + 2].tolist()
        if rows.related.dim() == 2:
            return rows.related[row].nonzero().flatten().tolist()
        node = end - first - int(rows.starts[request + 1]) + row
        seen = []
        while node >= 0:
            seen.append(node)
            node = int(rows.related[first + node])
        return seen

    def __call__(self, layer, query, keys, values, scale, window=0, soft_cap=0.0):
        store, rows, page = self._store, self._rows, self._store.page
        store.write(layer, rows.slots, keys, values)
        output = torch.full_like(query, torch.nan)
        for r in range(len(rows.contexts)):
            context, end = int(rows.contexts[r]), int(rows.ends[r])
            first_node = int(rows.key_starts[r])
            place = torch.arange(rows.table.shape[1] * page)
            slots = rows.table[r, place // page].long() * page + place % page
            all_keys, all_values = (
                each.repeat_interleave(query.shape[1] // each.shape[1], 1).double()
                for each in store.read(layer, slots)
            )
            for row in range(int(rows.starts[r]), int(rows.starts[r + 1])):
                own = int(rows.positions[row])
                seen = {p: p for p in range(end)}
                if self._readable is not None:
                    seen = {p: p for p in seen if self._readable.view(-1)[slots[p]]}
                for node in self.related(r, row):
                    seen[context + node] = end + int(rows.depths[first_node + node])
                near = [slot for slot, at in seen.items() if not window or own - at < window]
                scores = torch.einsum("hd,shd->hs", query[row].double(), all_keys[near]) * scale
                if soft_cap:
                    scores = soft_cap * (scores / soft_cap).tanh()
                out = torch.einsum("hs,shd->hd", scores.softmax(-1), all_values[near])
                output[row] = out.to(output.dtype)
        return output


def level(store: PageStore, lengths: list[int], levels: list[int], gap: int, rng) -> Rows:
    """The last of some levels of random trees, behind texts of ``lengths``; ``gap``: slots that
    hold nothing in between."""
    requests, nodes, width = len(lengths), sum(levels), levels[-1]
    pages = -(-(max(lengths) + gap + nodes) // store.page)
    table = 1 + rng.permutation(store.pages - 1)[: requests * pages].reshape(requests, pages)
    begins = np.concatenate(([0], np.cumsum(levels)))
    parents = np.concatenate(
        [
            np.full((requests, n), -1)
            if i == 0
            else rng.integers(begins[i - 1], begins[i], (requests, n))
            for i, n in enumerate(levels)
        ],
        1,
    )
    depths = np.repeat(np.arange(len(levels)), levels)[None].repeat(requests, 0)
    contexts = np.array(lengths) + gap
    at = contexts[:, None] + np.arange(nodes - width, nodes)
    slots = np.take_along_axis(table, at // store.page, 1) * store.page + at % store.page
    related = parents
    if not store.packed:
        related = np.zeros((requests, nodes, nodes), bool)
        for r in range(requests):
            for i in range(nodes):
                if parents[r, i] >= 0:
                    related[r, i] = related[r, parents[r, i]]
                related[r, i, i] = True
        related = related[:, -width:].reshape(-1, nodes)
    each = np.arange(requests + 1)
    positions = np.array(lengths)[:, None] + depths[:, -width:]
    numbers = (each * width, contexts, np.array(lengths), table, each * nodes, depths.flatten())
    return Rows(
        *(torch.from_numpy(x.flatten().astype(np.int64)) for x in (positions, slots)),
        *(torch.from_numpy(np.ascontiguousarray(x.astype(np.int32))) for x in numbers),
        torch.from_numpy(related.astype(np.int32).flatten() if store.packed else related),
        width, int(contexts.max()),
    )  # fmt: skip


def store_of(page: int, dtype: torch.dtype, rng, pages: int = 60) -> PageStore:
    """Pages with something in every slot."""
    store = PageStore([0], KV_HEADS, SIZE, pages, page, dtype, CPU)
    new = torch.from_numpy(rng.normal(size=(2, pages * page, KV_HEADS, SIZE))).to(dtype)
    store.write(0, torch.arange(pages * page), *new)
    return store


FEATURES = {
    "plain": {}, "window": {"window": 7}, "long window": {"window": 30}, "cap": {"soft_cap": 1.5},
    "unread": {"readable": 0.8}, "all": {"window": 30, "soft_cap": 1.5, "readable": 0.7},
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("page", [16, 8], ids=["packed", "apart"])
@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
def test_attention_is_that_over_gathered_pages(features, page, dtype):
    rng = np.random.default_rng(0)
    features = dict(features)
    share = features.pop("readable", None)
    for case in (*([3], [2, 5], [1, 2, 4, 3]), "text"):
        store = store_of(page, dtype, rng)
        assert store.packed == (page == 16)
        if case == "text":  # the middle of one text, another whole, the last token of a third
            table = 1 + rng.permutation(store.pages - 1)[:18].reshape(3, 6).astype(np.int32)
            rows = Rows.of_text(store, table, [(20, 45), (0, 9), (40, 41)])
        else:
            rows = level(store, [1, 23, 40, 64], case, gap=len(case) - 1, rng=rng)
        readable = None
        if share:
            readable = torch.from_numpy(rng.random((store.pages, page)) < share)
        count = len(rows.positions)
        query, keys, values = (
            torch.from_numpy(rng.normal(size=(count, heads, SIZE))).to(dtype)
            for heads in (HEADS, KV_HEADS, KV_HEADS)
        )
        out, expected = (
            kind(store, rows, readable)(0, query, keys, values, 0.3, **features)
            for kind in (PagedAttention, GatheredAttention)
        )
        tolerance = CLOSE if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
        torch.testing.assert_close(out, expected, **tolerance)
    if features:  # the control: the comparison notices what is left out
        plain = GatheredAttention(store, rows, readable)(0, query, keys, values, 0.3)
        assert not torch.allclose(plain, expected, atol=2e-2, rtol=2e-2)


def test_another_type_is_an_error():
    rng = np.random.default_rng(0)
    store = store_of(16, torch.bfloat16, rng)
    rows = Rows.of_text(store, np.ones((1, 1), np.int32), [(0, 2)])
    with pytest.raises(TypeError, match=r"cache is of torch.bfloat16, not torch.float32"):
        PagedAttention(store, rows)(
            0, torch.ones(2, HEADS, SIZE), *torch.ones(2, 2, KV_HEADS, SIZE), 1
        )


def test_what_is_written_is_read():
    rng = np.random.default_rng(1)
    for page in (16, 8):
        store = store_of(page, torch.float32, rng)
        slots = torch.from_numpy(rng.permutation(store.pages * page)[:30])
        both = torch.from_numpy(rng.normal(size=(2, 30, KV_HEADS, SIZE))).float()
        store.write(0, slots, *both)
        assert all(torch.equal(a, b) for a, b in zip(store.read(0, slots), both, strict=True))


@pytest.fixture(scope="module")
def draft(tmp_path_factory) -> str:
    return save_draft(tmp_path_factory.mktemp("draft"), context=4096)


def rounds(folder: str) -> list[torch.Tensor]:
    """Logits of rounds with prompts longer than a pass, texts cut short, and trees some of which
    end early."""
    run = DraftExecutor(DraftModel(folder, CPU, torch.float32), 4000, 12)
    rng = np.random.default_rng(3)
    texts = [rng.integers(0, VOCAB, n).astype(np.int32) for n in (1, PROMPT_CHUNK + 40, 17, 33)]
    out = []
    for number in range(3):
        names = [f"r{i}" for i in range(len(texts))]
        assert all(run.room(name, len(text)) for name, text in zip(names, texts, strict=True))
        out.append(run.begin(names, texts, [number // 2] * len(texts)))
        active, above = torch.arange(4), [-1]
        for depth, width in enumerate((2, 3, 3)):
            if depth == 1:
                active = torch.tensor([1, 3])
            tokens = torch.from_numpy(rng.integers(0, VOCAB, (len(active), width)))
            parents = torch.from_numpy(rng.choice(above, (len(active), width)))
            out.append(run.grow(active, tokens, parents))
            first = (0, 2, 5)[depth]
            above = list(range(first, first + width))
        # Drafts are rejected: other tokens follow; one text goes back to its beginning.
        texts = [
            np.append(text[:9] if number == 1 and r == 2 else text, rng.integers(0, VOCAB, 2 + r))
            for r, text in enumerate(texts)
        ]
        texts = [text.astype(np.int32) for text in texts]
    return out


@pytest.mark.slow
def test_rounds_equal_those_over_gathered_pages(draft, monkeypatch):
    paged = rounds(draft)
    monkeypatch.setattr(executor_module, "PagedAttention", GatheredAttention)
    for mine, expected in zip(paged, rounds(draft), strict=True):
        torch.testing.assert_close(mine, expected, **CLOSE)


def test_passes_are_filled():
    known, lengths = [0, 5, 10], [PROMPT_CHUNK + 10, 20, 2 * PROMPT_CHUNK]
    divided = list(pieces(known, lengths))
    rows = [sum(end - first for _, first, end in each) for each in divided]
    assert rows[:-1] == [PROMPT_CHUNK] * (len(rows) - 1)
    assert sum(rows) == sum(lengths) - sum(known)
    for r, (first, length) in enumerate(zip(known, lengths, strict=True)):
        own = [(a, b) for each in divided for n, a, b in each if n == r]
        assert [a for a, _ in own] == [first, *(b for _, b in own[:-1])]
        assert own[-1][1] == length


class Largest(TorchDispatchMode):
    """Remembers the bytes of the largest tensor that is made."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in torch.utils._pytree.tree_leaves(out):
            if isinstance(each, torch.Tensor) and not each._is_view():
                self.bytes = max(self.bytes, each.numel() * each.element_size())
        return out


def largest_in_a_round(folder: str, length: int) -> int:
    """Bytes of the largest tensor made by a round of three tokens more and two levels."""
    run = DraftExecutor(DraftModel(folder, CPU, torch.float32), 4000, 12)
    text = np.random.default_rng(0).integers(0, VOCAB, length + 3).astype(np.int32)
    for size in (length, length + 3):
        run.room("r", size)
        with Largest() as made:
            run.begin(["r"], [text[:size]], [0])
            run.grow(torch.tensor([0]), torch.tensor([[1, 2]]), torch.tensor([[-1, -1]]))
            run.grow(torch.tensor([0]), torch.tensor([[1, 2]]), torch.tensor([[0, 1]]))
    return made.bytes


@pytest.mark.slow
def test_no_tensor_grows_with_the_text(draft, monkeypatch):
    assert largest_in_a_round(draft, 100) == largest_in_a_round(draft, 3800)
    monkeypatch.setattr(executor_module, "PagedAttention", GatheredAttention)  # the control
    assert largest_in_a_round(draft, 100) < largest_in_a_round(draft, 800) / 4


def test_growth_by_one_loop_is_that_by_tensors():
    """What is done on a CPU, and what on other devices, over levels of which some trees have no
    part."""
    rng = np.random.default_rng(4)
    stores = [PageStore([0], 1, 16, 99, PAGE, torch.float32, CPU) for _ in range(2)]
    stores[1].packed = False
    lengths = torch.tensor([5, 40, 17, 30], dtype=torch.int32)
    table = torch.from_numpy(rng.permutation(98)[:20].reshape(4, 5).astype(np.int32))
    trees = [Growth(store, 9, lengths, table, lengths + 2, 64) for store in stores]
    above = [-1]
    for active, width in (([0, 1, 2, 3], 2), ([0, 2, 3], 3), ([2, 3], 3)):
        parents = torch.from_numpy(rng.choice(above, (len(active), width)))
        above = list(range(trees[0].nodes, trees[0].nodes + width))
        one, other = (each.rows(torch.tensor(active), parents) for each in trees)
        for mine, theirs in zip(one.tensors[:-1], other.tensors[:-1], strict=True):
            assert mine.dtype == theirs.dtype
            assert torch.equal(mine, theirs)
        seen = (
            GatheredAttention(stores[0], one).related,
            GatheredAttention(stores[1], other).related,
        )
        for r in range(len(active)):
            for row in range(r * width, r * width + width):
                assert sorted(seen[0](r, row)) == sorted(seen[1](r, row))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("pieces", "pages"), [([(3, 20), (0, 5)], 2), ([(0, 5), (2, 3)], 1), ([(0, 5)], 1)]
)
def test_rows_travel_as_sizes_and_bytes(packed, pieces, pages):
    store = PageStore([0], 1, 32, 9, PAGE, torch.float32, torch.device("cpu"))
    store.packed = packed
    # Of pages of all requests those of the first, as far as they are read: of any stride.
    table = np.arange(1, 13, dtype=np.int32).reshape(3, 4).T[: len(pieces), :pages]
    rows = Rows.of_text(store, table, pieces)
    sizes, raw = rows.packed()
    assert len(sizes) == Rows.SIZES
    again = Rows.received(sizes, store.device, lambda room: room.copy_(raw))
    assert (again.most_rows, again.reach) == (rows.most_rows, rows.reach)
    assert rows.reach == max(end for _, end in pieces)
    for mine, theirs in zip(again.tensors, rows.tensors, strict=True):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)
