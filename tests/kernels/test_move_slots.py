"""The kernel that moves KV slots of all layers at once, against its torch reference.

Without a GPU it runs in Triton's interpreter, and is besides compiled, not run, for GPUs.
"""

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from tests.kernels.tree_batch import DEVICE, random_tree
from vllm_specplus.kernels import move_slots as module
from vllm_specplus.kernels.move_slots import move_slots_reference, runs, strips
from vllm_specplus.tree import moves

BLOCK_SIZE = 16
PAGES = 12


def cache(heads: int, head_size: int, dtype: torch.dtype, layout: str) -> torch.Tensor:
    """One layer's cache [pages, heads, BLOCK_SIZE, 2 * head_size], every element distinct or
    random; ``layout`` is its physical order."""
    shape = (PAGES, heads, BLOCK_SIZE, 2 * head_size)
    if layout == "NHD":
        shape = (PAGES, BLOCK_SIZE, heads, 2 * head_size)
    filled = torch.randn(shape).to(DEVICE, dtype)
    return filled.transpose(1, 2) if layout == "NHD" else filled


def unlike_layers() -> list[torch.Tensor]:
    """Layers of other heads, head sizes, data types and strides."""
    whole = torch.randn(PAGES, 2, BLOCK_SIZE, 3, 2 * 24).to(DEVICE, torch.float16)
    return [
        cache(2, 64, torch.bfloat16, "HND"),
        cache(5, 64, torch.bfloat16, "NHD"),
        cache(1, 16, torch.float32, "NHD"),
        cache(3, 80, torch.float16, "HND"),
        # Two layers whose pages alternate in one allocation.
        whole[:, 0].transpose(1, 2),
        whole[:, 1].transpose(1, 2),
    ]


