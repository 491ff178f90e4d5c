"""What a step is, computed from a frozen view of a batch: no engine, no vLLM."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest

from vllm_specplus.engine.batch import (
    BatchView,
    accepted_rows,
    cache_slots,
    describe,
    draft_room,
    kept_rows,
    logits_rows,
    position_shifts,
    prompt_chunks,
    text_before,
    tree_batch,
)
from vllm_specplus.step import Acceptance
from vllm_specplus.tree import DraftTokens


def i32(*values) -> np.ndarray:
    return np.array(values, np.int32)


def make_step(serves_chains: bool = False, scheduled=(3, 1, 4, 2)):
    """Four requests: a tree of two siblings below the root, a plain decode, a chunk of a prompt,
    a chain of one node."""
    texts = np.arange(400, dtype=np.int32).reshape(4, 100)
    drafts = [DraftTokens([50, 60], i32(-1, -1)), (), (), [70]]
    num_scheduled, num_computed = i32(*scheduled), i32(10, 20, 0, 30)
    inputs = []
    for text, begin, count, draft in zip(texts, num_computed, num_scheduled, drafts, strict=True):
        inputs += [*text[begin : begin + count - len(draft)].tolist(), *draft]
    view = BatchView(["a", "b", "c", "d"], drafts, num_scheduled, num_computed, texts, i32(*inputs))
    counts = np.array([len(each) for each in drafts])
    return describe(view, logits_rows(counts, np.cumsum(num_scheduled)), serves_chains)


def test_rows_of_trees_chains_decodes_and_prompts():
    step = make_step()
    assert step.batch_rows.tolist() == [0, 1, 2, 3, 7, 8, 9]
    assert step.rows.tokens.tolist() == [10, 50, 60, 120, 203, 330, 70]
    assert step.rows.parents.tolist() == [-1, 0, 0, -1, -1, -1, 0]
    assert step.rows.starts.tolist() == [0, 3, 4, 5, 7]
    assert step.rows.depths.tolist() == [0, 1, 1, 0, 0, 0, 1]
    assert step.previous.tolist() == [9, 10, 10, 119, 202, 329, 330]
    assert position_shifts(step.rows).tolist() == [0, 0, -1, 0, 0, 0, 0]
    shape = step.shape
    assert (shape.requests, shape.rows, shape.context, shape.prompt_rows) == (4, 7, 70, 3)


def test_only_trees_need_our_attention_unless_it_is_faster():
    assert make_step().tree_attention.tolist() == [True, False, False, False]
    assert make_step(serves_chains=True).tree_attention.tolist() == [True, True, False, True]


def test_a_tree_behind_rows_that_are_read_again_is_a_chain():
    step = make_step(scheduled=(5, 1, 4, 2))
    assert step.resumed == 1
    assert step.rows.parents[:3].tolist() == [-1, 0, 1]
    assert not step.tree_attention.any()


def test_the_trees_of_a_batch_alone():
    step = make_step(serves_chains=True)
    trees = tree_batch(step)
    assert trees.requests.tolist() == [0, 1, 3]
    assert trees.rows.tolist() == [0, 1, 2, 3, 8, 9]
    assert trees.query_start_loc.tolist() == [0, 3, 4, 6]
    assert trees.context_lens.tolist() == [10, 20, 30]
    assert trees.max_rows == 3
    assert trees.ancestors()[:3].tolist() == [
        [True, False, False],
        [True, True, False],
        [True, False, True],
    ]


def test_what_is_kept_of_a_step():
    """The second sibling is accepted, of the prompt everything is read, the chain is rejected."""
    step = make_step()
    path = i32([0, 2], [0, -1], [0, -1], [0, -1])
    step.acceptance = Acceptance(path, i32(2, 1, 1, 1), path)
    assert accepted_rows(step).tolist() == [True, False, True, True, True, True, False]
    rows, positions, starts = kept_rows(step)
    assert rows.tolist() == [0, 2, 3, 4, 5, 6, 7, 8]
    assert positions.tolist() == [10, 11, 20, 0, 1, 2, 3, 30]
    assert starts.tolist() == [0, 2, 3, 7, 8]


def test_cache_slots_follow_the_pages():
    pages = i32([7, 3, 0], [5, 0, 0])
    slots = cache_slots(pages, 16, np.array([0, 0, 1]), np.array([15, 16, 2]))
    assert slots.tolist() == [7 * 16 + 15, 3 * 16, 5 * 16 + 2]


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_prompts_are_shown_in_chunks(size):
    """All rows of the prompt but the verified one, each once and in order."""
    step = make_step()
    seen = []
    for request, begin, count, row in prompt_chunks(step, size):
        assert count <= size
        seen += [(request, begin + i, row + i) for i in range(count)]
    assert seen == [(2, 0, 4), (2, 1, 5), (2, 2, 6)]


def test_the_token_before_each_of_a_text():
    text = i32(5, 6, 7, 8)
    assert text_before(text, 0, 3).tolist() == [-1, 5, 6]
    assert text_before(text, 2, 2).tolist() == [6, 7]


def test_room_for_drafts():
    """By its own limit, by the context window, none where nothing is output."""
    room = draft_room(i32(10, 95, 99, 10), i32(8, 8, 8, 8), np.array([1, 1, 1, 0], bool), 100)
    assert room.tolist() == [8, 4, 0, 0]


def test_a_step_without_drafts_is_described_as_any_other():
    """One request reads the rest of its prompt, one the first token of a text."""
    token_ids = np.arange(40, dtype=np.int32).reshape(4, 10)
    computed, scheduled = np.array([4, 2, 0, 7], np.int32), np.array([1, 3, 1, 1], np.int32)
    input_ids = np.concatenate(
        [token_ids[r, n : n + m] for r, (n, m) in enumerate(zip(computed, scheduled, strict=True))]
    )
    view = BatchView(list("abcd"), [()] * 4, scheduled, computed, token_ids, input_ids)
    rows = logits_rows(np.zeros(4, np.int64), np.cumsum(scheduled))
    quick = describe(view, rows, serves_chains=True)
    assert quick.previous.tolist() == [3, 13, -1, 36]
    assert not quick.drafted

    class Drafts(tuple):
        """Empty, but not known to be."""

        __slots__ = ()

        def __bool__(self):
            return True

    view = replace(view, drafts=[Drafts()] * 4)
    full = describe(view, rows, serves_chains=True)
    for each in fields(quick):
        values = [getattr(quick, each.name), getattr(full, each.name)]
        if each.name == "rows":
            values = [[getattr(x, f.name) for f in fields(x)] for x in values]
        np.testing.assert_equal(*values)
        for a, b in zip(*(x if isinstance(x, list) else [x] for x in values), strict=True):
            if isinstance(a, np.ndarray):
                assert a.dtype == b.dtype
