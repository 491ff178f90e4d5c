"""Suffix decoding: what is drafted, who sees whose text, and what is kept."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from vllm_specplus.proposer import Services
from vllm_specplus.proposers.suffix_tree import MOST_READ, TAIL, SuffixTree, SuffixTreeConfig
from vllm_specplus.step import bare_step

A, B, C, D = 1, 2, 3, 4


def proposer(**keys) -> SuffixTree:
    return SuffixTree(SuffixTreeConfig(**keys), Services(1000))


def draft(tree: SuffixTree, texts: dict, prompt=0, salts=None, nodes=16, chain=False, ends=None):
    """{name: text} as one step; {name: [paths]} of the drafts."""
    longest = max(map(len, texts.values())) + 1
    ids = np.zeros((len(texts), longest), np.int32)
    for r, text in enumerate(texts.values()):
        ids[r, : len(text)] = text
    step = replace(
        bare_step(tree.sources, ids, nodes),
        request_ids=list(texts),
        num_tokens=np.array([len(t) for t in texts.values()], np.int32),
        chain_only=np.full(len(texts), chain),
        num_prompt_tokens=np.full(len(texts), prompt, np.int32),
        cache_salts=[(salts or {}).get(name, "") for name in texts],
        ends=None if ends is None else [np.array(ends, np.int32) for _ in texts],
    )
    batch = tree.propose(step)
    out, start = {}, 0
    for name, count in zip(texts, batch.counts.tolist(), strict=True):
        paths = []
        for i in range(start, start + count):
            parent = int(batch.parents[i])
            paths.append((*(paths[parent] if parent >= 0 else ()), int(batch.tokens[i])))
        out[name] = paths
        start += count
    return out


def test_a_text_that_repeats_itself_is_continued():
    paths = draft(proposer(), {"r": [A, B, C, A, B, C, A, B]})["r"]
    assert {(C,), (C, A), (C, A, B)} <= set(paths)


def test_it_drafts_trees():
    text = [A, B, C, 7, A, B, D, 8, A, B, C, 9, A, B]
    paths = draft(proposer(), {"r": text})["r"]
    assert {(C,), (D,), (D, 8)} <= set(paths)
    chain = draft(proposer(), {"r": text}, chain=True)["r"]
    assert [len(p) for p in chain] == list(range(1, len(chain) + 1))
    assert chain[0] == (C,)


#: The paper's and the library's defaults.
PAPERS = {"max_spec_factor": 1.0, "max_spec_offset": 0.0, "min_token_prob": 0.1}


def test_a_draft_is_as_long_as_its_match_allows():
    text = [7, A, B, C, D, 8, 9, 10, 11, A, B]
    for factor, offset, longest in ((1.0, 0.0, 2), (2.0, 0.0, 4), (0.0, 3.0, 3), (2.0, 2.0, 6)):
        tree = proposer(max_spec_factor=factor, max_spec_offset=offset)
        assert max(map(len, draft(tree, {"r": text})["r"])) == longest


@pytest.mark.parametrize(("least", "drafted"), [(0.7, []), (0.5, [(C,)]), (0.1, [(C,), (D,)])])
def test_improbable_nodes_are_not_drafted(least, drafted):
    """After A B came C twice and D once."""
    tree = proposer(max_spec_factor=0.0, max_spec_offset=2.0, min_token_prob=least)
    found = draft(tree, {"r": [A, B, C, A, B, D, A, B, C, 9, A, B]})["r"]
    assert [path for path in found if len(path) == 1] == drafted


def test_of_two_trees_the_paper_drafts_from_the_one_that_scores_higher():
    """The library's own choice, of the same trees; fused, both are drafted from."""
    from arctic_inference.suffix_decoding import SuffixDecodingCache

    theirs = SuffixDecodingCache(max_tree_depth=24)
    ours, fused = proposer(**PAPERS, combine="higher_score"), proposer(**PAPERS)
    said = [A, B, C, D, 20, A, B, C, D, 21]
    theirs.start_request("old", np.array([9], np.int32))
    theirs.add_active_response("old", said)
    theirs.stop_request("old")
    for tree in (ours, fused):
        draft(tree, {"old": [9, *said]}, prompt=1)
        tree.forget("old")
    both = 0
    asked = [8, A, B, 30, A, B], [8, A, B, C, 31, A, B, C, 31, A, B, C], [8, C, D]
    for number, text in enumerate(asked):
        name = f"r{number}"
        theirs.start_request(name, np.array(text, np.int32))
        expected = theirs.speculate(name, text, max_spec_tokens=16, use_tree_spec=True)
        paths: list[tuple[int, ...]] = []
        for token, parent in zip(expected.token_ids, expected.parents, strict=True):
            paths.append((*(paths[parent] if parent >= 0 else ()), token))
        theirs.stop_request(name)
        mine = draft(ours, {name: text}, prompt=len(text) - 1)[name]
        assert set(mine) == set(paths), text
        both += set(draft(fused, {name: text}, prompt=len(text) - 1)[name]) > set(paths)
    assert both