def accepted_path_moves(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Slots to move of three requests: two with a random tree of up to 40 rows, whose pages are
    scattered, and one whose accepted rows lie far apart."""
    rng = np.random.default_rng(seed)
    width, contexts = 40, rng.integers(0, BLOCK_SIZE, 3)
    table = rng.permutation(PAGES).reshape(3, PAGES // 3)
    path = np.full((3, width), -1, np.int32)
    for r in range(2):
        parents = random_tree(int(rng.integers(2, width)), seed * 2 + r)
        row, rows = len(parents) - 1, []
        while row >= 0:
            rows.append(row)
            row = parents[row]
        path[r, : len(rows)] = rows[::-1]
    path[2, :4] = (0, 3, 20, 39)
    request, source, destination = moves(path)

    def slots(rows):
        position = contexts[request] + rows
        return table[request, position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE

    return slots(source), slots(destination)


def move(caches: list[torch.Tensor], src: np.ndarray, dst: np.ndarray) -> None:
    table = strips(caches)
    packed = torch.from_numpy(np.concatenate((src, dst, runs(src, dst)))).to(DEVICE)
    on_device = torch.from_numpy(table).to(DEVICE)
    module.move_slots(on_device, packed, len(src), BLOCK_SIZE, module.block_words(table))


def expected(caches: list[torch.Tensor], src: np.ndarray, dst: np.ndarray) -> list[torch.Tensor]:
    copies = []
    for each in caches:
        copy = torch.empty_strided(each.shape, each.stride(), dtype=each.dtype, device=DEVICE)
        copies.append(copy.copy_(each))
        where = (torch.from_numpy(slots).to(DEVICE) for slots in (src, dst))
        move_slots_reference(copies[-1], *where)
    return copies


def same(caches: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(caches, others, strict=True))


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_reference_reads_before_it_writes(layout):
    kv_cache = cache(2, 8, torch.float32, layout)
    before = kv_cache.clone()
    # Slots move down by a varying distance, across a block boundary, into slots moved themselves.
    src = torch.tensor([16, 18, 19, 47], device=DEVICE)
    dst = torch.tensor([15, 16, 17, 18], device=DEVICE)
    move_slots_reference(kv_cache, src, dst)
    wanted = before.clone()
    for s, d in zip(src.tolist(), dst.tolist(), strict=True):
        wanted[d // 16, :, d % 16] = before[s // 16, :, s % 16]
    assert torch.equal(kv_cache, wanted)


@pytest.mark.parametrize("seed", range(6))
def test_all_layers_at_once_along_accepted_paths(seed):
    caches = unlike_layers()
    src, dst = accepted_path_moves(seed)
    wanted = expected(caches, src, dst)
    assert not same(caches, wanted)
    move(caches, src, dst)
    assert same(caches, wanted)


def test_an_overlap_longer_than_a_program_holds():
    """All slots move down by one: a single run, in several rounds."""
    caches = unlike_layers()
    dst = np.arange(3, 3 + 4 * module.ROWS + 1)
    src = dst + 1
    assert len(runs(src, dst)) == 2
    wanted = expected(caches, src, dst)
    move(caches, src, dst)
    assert same(caches, wanted)


def test_runs_part_what_does_not_touch():
    # The second move overwrites the first one's source; the third and fourth are on their own.
    src, dst = np.array([5, 9, 30, 40]), np.array([4, 5, 31, 41])
    assert runs(src, dst).tolist() == [0, 2, 3, 4]
    # The last move overwrites the first one's source: nothing in between may be parted.
    src, dst = np.array([5, 20, 9]), np.array([4, 21, 5])
    assert runs(src, dst).tolist() == [0, 3]
    assert runs(np.array([7]), np.array([7])).tolist() == [0, 1]


def test_a_source_that_was_a_destination_is_refused():
    with pytest.raises(ValueError, match="overwrites one before it is read"):
        runs(np.array([5, 4]), np.array([4, 3]))


@pytest.mark.parametrize("seed", range(20))
def test_accepted_paths_are_moved_in_a_safe_order(seed):
    src, dst = accepted_path_moves(seed)
    begins = runs(src, dst)
    # Negative control: backwards, a path's order is not safe.
    if np.intersect1d(src, dst).size:
        with pytest.raises(ValueError, match="overwrites"):
            runs(src[::-1], dst[::-1])
    # Runs touch nothing of each other.
    touched = [set(src[a:b]) | set(dst[a:b]) for a, b in itertools.pairwise(begins)]
    assert sum(map(len, touched)) == len(set().union(*touched))


def test_what_is_not_made_of_words_is_refused():
    odd = torch.zeros(PAGES, 2, BLOCK_SIZE, 3, dtype=torch.float16)
    with pytest.raises(ValueError, match="aligned to 4 bytes"):
        strips([odd])
    with pytest.raises(ValueError, match="consecutive"):
        strips([torch.zeros(PAGES, 2, 8, BLOCK_SIZE).transpose(2, 3)])


#: Run with the compiler instead of the interpreter.
COMPILE = """
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vllm_specplus.kernels.move_slots import ROWS, _move_slots_kernel as kernel

types = dict(table="*i64", moves="*i64", num_moves="i32", block_size="i32")
types |= dict.fromkeys(["ROWS", "BLOCK_WORDS"], "constexpr")
signature = {name: types[name] for name in kernel.arg_names}
target = GPUTarget("cuda", int(sys.argv[1]), 32)
for words in (64, 128, 512):
    source = ASTSource(kernel, signature, dict(ROWS=ROWS, BLOCK_WORDS=words))
    compiled = triton.compile(source, target, dict(num_warps=4))
    # All threads read before one writes.
    ptx = compiled.asm["ptx"]
    read, wait, write = (ptx.index(each) for each in ("ld.global.b32", "bar.sync", "st.global"))
    assert read < write and wait < write, (read, wait, write)
"""


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernel_compiles_for_gpus(capability):
    """The interpreter accepts what the compiler rejects. Compiling needs no GPU."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, str(capability)]
    subprocess.run(command, check=True, env=environment)
