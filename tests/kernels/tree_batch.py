"""Random batches of draft trees over a paged KV cache, for the tests of tree attention."""

from dataclasses import dataclass

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

CHAIN = [-1, 0, 1, 2, 3, 4]
STAR = [-1, 0, 0, 0, 0]
ROOT = [-1]


def random_tree(size: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    parents = [int(torch.randint(i, (), generator=generator)) for i in range(1, size)]
    return [-1, *parents]


@dataclass
class Batch:
    """Trees given by their parents, the lengths of their contexts, and a cache filled at random.

    ``arguments`` are those of the functions in ``vllm_specplus.kernels.tree_attention``;
    ``layout`` is the physical order of the cache.
    """

    trees: list[list[int]]
    contexts: list[int]
    block_size: int = 16
    num_kv_heads: int = 2
    group: int = 1
    head_size: int = 64
    dtype: torch.dtype = torch.float32
    layout: str = "NHD"

    def __post_init__(self):
        generator = torch.Generator().manual_seed(0)

        def randn(*shape):
            return torch.randn(*shape, generator=generator).to(DEVICE, self.dtype)

        sizes = [len(tree) for tree in self.trees]
        self.max_rows = max(sizes)
        blocks = [-(-(c + n) // self.block_size) for c, n in zip(self.contexts, sizes, strict=True)]
        # More blocks than needed, in random order, and NaN in every slot not written: reading a
        # wrong slot or multiplying a masked one by 0 shows.
        num_blocks = sum(blocks) + 3
        shape = (num_blocks, self.num_kv_heads, self.block_size, 2 * self.head_size)
        if self.layout == "NHD":
            b, h, n, d = shape
            self.kv_cache = torch.full((b, n, h, d), torch.nan).transpose(1, 2)
        else:
            self.kv_cache = torch.full(shape, torch.nan)
        self.kv_cache = self.kv_cache.to(DEVICE, self.dtype)
        key_cache, value_cache = self.kv_cache.transpose(1, 2).split(self.head_size, dim=-1)

        permutation = torch.randperm(num_blocks, generator=generator).to(DEVICE, torch.int32)
        block_table = torch.zeros(len(sizes), max(blocks) + 1, dtype=torch.int32, device=DEVICE)
        for request, ids in enumerate(permutation[: sum(blocks)].split(blocks)):
            block_table[request, : len(ids)] = ids
            positions = torch.arange(self.contexts[request] + sizes[request], device=DEVICE)
            slots = (
                block_table[request, positions // self.block_size].long(),
                positions % self.block_size,
            )
            for cache in (key_cache, value_cache):
                cache[slots] = randn(len(positions), self.num_kv_heads, self.head_size)

        ancestors = torch.zeros(sum(sizes), self.max_rows, dtype=torch.bool, device=DEVICE)
        starts = torch.tensor([0, *sizes]).cumsum(0).int().to(DEVICE)
        for start, parents in zip(starts.tolist(), self.trees, strict=False):
            for row, parent in enumerate(parents):
                if parent >= 0:
                    ancestors[start + row] = ancestors[start + parent]
                ancestors[start + row, row] = True

        self.scale = self.head_size**-0.5
        self.arguments = (
            randn(sum(sizes), self.num_kv_heads * self.group, self.head_size),
            key_cache,
            value_cache,
            starts,
            torch.tensor(self.contexts, dtype=torch.int32, device=DEVICE),
            block_table,
            ancestors,
            self.scale,
        )
