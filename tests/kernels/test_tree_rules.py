"""Rules for sampled trees: the Triton kernels decide like the references of ``samplers.sampled``.

The rules themselves are tested against an exact oracle in
``tests/samplers/test_tree_rules.py``; here the kernels get the same noise as the torch code and
must return the same tokens. Without a GPU they run in Triton's interpreter, and are besides
compiled, not run, for GPUs.
"""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from tests.kernels.tree_batch import DEVICE
from vllm_specplus.kernels import tree_rules as module
from vllm_specplus.samplers.registry import rule_class
from vllm_specplus.step import DraftProbs, Rows
from vllm_specplus.tree import row_depths

pytestmark = pytest.mark.slow  # tens of seconds together

VOCAB, DRAFT_VOCAB = 150, 139
RULES = ["without_replacement", "with_replacement", "k_seq", "block", "traversal"]
#: The largest uniform below 1.
ALMOST_1 = 1 - 2**-24


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Three blocks over the vocabulary, the last one not full."""
    monkeypatch.setattr(module, "BLOCK", 64)


class Trees:
    """Random trees, drawn from random distributions that are close to the target's."""

    def __init__(self, rule: str, seed: int, fixed: bool = False, sharpness: float = 1.0):
        """``fixed``: with deterministic siblings after the drawn ones."""
        self.rng = np.random.default_rng(seed)
        self.replace = rule in ("with_replacement", "k_seq")
        self.fixed = fixed
        self.tokens, self.parents, self.index, self.drawn = [], [], [], []
        self.p, self.q, starts = [], [], [0]
        self.sharpness = sharpness
        branching = [1, 1, 1, 1] if rule == "block" else [3, 2, 1]
        for levels in (branching, [], branching[:2], "deterministic", branching, branching[:1]):
            self.first = len(self.tokens)
            root = self._row(0, -1)
            if levels == "deterministic":
                for token in (5, 149, 7):
                    child = self._row(token, root)
                    self._row(token + 1 if token < 149 else 0, child)
            else:
                self._grow(root, levels)
            starts.append(len(self.tokens))
        tokens, parents, starts, self.index, self.drawn = (
            np.array(x, np.int32)
            for x in (self.tokens, self.parents, starts, self.index, self.drawn)
        )
        self.rows = Rows(tokens, parents, starts, row_depths(parents, starts))
        self.p = torch.tensor(np.array(self.p), dtype=torch.float32)
        self.q = torch.tensor(np.array(self.q), dtype=torch.float32)
        self.noise = torch.Generator().manual_seed(seed)

    def _row(self, token, parent):
        self.tokens.append(token)
        self.parents.append(parent - self.first if parent >= 0 else -1)
        self.index.append(-1)
        self.drawn.append(0)
        logits = self.rng.normal(size=VOCAB) * 3 * self.sharpness
        logits[self.rng.random(VOCAB) < 0.2] = -np.inf
        self.p.append(_softmax(logits))
        return len(self.tokens) - 1

    def _grow(self, row, levels):
        if not levels:
            return
        near = np.log(self.p[row][:DRAFT_VOCAB] + 1e-12)
        q = _softmax(near + self.rng.normal(size=DRAFT_VOCAB) * self.sharpness)
        self.index[row], self.drawn[row] = len(self.q), levels[0]
        self.q.append(q)
        children = self.rng.choice(DRAFT_VOCAB, levels[0], self.replace, q)
        others = np.setdiff1d(np.argsort(-self.p[row])[:8], children)[: 2 * self.fixed]
        rows = {}
        for token in [*children, *others]:
            child = self._row(int(token), row)
            rows.setdefault(int(token), child)  # a repeated draw is a leaf
        for child in rows.values():
            self._grow(child, levels[1:])

    def both(self, rule, reference_rule=None):
        """What the kernels and the torch code return, given the same noise."""
        accept = torch.rand(len(self.rows.tokens), generator=self.noise)
        output = torch.rand(len(self.rows.starts) - 1, generator=self.noise)
        draft_probs = DraftProbs(self.q, self.index, self.drawn)
        expected = rule_class(reference_rule or rule)().reference(
            self.p, self.rows, draft_probs, accept, output
        )
        return on_device(rule, self.p, self.rows, draft_probs, accept, output), expected.tolist()


def _softmax(logits):
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def verify(rule, *step):
    return rule_class(rule)().on_device(*step)


