"""Static trees: the published ones, what their levels hold, and that their drafts cost no law."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.eagle_heads import save_head
from vllm_specplus.config import parse
from vllm_specplus.drafting.static_trees import TREES, StaticTree, levels
from vllm_specplus.samplers.sampled import Traversal, WithoutReplacement
from vllm_specplus.step import DraftProbs, Rows


def paths(tree) -> list[list[tuple[int, ...]]]:
    """Of every level, by ranks, as the papers' code lists them."""
    found, above = [], [()]
    for counts in tree:
        above = [(*path, i) for path, n in zip(above, counts, strict=True) for i in range(n)]
        found.append(above)
    return found


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("mc_sim_7b_63", (4, 8, 8, 3, 2)), ("naive_extend_57", (5, 13, 16, 14, 9))],
)
def test_the_published_trees(name, sizes):
    """Sizes by LANTERN's card; and a better-ranked sibling has no less below it."""
    tree = TREES[name]
    assert levels(tree) == sizes
    nodes = {path for level in paths(tree) for path in level}
    assert len(nodes) == sum(sizes)
    for path in nodes:
        for place, rank in enumerate(path):
            if rank:
                assert (*path[:place], rank - 1, *path[place + 1 :]) in nodes


def test_a_level_holds_what_the_tree_says():
    rng = np.random.default_rng(0)
    tree = TREES["mc_sim_7b_63"]
    shape = StaticTree(tree, torch.tensor([True, False]))
    for counts in tree:
        q = torch.from_numpy(rng.dirichlet(np.ones(30), (2, len(counts))).astype(np.float32))
        noise = torch.from_numpy(rng.random((2, shape.noise_size(len(counts)))))
        level = shape.expand(q, noise)
        assert level.parents[1].tolist() == [i for i, n in enumerate(counts) for _ in range(n)]
        assert level.tokens.shape == level.parents.shape == (2, sum(counts))
        first = 0
        for node, count in enumerate(counts):
            here = slice(first, first + count)
            best = q[0, node].topk(max(count, 1)).indices[:count]
            assert level.tokens[0, here].tolist() == best.tolist()
            assert len(set(level.tokens[1, here].tolist())) == count
            first += count


@pytest.mark.parametrize("rule", [WithoutReplacement(), Traversal()])
def test_the_output_follows_the_target_whatever_the_draft_is(rule):
    """Two children, one below the first: 4,000 trees of a draft that is far off."""
    count, p = 4000, torch.tensor([0.5, 0.3, 0.15, 0.05])
    q = torch.tensor([0.1, 0.2, 0.3, 0.4])
    rng = np.random.default_rng(1)
    shape = StaticTree(((2,), (1, 0)), torch.zeros(count, dtype=torch.bool))
    drawn = []
    for nodes in (1, 2):
        noise = torch.from_numpy(rng.random((count, shape.noise_size(nodes))))
        drawn.append(shape.expand(q.expand(count, nodes, -1), noise).tokens)
    first, below = drawn
    tokens = torch.cat((torch.zeros(count, 1), first, below), 1).flatten().numpy()
    rows = Rows(
        tokens.astype(np.int32), np.tile(np.array([-1, 0, 0, 1], np.int32), count),
        np.arange(0, 4 * count + 1, 4, dtype=np.int32),
        np.tile(np.array([0, 1, 1, 2], np.int32), count),
    )  # fmt: skip
    draft = DraftProbs(
        q[None], np.tile(np.array([0, 0, -1, -1], np.int32), count),
        np.tile(np.array([2, 1, 0, 0], np.int32), count),
    )  # fmt: skip
    noise = torch.from_numpy(rng.random(4 * count)), torch.from_numpy(rng.random(count))
    out = rule.reference(p.repeat(4 * count, 1), rows, draft, *noise).view(count, 4)
    share = np.bincount(out[:, 0].numpy(), minlength=4) / count
    np.testing.assert_allclose(share, p, atol=4 * 0.5 / count**0.5)
    # And so does what follows the first child, where that was accepted.
    second = out[:, 1][out[:, 1] >= 0].numpy()
    share = np.bincount(second, minlength=4) / len(second)
    np.testing.assert_allclose(share, p, atol=4 * 0.5 / len(second) ** 0.5)


def test_the_shape_is_for_heads_and_knows_its_size(tmp_path):
    head = {"method": "eagle_tree", "model": save_head(tmp_path, 1, 40)}
    config = parse(head | {"shape": "static", "num_speculative_tokens": 25})
    assert config.levels() == (4, 8, 8, 3, 2)
    assert config.rule == "traversal"
    small = parse(
        head
        | {
            "shape": "static", "static_tree": "naive_extend_57", "num_speculative_tokens": 57,
            "verification": "recursive",
        }
    )  # fmt: skip
    assert sum(small.levels()) == 57
    assert small.shape_arguments(2) == (TREES["naive_extend_57"][:2],)
    with pytest.raises(ValueError, match=r"'static_tree' 'mc_sim_7b_63' makes 25 nodes"):
        parse(head | {"shape": "static"})
    with pytest.raises(ValueError, match="shape 'topk' has no 'static_tree': remove it"):
        parse(head | {"static_tree": "naive_extend_57"})