@pytest.mark.parametrize("nodes", [0, 1, 3])
def test_the_budget_is_kept(nodes):
    assert len(draft(proposer(), {"r": [A, B, C, A, B, D, A, B]}, nodes=nodes)["r"]) == nodes


def test_short_texts_and_prompts_still_being_read():
    tree = proposer()
    assert draft(tree, {"r": [A]}) == {"r": []}
    assert draft(tree, {"q": [A, B, A, B]}, prompt=9) == {"q": []}
    assert tree.stored_tokens == 1


def test_responses_serve_later_requests_and_prompts_do_not():
    tree = proposer()
    draft(tree, {"first": [90, 91, A, B, C, D]}, prompt=2)
    tree.forget("first")
    assert (C, D) in draft(tree, {"second": [70, A, B]}, prompt=1)["second"]
    assert draft(tree, {"third": [71, 90]}, prompt=1)["third"] == []  # 90 91 was a prompt


def test_salts_do_not_see_each_other():
    """Neither finished nor running requests of another salt shape a draft."""
    tree = proposer()
    salts = {"mine": "one", "theirs": "two", "later": "two", "ours": "one"}
    draft(tree, {"mine": [9, A, B, C, D]}, prompt=1, salts=salts)
    assert draft(tree, {"theirs": [8, A, B]}, prompt=1, salts=salts)["theirs"] == []
    tree.forget("mine")
    assert draft(tree, {"later": [7, A, B]}, prompt=1, salts=salts)["later"] == []
    assert (C, D) in draft(tree, {"ours": [6, A, B]}, prompt=1, salts=salts)["ours"]


def test_text_is_inserted_once_as_it_grows():
    """Also after steps in which the request was not there (preemption)."""
    grown, whole = proposer(), proposer()
    text = [9, A, B, C, A, B, D, A, C, B, A, B]
    for n in (3, 4, 7, 7, 12):
        drafted = draft(grown, {"r": text[:n]}, prompt=1)
    assert drafted == draft(whole, {"r": text}, prompt=1)
    assert grown.stored_tokens == whole.stored_tokens == 11


def test_the_oldest_responses_go_when_memory_is_short():
    rng = np.random.default_rng(0)
    tree = proposer(max_memory_mb=1)
    texts = {f"r{i}": [0, *rng.integers(5, 900, 400).tolist()] for i in range(40)}
    for i, (name, text) in enumerate(texts.items()):
        draft(tree, {name: text}, prompt=1, salts={name: f"salt {i % 3}"})
        tree.forget(name)
    size = sum(shared.tree.estimate_memory() for shared in tree._shared.values())
    assert 0.5e6 < size < 1.3e6
    newest = texts["r39"]
    salts = {"new": "salt 0", "old": "salt 0"}
    assert draft(tree, {"new": [1, *newest[100:110]]}, prompt=1, salts=salts)["new"]
    assert not draft(tree, {"old": [1, *texts["r0"][100:110]]}, prompt=1, salts=salts)["old"]
    stored = tree.stored_tokens
    for name in ("new", "old"):
        tree.forget(name)
    assert sum(size for _, size in tree._finished.values()) == tree.stored_tokens == stored


def test_two_instances_draft_the_same():
    rng = np.random.default_rng(2)
    text = rng.integers(0, 6, 200).tolist()
    assert draft(proposer(), {"r": text}) == draft(proposer(), {"r": text})