def on_device(rule, p, rows, draft_probs, accept, output) -> list[int]:
    draft_probs = DraftProbs(draft_probs.q.to(DEVICE), draft_probs.index, draft_probs.drawn)
    p, accept, output = (x.to(DEVICE) for x in (p, accept, output))
    return verify(rule, p, rows, draft_probs, accept, output).tolist()


def one_request(tokens, parents, drawn) -> tuple[Rows, np.ndarray, np.ndarray]:
    """``drawn``: drawn children of every row. Returns also ``index``, one per inner row."""
    tokens, parents, drawn = (np.array(x, np.int32) for x in (tokens, parents, drawn))
    starts = np.array([0, len(tokens)], np.int32)
    index = np.where(drawn > 0, np.cumsum(drawn > 0) - 1, -1).astype(np.int32)
    return Rows(tokens, parents, starts, row_depths(parents, starts)), index, drawn


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("sharpness", [1.0, 4.0])
def test_kernels_equal_the_torch_code(rule, sharpness):
    lengths = set()
    for seed in range(4 if rule == "k_seq" else 12):  # its search takes the interpreter long
        trees = Trees(rule, seed, sharpness=sharpness)
        for _ in range(2):
            actual, expected = trees.both(rule)
            assert actual == expected
            lengths |= set(np.add.reduceat(np.array(actual) >= 0, trees.rows.starts[:-1]))
    assert {1, 2, 3} <= lengths


@pytest.mark.parametrize("rule", RULES[:3])
def test_with_deterministic_siblings(rule):
    for seed in range(3 if rule == "k_seq" else 8):
        trees = Trees(rule, seed, fixed=True)
        for _ in range(2):
            actual, expected = trees.both(rule)
            assert actual == expected


@pytest.mark.parametrize(("rule", "other"), [(RULES[0], RULES[1]), (RULES[4], RULES[0])])
def test_another_rule_is_noticed(rule, other):
    """Negative control: the comparisons above can tell two rules apart."""
    results = [Trees(rule, seed).both(rule, reference_rule=other) for seed in range(10)]
    assert any(actual != expected for actual, expected in results)


@pytest.mark.parametrize("rule", RULES)
def test_strided_distributions(rule):
    """Logits of some models are padded; those of a draft are cut out of a larger buffer."""
    trees = Trees(rule, 3)
    trees.p = torch.nn.functional.pad(trees.p, (0, 10), value=torch.nan)[:, :VOCAB]
    trees.q = torch.nn.functional.pad(trees.q, (0, 3), value=torch.nan)[:, :DRAFT_VOCAB]
    actual, expected = trees.both(rule)
    assert actual == expected


@pytest.mark.parametrize("rule", RULES)
def test_a_step_without_draws(rule):
    """Then there may be no draft probabilities at all."""
    trees = Trees(rule, 0)
    trees.q = torch.empty(0, 1)
    trees.index[:], trees.drawn[:] = -1, 0
    actual, expected = trees.both(rule)
    assert actual == expected


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("noise", [0.0, 0.5, ALMOST_1])
def test_a_perfect_draft_is_always_accepted(rule, noise):
    """And the token after it has weight, at both ends of the noise."""
    p = torch.rand(4, VOCAB, generator=torch.Generator().manual_seed(1))
    p[:, [0, 1, 70, -1]] = 0.0
    p /= p.sum(-1, keepdim=True)
    rows, index, drawn = one_request([0, 3, 2, 9], [-1, 0, 1, 2], [1, 1, 1, 0])
    draft_probs = DraftProbs(p[:3].contiguous(), index, drawn)
    result = on_device(rule, p, rows, draft_probs, torch.full((4,), noise), torch.full((1,), noise))
    assert result[:3] == [3, 2, 9]
    assert p[3, result[3]] > 0


@pytest.mark.parametrize("rule", ["without_replacement", "with_replacement", "traversal"])
@pytest.mark.parametrize("noise", [0.0, 0.5, ALMOST_1])
def test_a_draft_that_has_nothing_left(rule, noise):
    """q is certain of a token that p excludes: the siblings repeat it, and all are rejected."""
    p, q = torch.eye(3)[[0, 1, 1, 1]], torch.eye(3)[[2, 2]]
    rows, index, drawn = one_request([0, 2, 2, 2], [-1, 0, 0, 2], [2, 0, 1, 0])
    draft_probs = DraftProbs(q, index, drawn)
    noise = torch.full((4,), noise)
    assert on_device(rule, p, rows, draft_probs, noise, noise[:1]) == [0, -1, -1, -1]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("noise", [0.0, 0.3, 0.6, ALMOST_1])
