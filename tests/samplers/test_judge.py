"""The acceptance rule ``judge``: its head, and the files that hold one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.model_configs import target
from tests.samplers.test_relaxed import make_rows
from vllm_specplus.config import parse
from vllm_specplus.samplers import relaxed
from vllm_specplus.samplers.judge import JudgeHead, head_size, read_head


@pytest.fixture
def head(tmp_path):
    """Token 3's hidden state, one-hot, is wrong; all others are right."""
    weight = torch.full((8,), 4.0)
    weight[3] = -4.0
    path = tmp_path / "head.safetensors"
    save_file({"weight": weight, "bias": torch.zeros(1)}, path)
    return str(path)


def test_a_node_is_judged_at_its_own_row(head):
    """Hidden states that say which token was read: exactly one token is refused, wherever it is."""
    rows = make_rows([1, 3, 5, 3, 6, 2, 4], [-1, 0, 1, 0, 3, -1, 0], [0, 5, 7])
    hidden = torch.eye(8)[torch.from_numpy(rows.tokens).long()]
    scores = JudgeHead(head, torch.device("cpu")).scores(hidden)
    logits = torch.randn(7, 12)
    statistics = relaxed.candidate_statistics(logits, rows, np.zeros(2, np.float32), scores)
    assert statistics.rows.tolist() == [1, 2, 3, 4, 6]

    def judge(threshold: float) -> relaxed.Judge:
        return relaxed.Judge(head=head, threshold=threshold, device=torch.device("cpu"))

    assert judge(0.5).accepts(statistics).tolist() == [False, True, False, True, True]
    assert not judge(1.0).accepts(statistics).any()
    assert judge(0.0).accepts(statistics).all()
    assert judge(0.5).head.scores(hidden).equal(scores)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"weight": torch.zeros(8)}, "a judge is 'weight' \\[hidden\\] and 'bias' \\[1\\]"),
        ({"weight": torch.zeros(1, 8), "bias": torch.zeros(1)}, "holds"),
        ({"weight": torch.zeros(8), "bias": torch.zeros(2)}, "holds"),
        (None, "is no safetensors file or cut short"),
    ],
)
def test_what_is_no_head_is_refused(tmp_path, tensors, words):
    path = tmp_path / "file"
    if tensors is None:
        path.write_bytes(b"nothing of the kind")
    else:
        save_file(tensors, path)
    with pytest.raises(ValueError, match=words):
        parse(config(str(path)))
    with pytest.raises(ValueError, match="is not a file"):
        parse(config(str(tmp_path / "nowhere")))


def written(path, told: dict[str, str]) -> str:
    save_file({"weight": torch.ones(8), "bias": torch.zeros(1)}, path, metadata=told)
    return str(path)


def test_a_head_says_what_it_reads_and_from_where_it_accepts(tmp_path, head):
    """The user's threshold comes first, then the head's, then the paper's."""
    assert (read_head(head).before_norm, read_head(head).threshold) == (False, 0.5)
    path = written(tmp_path / "told", {"states": "before_norm", "threshold": "0.875"})
    assert (read_head(path).before_norm, read_head(path).threshold) == (True, 0.875)
    assert parse(config(path)).acceptance.reads_before_norm
    assert not parse(config(head)).acceptance.reads_before_norm
    made = relaxed.Judge(head=path, threshold=None, device=torch.device("cpu"))
    own = relaxed.Judge(head=path, threshold=0.6, device=torch.device("cpu"))
    # sigmoid(1) and sigmoid(2) are .73 and .88
    for rule, right in ((made, [False, True]), (own, [True, True])):
        scores = rule.head.scores(torch.tensor([[1.0], [2.0]]) / 8 * torch.ones(8))
        assert (scores.numpy() > rule._threshold).tolist() == right


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"states": "between"}, "reads states 'between' .allowed: before_norm, after_norm"),
        ({"threshold": "1.5"}, "has the threshold '1.5': it must be in .0, 1."),
        ({"threshold": "high"}, "has the threshold 'high'"),
        ({"threshold": "nan"}, "has the threshold 'nan'"),
    ],
)
def test_what_a_head_says_must_make_sense(tmp_path, told, words):
    with pytest.raises(ValueError, match=words):
        parse(config(written(tmp_path / "head", told)))


def test_a_head_before_the_norm_wants_a_target_that_hands_it_out(tmp_path):
    path = written(tmp_path / "head", {"states": "before_norm"})
    parse(config(path)).check_acceptance(target(hidden_size=8))
    with pytest.raises(ValueError, match="which vLLM does not hand out of a target of type"):
        parse(config(path)).check_acceptance(target(hidden_size=8, gives_layers=lambda: False))


def config(head: str, **keys) -> dict:
    acceptance = {"rule": "judge", "head": head} | keys
    return {"method": "token_recycling", "allow_lossy": True, "acceptance": acceptance}


def test_the_head_has_to_fit_the_target(head):
    assert head_size(head) == 8
    parse(config(head)).check_acceptance(target(hidden_size=8))
    with pytest.raises(ValueError, match="reads 8 hidden units, and the target has 576"):
        parse(config(head)).check_acceptance(target(hidden_size=576))
    assert not parse(config(head)).lossless
    with pytest.raises(ValueError, match="changes what is answered"):
        parse(config(head) | {"allow_lossy": False})
