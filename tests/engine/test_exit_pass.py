"""Passes of the target that end early (SpecEE), without an engine."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.drafting.test_exit_predictors import tensors
from vllm_specplus.drafting.exit_predictors import ExitPredictors
from vllm_specplus.engine.exit_pass import ExitPass, decided, output_weights
from vllm_specplus.step import Rows
from vllm_specplus.tree import row_depths

HIDDEN, VOCAB, LAYERS = 6, 11, 5


def rows_of(tokens: list[int], parents: list[int], starts: list[int]) -> Rows:
    above, first = np.array(parents, np.int32), np.array(starts, np.int32)
    return Rows(np.array(tokens, np.int32), above, first, row_depths(above, first))


@pytest.mark.parametrize(
    ("exited", "known"),
    [
        ([-1, -1, -1, -1], False),
        ([9, -1, -1, -1], True),  # no node holds it: the text ends there
        ([5, -1, -1, -1], False),  # its node goes on
        ([5, 7, -1, 3], False),
        ([5, 7, 2, -1], True),
        ([6, 1, 1, 1], True),  # the other branch does not matter
        ([6, 1, 1, -1], False),
    ],
)
def test_only_rows_on_the_path_count(exited, known):
    """Below the root 5 and 6, below 5 a 7: rows 1, 3 and 2."""
    rows = rows_of([4, 5, 7, 6], [-1, 0, 1, 0], [0, 4])
    assert decided(rows, np.array(exited)) == known
    two = rows_of([4, 5, 7, 6, 8], [-1, 0, 1, 0, -1], [0, 4, 5])
    assert not decided(two, np.array([*exited, -1]))
    assert decided(two, np.array([*exited, 0])) == known


class Layer(nn.Module):
    """Adds to the residual, as vLLM's fused layers do."""

    def __init__(self, number: int):
        super().__init__()
        torch.manual_seed(number)
        self.add = nn.Linear(HIDDEN, HIDDEN)
        self.ran = 0

    def forward(self, hidden, residual):
        self.ran += 1
        residual = hidden if residual is None else hidden + residual
        return self.add(residual).tanh(), residual


class Target:
    """As ``engine.target_layers.TargetLayers``: its norm doubles, its attentions are watched."""

    num_layers = LAYERS

    def __init__(self):
        torch.manual_seed(99)
        self.head = torch.randn(VOCAB, HIDDEN)
        self.filled: list[tuple[int, torch.Tensor]] = []
        self.blocks = [
            SimpleNamespace(
                layer=Layer(n), placed=[lambda rows: 3 * rows, None, None, None],
                attention=self._attention(n),
            )
            for n in range(LAYERS)
        ]  # fmt: skip

    def _attention(self, number: int):
        attention = nn.Module()

        def forward(positions, hidden_states):
            self.filled.append((number, hidden_states))

        attention.forward = forward
        return attention

    def normed(self, hidden):
        return 2 * hidden

    def output(self, normed):
        return normed @ self.head.T

    def forward(self, embedded, layers: int = LAYERS):
        hidden, residual = embedded, None
        for block in self.blocks[:layers]:
            hidden, residual = block.layer(hidden, residual)
        return self.normed(hidden + residual)


def predictors(tmp_path, fires: bool, layers=(2, 3, 4)) -> ExitPredictors:
    weights = tensors(len(layers), candidates=4)
    weights["layers"], weights["static"] = torch.tensor(layers), torch.tensor(layers)
    weights["out.weight"].zero_()
    weights["out.bias"][:] = 5.0 if fires else -5.0
    save_file(weights, tmp_path / "p.safetensors")
    return ExitPredictors(tmp_path / "p.safetensors", 0.5, torch.device("cpu"))


@torch.inference_mode()
def passed(tmp_path, candidates_of, fires=True, tokens=(4,), parents=(-1,)):
    target = Target()
    run = ExitPass(target, target.head)
    embedded = torch.randn(2 + len(tokens), HIDDEN, generator=torch.Generator().manual_seed(1))
    at = torch.arange(2, 2 + len(tokens))  # rows before them, of padding
    rows = rows_of(list(tokens), list(parents), [0, len(tokens)])
    best = {n: target.output(target.forward(embedded, n)[at]).argmax(-1) for n in range(1, 6)}
    for block in target.blocks:
        block.layer.ran = 0
    found = predictors(tmp_path, fires)
    out = run.run(
        lambda: target.forward(embedded), found, torch.arange(len(embedded)), rows, at,
        np.array(candidates_of(best)),
    )  # fmt: skip
    ran = sum(block.layer.ran for block in target.blocks)
    return target, embedded, out, ran, found, best


def but(*tokens) -> list[int]:
    """Four ids that are none of these."""
    return [token for token in range(VOCAB) if token not in tokens][:4]


def test_a_pass_ends_where_the_best_token_is_a_candidate(tmp_path):
    """Behind layer 3: at layer 2 the best token of all is none of the four."""

    def candidates(best):
        two, three = int(best[2][0]), int(best[3][0])
        assert two != three
        return [[three, *but(two, three)[:3]]]

    target, embedded, out, ran, found, best = passed(tmp_path, candidates)
    assert ran == 3
    with torch.inference_mode():
        expected = target.forward(embedded, 3)
    torch.testing.assert_close(out, expected)
    assert int(target.output(out[2]).argmax()) == int(best[3][0])
    # Keys and values of the layers behind it: from the state at the exit, all of its rows.
    assert [number for number, _ in target.filled] == [3, 4]
    for _, hidden in target.filled:
        torch.testing.assert_close(hidden, 3 * expected / 2)
    assert list(found.schedule._exits) == [3]


def test_a_pass_runs_through_where_no_predictor_fires(tmp_path):
    target, embedded, out, ran, found, _ = passed(
        tmp_path, lambda best: [[0, 1, 2, 3]], fires=False
    )
    assert (ran, target.filled) == (LAYERS, [])
    with torch.inference_mode():
        torch.testing.assert_close(out, target.forward(embedded))
    assert list(found.schedule._exits) == [LAYERS]


def test_a_request_without_candidates_takes_all_layers(tmp_path):
    *_, ran, _, _ = passed(tmp_path, lambda best: [[-1] * 4])
    assert ran == LAYERS


def test_rows_of_a_path_exit_together(tmp_path):
    """The root exits at 2; its node at 4, and the state of each is that at its own exit."""

    def candidates(best):
        root, node = int(best[2][0]), [int(best[n][1]) for n in (2, 3, 4)]
        return [[root, *but(root)[:3]], [node[2], *but(*node)[:3]]]

    target = Target()
    embedded = torch.randn(4, HIDDEN, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        root = int(target.output(target.forward(embedded, 2)[2]).argmax())
    target, embedded, out, ran, _, best = passed(
        tmp_path, candidates, tokens=(4, root), parents=(-1, 0)
    )
    nodes = [int(best[n][1]) for n in (2, 3, 4)]
    exits = 2 + nodes.index(nodes[2])
    assert ran == exits
    with torch.inference_mode():
        torch.testing.assert_close(out[2], target.forward(embedded, 2)[2])
        torch.testing.assert_close(out[3], target.forward(embedded, exits)[3])


def test_an_output_layer_that_cannot_be_read_by_rows_is_refused():
    model = nn.Module()
    with pytest.raises(ValueError, match="is quantised or of another kind"):
        output_weights(model)
    model.lm_head = nn.Linear(HIDDEN, VOCAB, bias=False)
    assert output_weights(model) is model.lm_head.weight
