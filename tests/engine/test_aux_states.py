"""The target's states beside the last one, divided among a proposer and a judge."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch

from vllm_specplus.engine.aux_states import AuxiliaryStates

MODEL = SimpleNamespace(get_eagle3_default_aux_hidden_state_layers=lambda: (2, 4, 6))


def states(*layers: int) -> list[torch.Tensor]:
    """What a model of vLLM's hands out for these layers, three rows each."""
    return [torch.full((3, 2), float(layer)) for layer in sorted(layers)]


@pytest.mark.parametrize(
    ("proposer", "judged", "wanted"),
    [
        (None, False, None),
        ((), False, None),  # the model's own choice
        ((1, 5), False, (1, 5)),
        (None, True, (8,)),
        ((1, 5), True, (1, 5, 8)),
        ((), True, (2, 4, 6, 8)),
        ((1, 8), True, (1, 8)),
    ],
)
def test_who_gets_which(proposer, judged, wanted):
    aux = AuxiliaryStates(proposer, judged, 8)
    assert aux.wanted == (proposer is not None or judged)
    assert aux.layers(MODEL) == wanted
    handed = states(*(wanted or (2, 4, 6)))
    own = aux.for_proposer(handed)
    if proposer is None and judged:
        assert own is None
    elif proposer is not None:
        asked = proposer or (2, 4, 6)
        assert [int(each[0, 0]) for each in own] == list(asked)
    if judged:
        rows = torch.tensor([2, 0])
        assert aux.before_norm(handed, rows).tolist() == [[8.0, 8.0]] * 2


def test_a_model_that_hands_out_less_is_told_once(caplog):
    aux = AuxiliaryStates((1, 5), True, 8)
    aux.layers(MODEL)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert aux.before_norm(states(1, 5), torch.tensor([0])) is None
    assert len(caplog.records) == 1
    assert "--set states=after_norm" in caplog.text
    assert aux.before_norm(None, torch.tensor([0])) is None
