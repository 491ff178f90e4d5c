"""The target of a run, against transformers' own forward pass."""

from __future__ import annotations

import json

import pytest
import torch

from tests.training.tiny import CPU, batch_of, save_target, some_texts
from vllm_specplus.training import frozen as frozen_module
from vllm_specplus.training.errors import TrainingError
from vllm_specplus.training.frozen import Frozen
from vllm_specplus.training.texts import Text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_target(tmp_path_factory.mktemp("target"))


@pytest.fixture
def target(folder) -> Frozen:
    return Frozen.load(folder, CPU, torch.float32)


def test_states_are_transformers_own(target):
    texts = some_texts(3)
    states = target.states(batch_of(texts), (0, 2))
    assert states.last.shape == (3, 26, 64)
    assert states.layers.shape == (3, 26, 128)
    for row, text in enumerate(texts):
        with torch.no_grad():
            out = target.model(torch.tensor([text.tokens]), output_hidden_states=True)
        length = len(text.tokens)
        entering = torch.cat((out.hidden_states[0], out.hidden_states[2]), -1)
        torch.testing.assert_close(states.last[row, :length], out.hidden_states[-1][0])
        torch.testing.assert_close(states.layers[row, :length], entering[0])
        torch.testing.assert_close(target.output(states.last[row, :length]), out.logits[0])
        assert not states.last[row, length:].any()
    assert target.states(batch_of(texts)).layers is None


def test_what_a_text_is_does_not_depend_on_its_neighbours(folder):
    """Bit for bit, also in bfloat16, whether it is kept or not."""
    texts = some_texts(4)
    for dtype in (torch.float32, torch.bfloat16):
        alone = Frozen.load(folder, CPU, dtype).states(batch_of(texts[:1])).last
        target = Frozen.load(folder, CPU, dtype)
        together = target.states(batch_of(texts)).last
        assert alone.dtype is dtype
        assert together[0, :24].equal(alone[0])
        assert target.states(batch_of(texts)).last.equal(together)


def test_texts_are_kept_as_far_as_there_is_room(target, monkeypatch):
    texts = some_texts(3)
    runs = []
    read = target.outputs
    monkeypatch.setattr(target, "outputs", lambda *a, **k: runs.append(1) or read(*a, **k))
    target._room = 2 * 26 * 64 * 4  # two of the three
    first = target.states(batch_of(texts)).last
    assert len(runs) == 3
    assert target.states(batch_of(texts)).last.equal(first)
    assert len(runs) == 4
    assert frozen_module.KEPT > 1 << 30


def test_what_a_draft_wrote_is_let_go(target):
    own = some_texts(1)
    drafted = [Text("d", (1, 2, 3), 1, "draft")]
    room = target._room
    target.states(batch_of(own))
    left = target._room
    target.states(batch_of(drafted))
    assert target._room < left < room
    target.forget_drafted()
    assert target._room == left


def test_left_early_it_is_a_smaller_model(target):
    """As transformers says after so many layers, by the same norm and output layer; and the whole
    is as it was."""
    tokens = torch.tensor([some_texts(1)[0].tokens])
    with torch.no_grad():
        out = target.model(tokens, output_hidden_states=True)
        early = target.after(2).read(tokens)
        torch.testing.assert_close(early, target.model.model.norm(out.hidden_states[2]))
        torch.testing.assert_close(target.read(tokens), out.hidden_states[-1])


def test_nothing_of_it_is_trained(target):
    assert not any(each.requires_grad for each in target.model.parameters())
    assert not target.states(batch_of(some_texts(1))).last.requires_grad


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "mamba"}, "is of type 'mamba' \\(allowed: arcee"),
        ({"quantization_config": {"bits": 4}}, "is quantized: name its unquantized original"),
        ({"vocab_size": "many"}, "'vocab_size' 'many': it must be a whole number above 0"),
    ],
)
def test_what_is_no_target_is_told_in_a_sentence(folder, tmp_path, change, words):
    config = json.loads((folder / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(TrainingError, match=words):
        Frozen.load(tmp_path, CPU, torch.float32)


def test_weights_that_are_missing_or_cut_short(folder, tmp_path):
    with pytest.raises(TrainingError, match="is no Hugging Face folder"):
        Frozen.load(tmp_path, CPU, torch.float32)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    with pytest.raises(TrainingError, match="cannot be loaded"):
        Frozen.load(tmp_path, CPU, torch.float32)
    weights = (folder / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(TrainingError, match="cannot be loaded"):
        Frozen.load(tmp_path, CPU, torch.float32)


def test_layers_that_it_has_not_got(target):
    with pytest.raises(TrainingError, match="they count from 0 on"):
        target.states(batch_of(some_texts(1)), (4,))


def test_what_leaves_the_last_layer_is_what_the_norm_reads(target):
    """It is one more, as vLLM counts; behind the norm it is the last state."""
    batch = batch_of(some_texts(2))
    read = target.states(batch, (1, 3))
    assert read.layers.shape[-1] == 2 * target.hidden_size
    before = read.layers[..., target.hidden_size :]
    here = batch.mask
    torch.testing.assert_close(target.body.norm(before)[here], read.last[here])
    assert not torch.allclose(before[here], read.last[here])
