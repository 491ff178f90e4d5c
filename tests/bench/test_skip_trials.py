"""Draft & Verify's search, by a planted engine."""

from __future__ import annotations

import json

import numpy as np
import pytest

from vllm_specplus.bench import InputError
from vllm_specplus.bench.skip_trials import SkipTrials, skips_of
from vllm_specplus.config import parse
from vllm_specplus.drafting.skip_search import Skips

LAYERS = 6
ABOUT = {"model": "m", "questions": ["a"], "max_tokens": 32}


def speed(skips: Skips) -> float:
    """Planted: attention of layers 2 to 4 can be spared; all else costs more than it saves."""
    spared = len(skips.attention & {2, 3, 4})
    return 10.0 + spared - len(skips.attention - {2, 3, 4}) - len(skips.mlp)


def test_a_point_names_attentions_and_then_mlps():
    found = skips_of(np.array([0.6, 0.5, 0.9, 0.0, 0.51, 0.1]))
    assert found == Skips(frozenset({0, 2}), frozenset({1}))


def test_the_fastest_set_is_found_and_can_be_served(tmp_path):
    search = SkipTrials(tmp_path / "t.jsonl", ABOUT, LAYERS)
    first, *_ = (trial.tokens_per_s for trial in search.run(speed, 120))
    assert search.best.tokens_per_s > max(first, 11)
    (tmp_path / "skips.json").write_text(json.dumps(search.result()))
    config = parse({"method": "layer_skip", "skips": str(tmp_path / "skips.json")})
    assert set(config.named_layers()["skip_attention"]) == set(search.best.skips.attention)
    assert search.result()["trials"] == 120


def test_a_search_that_was_ended_goes_on(tmp_path):
    file, asked = tmp_path / "t.jsonl", []

    def ends(skips: Skips) -> float:
        if len(asked) == 7:
            raise KeyboardInterrupt
        asked.append(skips)
        return speed(skips)

    with pytest.raises(KeyboardInterrupt):
        list(SkipTrials(file, ABOUT, LAYERS).run(ends, 20))
    with file.open("a") as cut:
        cut.write('{"point": [0.1')  # it was being written
    again = SkipTrials(file, ABOUT, LAYERS)
    assert [trial.skips for trial in again.trials] == asked
    assert len(list(again.run(speed, 20))) == 13
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == 1 + 20
    assert list(SkipTrials(file, ABOUT, LAYERS).run(speed, 20)) == []


def test_trials_of_another_search_are_not_mixed_in(tmp_path):
    list(SkipTrials(tmp_path / "t.jsonl", ABOUT, LAYERS).run(speed, 2))
    for about, layers in ((ABOUT | {"model": "n"}, LAYERS), (ABOUT, LAYERS + 1)):
        with pytest.raises(InputError, match="holds trials of another search"):
            SkipTrials(tmp_path / "t.jsonl", about, layers)