def test_what_is_behind_the_end_is_not_stored():
    tree, end = proposer(), 99
    draft(tree, {"r": [A, B, C, end, D, 8]}, prompt=1, ends=[end])
    assert tree.stored_tokens == 3
    tree.forget("r")
    paths = draft(tree, {"s": [1, 2, B, C]}, prompt=2)["s"]
    assert (end,) in paths
    assert not any(D in path for path in paths)


@pytest.mark.slow
@pytest.mark.parametrize("before", [0, 40])
def test_responses_of_20_000_salts_stay_below_the_bound(before):
    """Also where long ones of one salt were there ``before``, whose tokens take less each."""
    tree = proposer(max_memory_mb=1)
    rng = np.random.default_rng(0)
    for i in range(before):
        draft(tree, {f"b{i}": [1, *[5, 6, 7] * 100]}, prompt=1, nodes=1)
        tree.forget(f"b{i}")
    for i in range(20_000 if not before else 2_000):
        text = [1, *rng.integers(0, 1000, 8).tolist()]
        draft(tree, {f"r{i}": text}, prompt=1, salts={f"r{i}": f"salt {i}"}, nodes=1)
        tree.forget(f"r{i}")
    size = sum(shared.tree.estimate_memory() for shared in tree._shared.values())
    assert 0 < size < 1.2e6
    assert tree.stored_tokens == sum(shared.tokens for shared in tree._shared.values())


def test_long_prompts_stay_below_the_bound_and_hold_up_no_step():
    """Eight of 40,000 tokens at a limit of 8 MB; those that there is room for are continued."""
    tree, rng = proposer(max_memory_mb=8), np.random.default_rng(0)
    texts = {f"r{i}": rng.integers(1, 900, 40_000).tolist() for i in range(8)}
    for text in texts.values():
        text[-3:] = text[1000:1003]
    known = 0
    for _ in range(12):
        drafted = draft(tree, texts, prompt=39_999)
        now = sum(request.known for request in tree._requests.values())
        assert now - known <= 8 * MOST_READ
        known = now
    size = sum(request.local.estimate_memory() for request in tree._requests.values())
    assert 2e6 < size < 4.4e6
    assert tuple(texts["r0"][1003:1005]) in drafted["r0"]
    for name in texts:
        tree.forget(name)
    assert tree._own == 0


def test_a_prompt_is_read_to_its_end():
    tree, rng = proposer(), np.random.default_rng(0)
    text = rng.integers(1, 900, 10_000).tolist()
    text[-3:] = text[9000:9003]
    for _ in range(3):
        drafted = draft(tree, {"r": text}, prompt=9_999)["r"]
    assert tuple(text[9003:9005]) in drafted
    assert tree._requests["r"].known == len(text)


def test_responses_that_nobody_drafts_for_are_stored_too():
    """In parts while they are said, and to their end when they are over."""
    tree, text = proposer(), [9, *range(10, 60)]
    for n in range(2, len(text) + 1):
        draft(tree, {"r": text[:n]}, prompt=1, nodes=0)
    assert tree.stored_tokens == 50 // TAIL * TAIL < 50
    tree.forget("r")
    assert tree.stored_tokens == 50
    assert (59,) in draft(tree, {"s": [1, 57, 58]}, prompt=1)["s"]


def test_another_turn_of_a_session_stores_no_prompt():
    tree = proposer()
    first = [9, A, B, C]
    draft(tree, {"r": first}, prompt=1, nodes=0)
    second = [*first, 50, 51, D, 7]  # 50 and 51 were asked
    draft(tree, {"r": second}, prompt=6)
    assert tree.stored_tokens == 5
    tree.forget("r")
    assert not draft(tree, {"s": [1, 2, 50]}, prompt=1)["s"]


def test_nothing_behind_an_end_is_stored_where_a_part_ends_with_it():
    """An accepted draft goes on behind the end, which is the last token of what is stored at once;
    the session's next turn is stored again."""
    tree, end = proposer(), 99
    text = [9, *range(10, 9 + TAIL), end, 70, 71]
    draft(tree, {"r": text}, prompt=1, nodes=0, ends=[end])
    assert tree.stored_tokens == TAIL
    draft(tree, {"r": [*text, 50, A, B, C]}, prompt=len(text) + 1, ends=[end])
    assert tree.stored_tokens == TAIL + 3
    tree.forget("r")
    assert tree.stored_tokens == TAIL + 3
    assert not draft(tree, {"s": [1, 2, 70]}, prompt=1, ends=[end])["s"]
