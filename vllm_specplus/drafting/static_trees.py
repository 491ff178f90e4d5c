"""Static trees: which child of which node there is was fixed before anything is drawn (EAGLE, arXiv
2401.15077; LANTERN++, arXiv 2502.06352).

A tree is the number of children of every node, level by level, from the root on; nodes of a level
are in the order of their parents, siblings in the order of their draws. The trees and their names
are those that EAGLE's and LANTERN's code choose from (``choices.py``).
"""

from __future__ import annotations

import torch

from vllm_specplus.drafting.shapes import Level, Shape, draw

Tree = tuple[tuple[int, ...], ...]

#: 25 and 57 nodes.
TREES: dict[str, Tree] = {
    "mc_sim_7b_63": (
        (4,),
        (3, 2, 2, 1),
        (3, 2, 2, 1, 0, 0, 0, 0),
        (3, 0, 0, 0, 0, 0, 0, 0),
        (2, 0, 0),
    ),
    "naive_extend_57": (
        (5,),
        (4, 3, 3, 2, 1),
        (4, 3, 3, 2, 2, 1, 0, 1, 0, 0, 0, 0, 0),
        (4, 3, 2, 1, 2, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0),
        (3, 2, 0, 0, 2, 1, 0, 1, 0, 0, 0, 0, 0, 0),
    ),
}


def levels(tree: Tree) -> tuple[int, ...]:
    """Nodes of each level."""
    return tuple(map(sum, tree))


class StaticTree(Shape):
    """The children of a node are drawn from ``q`` without replacement, as many as the tree has
    there; greedy requests get the most probable."""

    def __init__(self, tree: Tree, greedy: torch.Tensor):
        """``tree`` may be the first levels of one."""
        super().__init__(levels(tree), greedy)
        self._left = list(tree)

    def noise_size(self, nodes):
        return nodes * max(self._left[0])

    def expand(self, q, noise):
        counts = self._left.pop(0)
        most = max(counts)
        tokens, _ = draw(q, noise.view(*q.shape[:2], most))
        best = q.topk(most, -1).indices
        tokens = torch.where(self.greedy[:, None, None], best, tokens)
        places = [(parent, child) for parent, count in enumerate(counts) for child in range(count)]
        parents, children = torch.tensor(places, device=q.device).unbind(1)
        return Level(tokens[:, parents, children], parents.expand(q.shape[0], -1))
