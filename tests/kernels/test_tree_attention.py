"""Tree attention: the reference against a loop over rows, the Triton kernels against the reference.

Without a GPU the kernels run in Triton's interpreter on CPU tensors (``tests/conftest.py`` selects
it), and are besides compiled, not run, for GPUs.
"""

import itertools
import math
import os
import subprocess
import sys

import pytest
import torch

from tests.kernels.tree_batch import CHAIN, DEVICE, ROOT, STAR, Batch, random_tree
from vllm_specplus.kernels import tree_attention as module
from vllm_specplus.kernels.reference import tree_attention_reference
from vllm_specplus.kernels.tree_attention import tree_attention

#: Error of an output, absolute and relative. 16-bit kernels round their weights and output; the
#: interpreter truncates to bfloat16.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

BATCHES = {
    "root only, no context": Batch([ROOT], [0]),
    "chain, context of one": Batch([CHAIN], [1], group=3),
    "star ends its block": Batch([STAR], [11], group=4, layout="HND"),
    "star starts a block": Batch([STAR], [16], group=8, num_kv_heads=1, dtype=torch.float16),
    "contexts about a block": Batch([CHAIN, STAR, random_tree(9, 1)], [15, 16, 17], group=4),
    "blocks of 32": Batch(
        [random_tree(20, 2), ROOT, STAR], [70, 0, 33], 32, 2, 4, 80, torch.bfloat16
    ),
    "several blocks of rows": Batch(
        [random_tree(20, 3), STAR], [70, 17], group=8, head_size=128, num_kv_heads=1, layout="HND"
    ),
    "several tiles of nodes": Batch(
        [random_tree(67, 4), CHAIN], [130, 1], 16, 2, 3, 80, torch.bfloat16, "HND"
    ),
    "rows that see nothing in the first tile": Batch([[-1] * 66], [0]),
}


@pytest.fixture(params=BATCHES.values(), ids=BATCHES.keys())
def batch(request) -> Batch:
    return request.param


#: What a layer may do beside plain attention, alone and together.
FEATURES = {
    "window": {"window": 5}, "window of one": {"window": 1}, "chunk": {"chunk": 18},
    "chunk of one": {"chunk": 1}, "soft cap": {"soft_cap": 1.5},
    "ALiBi": {"slopes": True}, "sinks": {"sinks": True},
    "Gemma 2": {"window": 40, "soft_cap": 2.0}, "gpt-oss": {"window": 17, "sinks": True},
    "all": {"window": 33, "chunk": 20, "soft_cap": 2.0, "slopes": True, "sinks": True},
}  # fmt: skip


def run(batch: Batch, part: str, num_splits: int = 1, first=None, **features):
    return tree_attention(
        *batch.arguments,
        part=part,
        max_rows=batch.max_rows,
        max_context_len=max(batch.contexts),
        num_splits=num_splits,
        first=first,
        **features,
    )


def features_of(batch: Batch, features: dict) -> dict:
    """The arguments that some of ``FEATURES`` are for a batch."""
    heads = batch.num_kv_heads * batch.group
    depths = []
    for parents in batch.trees:
        own = []
        for parent in parents:
            own.append(own[parent] + 1 if parent >= 0 else 0)
        depths += own
    values = {
        "slopes": 2.0 ** -torch.arange(1.0, heads + 1, device=DEVICE),
        "sinks": torch.linspace(-1, 4, heads, device=DEVICE),
    }
    arguments = {name: values.get(name, value) for name, value in features.items()}
    return arguments | {"depths": torch.tensor(depths, dtype=torch.int32, device=DEVICE)}


def assert_close(actual, expected, dtype):
    (output, lse), (expected_output, expected_lse) = actual, expected
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(output.float(), expected_output, atol=tolerance, rtol=tolerance)
    # The LSE is computed from exact products of the inputs.
    torch.testing.assert_close(lse, expected_lse, atol=1e-4, rtol=1e-5)


def merge(first, second):
    """Join attention over two disjoint sets of keys, given the (output, LSE) over each."""
    lse = torch.logaddexp(first[1], second[1])
    output = sum(out.float() * (part - lse).exp().T[..., None] for out, part in (first, second))
    return output, lse