def test_rejected_children_are_not_output(rule, noise):
    """The children, drawn from a q a rounding away from p, are rejected or have outputs."""
    p = torch.tensor([[0.25 - 2e-8, 0.25 - 2e-8, 0.25, 0.25 + 3e-8]]).repeat(3, 1)
    tokens, parents, drawn = [0, 0, 1], [-1, 0, 0], [2, 0, 0]
    if rule == "block":
        tokens, parents, drawn = [0, 0, 1], [-1, 0, 1], [1, 1, 0]
    rows, index, drawn = one_request(tokens, parents, drawn)
    draft_probs = DraftProbs(torch.full((2, 4), 0.25), index, drawn)
    accept, output = torch.full((3,), ALMOST_1), torch.full((1,), noise)
    result = on_device(rule, p, rows, draft_probs, accept, output)
    for row, parent in enumerate(parents[1:], 1):
        assert result[parent] != tokens[row] or result[row] >= 0


def test_what_the_rules_do_not_take():
    rows, index, drawn = one_request([0, 1, 2], [-1, 0, 0], [1, 0, 0])
    p, noise = torch.full((3, 4), 0.25, device=DEVICE), torch.zeros(3, device=DEVICE)
    draft_probs = DraftProbs(p[:1], index, drawn)
    for rule in ("block", "traversal"):
        with pytest.raises(ValueError, match="no deterministic siblings"):
            verify(rule, p, rows, draft_probs, noise, noise[:1])
    draft_probs.drawn[0] = 2
    with pytest.raises(ValueError, match="chains only"):
        verify("block", p, rows, draft_probs, noise, noise[:1])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("vocab", [96, 100])
def test_warm_up_runs_what_a_step_runs(rule, vocab, monkeypatch):
    """Requests with draws and without; drafts of a vocabulary as large as the target's and of
    another, which differ in what the compiler knows of them: is it a multiple of 16?"""
    launched = set()

    class Recorded:
        def __init__(self, kernel, name):
            self.kernel, self.name = kernel, name

        def __getitem__(self, grid):
            def launch(*arguments, **constants):
                vocab, q_vocab = arguments[-4:-2]
                launched.add((self.name, vocab % 16 == 0, q_vocab % 16 == 0))
                assert vocab >= q_vocab
                return self.kernel[grid](*arguments, **constants)

            return launch

    for name in ("_walk_kernel", "_block_kernel", "_traversal_kernel"):
        monkeypatch.setattr(module, name, Recorded(getattr(module, name), name))
    rule_class(rule)().warm_up(vocab, torch.device(DEVICE))
    kernels = {"block": {"_block_kernel"}, "traversal": {"_traversal_kernel"}}.get(rule, set())
    expected = {(n, vocab == 96, whole) for n in kernels | {"_walk_kernel"} for whole in (0, 1)}
    assert launched == expected


#: Run with the compiler instead of the interpreter.
COMPILE = """
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vllm_specplus.kernels import tree_rules

def compile(kernel, **constants):
    constants["BLOCK"] = tree_rules.BLOCK
    types = {name: "i32" for name in kernel.arg_names} | dict(out="*i32", tree="*i32")
    types |= dict.fromkeys(["p", "q", "accept_noise", "output_noise"], "*fp32")
    types |= dict(state="*fp64") | {name: "constexpr" for name in constants}
    signature = {name: types[name] for name in kernel.arg_names}
    target = GPUTarget("cuda", int(sys.argv[1]), 32)
    options = dict(num_warps=tree_rules.NUM_WARPS)
    triton.compile(ASTSource(kernel, signature, constants), target, options)

for k_seq, renormalise in ((False, True), (False, False), (True, False)):
    compile(tree_rules._walk_kernel, K_SEQ=k_seq, RENORMALISE=renormalise)
compile(tree_rules._block_kernel)
compile(tree_rules._traversal_kernel)
"""


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_for_gpus(capability):
    """The interpreter accepts what the compiler rejects. Compiling needs no GPU."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE, str(capability)]
    subprocess.run(command, check=True, env=environment)