def middle(batch: Batch) -> torch.Tensor:
    """Of every context."""
    return torch.tensor([n // 2 for n in batch.contexts], dtype=torch.int32, device=DEVICE)


def partly(batch: Batch, seed: int) -> tuple[tuple, dict]:
    """The arguments where only the last rows of each request attend, where texts end before their
    trees, and where some slots are not to be seen."""
    query, keys, values, starts, contexts, table, ancestors, scale = batch.arguments
    generator = torch.Generator().manual_seed(seed)

    def draw(most: torch.Tensor) -> torch.Tensor:
        share = torch.rand(len(most), generator=generator).to(DEVICE)
        return (share * (most + 1)).int().clamp(max=most)

    skipped = draw(starts.diff() - 1)
    rows = torch.cat(
        [
            torch.arange(int(a + n), int(b))
            for a, n, b in zip(starts[:-1], skipped, starts[1:], strict=True)
        ]
    ).to(DEVICE)
    left = torch.cat((starts[:1], (starts.diff() - skipped).cumsum(0).int()))
    given = features_of(batch, {}) | {
        "key_starts": starts,
        "ends": contexts - draw(contexts),
        "readable": torch.rand(keys.shape[:2], generator=generator).to(DEVICE) < 0.7,
    }
    arguments = (query[rows], keys, values, left, contexts, table, ancestors[rows], scale)
    return arguments, given


PARTS = {"rows": {"key_starts"}, "ends": {"ends"}, "slots": {"readable"},
         "all": {"key_starts", "ends", "readable"}}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("names", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("features", [{}, {"window": 20}, FEATURES["all"]], ids=str)
def test_kernel_attends_by_some_rows_to_parts_of_a_context(batch, names, features):
    arguments, given = partly(batch, 5)
    if "key_starts" not in names:
        arguments = batch.arguments
    given = {name: given[name] for name in {*names, "depths"}}
    given |= {
        name: value for name, value in features_of(batch, features).items() if name in features
    }
    expected = tree_attention_reference(*arguments, **given)
    for splits in (1, 3):
        actual = tree_attention(
            *arguments, part="all", max_rows=batch.max_rows, num_splits=splits,
            max_context_len=max(batch.contexts), **given,
        )  # fmt: skip
        assert_close(actual, expected, batch.dtype)


def test_rows_of_no_tree_see_their_context(batch):
    """As a draft sees what the target has of a text."""
    query, keys, values, starts, contexts, table, _, scale = batch.arguments
    contexts = contexts.clamp(min=1)
    none = torch.zeros_like(starts)
    related = torch.zeros(len(query), 1, dtype=torch.bool, device=DEVICE)
    arguments = query, keys, values, starts, contexts, table, related, scale
    # The reference weighs what is not seen with 0, where these caches hold NaN.
    seen = query, keys.nan_to_num(), values.nan_to_num(), starts, contexts, table
    expected = tree_attention_reference(*seen, related, scale, key_starts=none)
    context = tree_attention_reference(*seen, batch.arguments[6], scale, part="context")
    assert_close(context, expected, batch.dtype)
    for splits in (1, 3):
        actual = tree_attention(
            *arguments, part="all", max_rows=batch.max_rows, num_splits=splits,
            max_context_len=int(contexts.max()), key_starts=none,
        )  # fmt: skip
        assert_close(actual, expected, batch.dtype)


def test_what_is_said_of_rows_and_contexts_changes_something():
    """The control of the comparison above, and what the reference makes of it: what is not seen may
    be anything."""
    batch = Batch([random_tree(9, 1), CHAIN], [40, 17], group=2)
    arguments, given = partly(batch, 5)
    whole, _ = tree_attention_reference(*batch.arguments)
    for name in ("ends", "readable"):
        part, _ = tree_attention_reference(*batch.arguments, **{name: given[name]})
        assert (part - whole).abs().max() > 0.01
    rows, _ = tree_attention_reference(*arguments, key_starts=given["key_starts"])
    starts, left = given["key_starts"], arguments[3]
    for r in range(2):
        own, kept = whole[starts[r] : starts[r + 1]], rows[left[r] : left[r + 1]]
        torch.testing.assert_close(own[len(own) - len(kept) :], kept)
    blind, _ = tree_attention_reference(*batch.arguments, ends=torch.zeros_like(given["ends"]))
    tree, _ = tree_attention_reference(*batch.arguments, part="tree")
    torch.testing.assert_close(blind, tree)


@pytest.mark.parametrize("hidden", [False, True])
def test_reference_is_softmax_over_visible_keys(batch, hidden):
    query, key_cache, value_cache, starts, _, block_table, _, scale = batch.arguments
    first = middle(batch) if hidden else torch.zeros_like(middle(batch))
    output, lse = tree_attention_reference(*batch.arguments, first=first if hidden else None)
    for request, (parents, context) in enumerate(zip(batch.trees, batch.contexts, strict=True)):
        for row in range(len(parents)):
            positions = list(range(int(first[request]), context))
            node = row
            while node >= 0:
                positions.append(context + node)
                node = parents[node]
            positions = torch.tensor(positions, device=DEVICE)
            blocks = block_table[request, positions // batch.block_size]
            offsets = positions % batch.block_size
            index = int(starts[request]) + row
            for head in range(query.shape[1]):
                keys = key_cache[blocks, offsets, head // batch.group].float()
                values = value_cache[blocks, offsets, head // batch.group].float()
                weights = (keys @ query[index, head].float() * scale).exp()
                torch.testing.assert_close(output[index, head], weights @ values / weights.sum())
                torch.testing.assert_close(lse[head, index], weights.sum().log())


def test_reference_parts_join_to_the_whole(batch):
    context, tree, whole = (
        tree_attention_reference(*batch.arguments, part=part) for part in ("context", "tree", "all")
    )
    assert_close(merge(context, tree), whole, torch.float32)


def test_kernel_of_the_tree_part(batch):
    tree = run(batch, "tree")
    assert tree[0].dtype == batch.dtype
    assert_close(tree, tree_attention_reference(*batch.arguments, part="tree"), batch.dtype)

    context = tree_attention_reference(*batch.arguments, part="context")
    whole = tree_attention_reference(*batch.arguments)
    assert_close(merge(context, tree), whole, batch.dtype)


@pytest.mark.slow
@pytest.mark.parametrize("num_splits", [1, 3])
def test_kernel_of_context_and_tree(batch, num_splits):
    whole = tree_attention_reference(*batch.arguments)
    assert_close(run(batch, "all", num_splits), whole, batch.dtype)


@pytest.mark.slow
@pytest.mark.parametrize("num_splits", [1, 3])
def test_kernel_from_a_first_token_on(batch, num_splits):
    """In a batch, of its middle and of all of its context."""
    for first in (middle(batch), torch.tensor(batch.contexts, dtype=torch.int32, device=DEVICE)):
        expected = tree_attention_reference(*batch.arguments, first=first)
        assert_close(run(batch, "all", num_splits, first), expected, batch.dtype)


@pytest.mark.parametrize("name", FEATURES)
def test_reference_with_features_is_what_a_loop_over_positions_does(name):
    """In float64, row by row, head by head."""
    batch = Batch([STAR, random_tree(9, 1)], [45, 3], group=2)
    query, key_cache, value_cache, starts, _, block_table, _, scale = batch.arguments
    features = features_of(batch, FEATURES[name])
    output, lse = tree_attention_reference(*batch.arguments, **features)
    for request, (parents, context) in enumerate(zip(batch.trees, batch.contexts, strict=True)):
        begin = int(starts[request])
        depth = features["depths"][begin : begin + len(parents)].tolist()
        for row in range(len(parents)):
            seen, node = {j: j for j in range(context)}, row
            while node >= 0:
                seen[context + depth[node]] = context + node
                node = parents[node]
            own = context + depth[row]
            for head in range(query.shape[1]):
                scores, values = [], []
                for position, place in seen.items():
                    if features.get("window") and own - position >= features["window"]:
                        continue
                    if features.get("chunk") and own // features["chunk"] != (
                        position // features["chunk"]
                    ):
                        continue
                    block = block_table[request, place // batch.block_size]
                    slot = block, place % batch.block_size, head // batch.group
                    score = float(key_cache[slot].double() @ query[begin + row, head].double())
                    score *= scale
                    if cap := features.get("soft_cap"):
                        score = cap * math.tanh(score / cap)
                    if "slopes" in features:
                        score += float(features["slopes"][head]) * (position - own)
                    scores.append(score)
                    values.append(value_cache[slot].double())
                if "sinks" in features:
                    scores.append(float(features["sinks"][head]))
                    values.append(torch.zeros_like(values[0]))
                scores = torch.tensor(scores, dtype=torch.float64, device=DEVICE)
                expected = scores.softmax(0) @ torch.stack(values)
                torch.testing.assert_close(
                    output[begin + row, head].double(), expected, atol=1e-5, rtol=1e-5
                )
                assert float(lse[head, begin + row]) == pytest.approx(
                    float(scores.logsumexp(0)), abs=1e-5
                )


@pytest.mark.slow
@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("name", FEATURES)
def test_kernel_with_features(name, num_splits):
    for batch in (BATCHES["contexts about a block"], BATCHES["several tiles of nodes"]):
        features = features_of(batch, FEATURES[name])
        expected = tree_attention_reference(*batch.arguments, **features)
        assert_close(run(batch, "all", num_splits, **features), expected, batch.dtype)


@pytest.mark.parametrize("name", ["window", "chunk", "soft_cap", "slopes", "sinks"])
def test_every_feature_changes_something(name):
    """Negative control of the comparison above."""
    batch = Batch([STAR, random_tree(9, 1)], [45, 3])
    plain = tree_attention_reference(*batch.arguments)
    features = features_of(batch, {name: FEATURES["all"][name]})
    assert (plain[0] - run(batch, "all", **features)[0]).abs().max() > 0.01


@pytest.mark.parametrize("part", ["tree", "all"])
def test_a_causal_mask_is_not_a_tree(part):
    """Negative control: the comparisons above notice a wrong mask."""
    batch = Batch([STAR, random_tree(9, 1)], [17, 3])
    expected = tree_attention_reference(*batch.arguments, part=part)
    _, _, _, starts, _, _, ancestors, _ = batch.arguments
    for start, end in itertools.pairwise(starts):
        ancestors[start:end] = True
        ancestors[start:end].tril_()
    with pytest.raises(AssertionError, match="not close"):
        assert_close(run(batch, part), expected, batch.dtype)


def test_padded_and_strided_arguments():
    """Queries cut out of a fused QKV projection, an ancestor matrix wider than any tree."""
    batch = Batch([STAR, CHAIN], [17, 3], group=2)
    expected = tree_attention_reference(*batch.arguments)
    query, *cache_and_lengths, ancestors, scale = batch.arguments
    qkv = torch.full((query.shape[0], 3, *query.shape[1:]), torch.nan, device=DEVICE)
    qkv[:, 1] = query
    ancestors = torch.nn.functional.pad(ancestors, (0, 5), value=True)
    batch.arguments = (qkv[:, 1], *cache_and_lengths, ancestors, scale)
    assert_close(run(batch, "all"), expected, batch.dtype)


def test_default_splits_fill_the_gpu(monkeypatch):
    monkeypatch.setattr(module, "_num_processors", lambda device: 132)
    splits = module._default_num_splits
    assert splits(8, 32768, None) == module.MAX_SPLITS
    assert splits(64, 32768, None) == 4
    assert splits(512, 32768, None) == 1
    assert splits(8, 1024, None) == 4
    assert splits(8, 0, None) == 1


#: Run with the compiler instead of the interpreter.
COMPILE = """
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vllm_specplus.kernels.tree_attention import (
    _merge_splits_kernel, _tile_shape, _tree_attention_kernel
)

capability = int(sys.argv[1])

def compile(kernel, pointers, constants, num_warps=4):
    types = {name: "i32" for name in kernel.arg_names}
    types |= {"scale_log2": "fp32", "cap_log2": "fp32"}
    types |= {name: "*" + pointer for name, pointer in pointers.items()}
    types |= {name: "constexpr" for name in constants}
    signature = {name: types[name] for name in kernel.arg_names}
    target = GPUTarget("cuda", capability, 32)
    options = dict(num_warps=num_warps, num_stages=2)
    return triton.compile(ASTSource(kernel, signature, constants), target, options)

for dtype, size, group, head_size in (("bf16", 2, 4, 128), ("fp16", 2, 3, 80), ("fp32", 4, 1, 64)):
    m, n, d, num_warps = _tile_shape(group, 64, head_size, size)
    pointers = dict.fromkeys(["output", "query", "key_cache", "value_cache"], dtype)
    pointers |= dict.fromkeys(["query_start_loc", "context_lens", "first", "block_table"], "i32")
    pointers |= dict(lse="fp32", ancestors="i1", depths="i32", slopes="fp32", sinks=dtype)
    pointers |= dict(key_starts="i32", ends="i32", readable="i1")
    constants = dict(CONTEXT=True, FIRST=True, GROUP=group, HEAD_SIZE=head_size, BLOCK_SIZE=16)
    constants |= dict(BLOCK_M=m, BLOCK_N=n, BLOCK_D=d)
    for window, more in ((0, False), (128, True)):
        constants |= dict(WINDOW=window, CHUNK=window, CAPPED=more, ALIBI=more, SINKS=more)
        constants |= dict(KEYS=more, ENDS=more, READABLE=more)
        kernel = compile(_tree_attention_kernel, pointers, constants, num_warps)
        assert kernel.metadata.shared <= 99 * 1024, (dtype, kernel.metadata.shared)

pointers = dict(output="bf16", lse="fp32", split_output="fp32", split_lse="fp32")
compile(_merge_splits_kernel, pointers, dict(HEAD_SIZE=80, BLOCK_S=32, BLOCK_D=128))
"""


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_compile_for_gpus(capability):
    """The interpreter accepts what the compiler rejects. Compiling needs no GPU."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, str(capability)]
    subprocess.run(command, check=True, env=environment)
