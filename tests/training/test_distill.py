"""Distilling a small draft: a tiny pair, who writes what, where it learns, what is served."""

from __future__ import annotations

import json

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from tests.drafting.test_drafting import VOCAB, save_draft
from tests.training.tiny import CPU, batch_of, fit, save_target, setup, some_texts
from vllm_specplus.cli import model as cli_model
from vllm_specplus.cli.model import prepare_draft
from vllm_specplus.config import parse
from vllm_specplus.drafting.model import DraftModel
from vllm_specplus.training.cost_model import Shape
from vllm_specplus.training.errors import TrainingError
from vllm_specplus.training.losses import Rows
from vllm_specplus.training.recipes.distill import Distill, Settings, build, narrowed, work
from vllm_specplus.training.texts import Text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_target(tmp_path_factory.mktemp("target"))


def made(folder, texts=(), dtype=torch.float32, **settings) -> Distill:
    return build(folder, Settings(**settings), setup(texts, dtype))


@pytest.mark.slow
def test_a_draft_of_two_layers_learns_ten_texts_by_heart(folder):
    """And how it says so: with the figures of texts that it has not learnt."""
    texts, unseen = some_texts(10), some_texts(10, seed=1)
    recipe = made(folder, texts)
    before = recipe.measure(texts)
    fit(recipe, texts, 700, rate=3e-3)
    after = recipe.measure(texts)
    assert before.tvd_acceptance < 0.6
    assert after.tvd_acceptance > 0.95
    assert after.greedy_acceptance > 0.95
    assert after.by_depth[0].rate > 0.95
    assert recipe.measure(unseen).tvd_acceptance < 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_few_steps_are_in_the_right_direction(folder, dtype):
    texts = some_texts(16)
    recipe = made(folder, texts, dtype, intermediate_size=64)
    frozen = {name: each.clone() for name, each in recipe.target.model.state_dict().items()}
    before, losses = recipe.measure(texts), []
    fit(recipe, texts, 40, seen=lambda figures: losses.append(figures["loss"]))
    after = recipe.measure(texts)
    assert after.tvd_acceptance > before.tvd_acceptance + 0.05
    assert losses[20] < losses[0]
    assert all(each.equal(frozen[name]) for name, each in recipe.target.model.state_dict().items())
    assert all(name.startswith("model.") for name in recipe.state())


@pytest.mark.parametrize("loss", ["reverse_kl", "jensen_shannon", "acceptance", {"soft_ce": 1.0}])
def test_any_divergence_leads_there(folder, loss):
    texts = some_texts(8)
    recipe = made(folder, texts, loss=loss, finish_share=0.0)
    before = recipe.measure(texts).tvd_acceptance
    fit(recipe, texts, 40)
    assert recipe.measure(texts).tvd_acceptance > before


def test_a_step_is_the_mean_over_what_is_to_be_learnt(folder):
    """Prompts and padding teach nothing, and the gradient is that of the plain formula."""
    texts = [text for length in (9, 20) for text in some_texts(2, length)]
    recipe = made(folder, texts)
    batch = batch_of(texts)
    figures = recipe.step(batch, 0.0, torch.Generator())
    found = [each.grad.clone() for each in recipe.parameters()]
    for each in recipe.parameters():
        each.grad = None
    total = 0.0
    count = sum(len(text.tokens) - text.start for text in texts)
    for text in texts:
        tokens = torch.tensor([text.tokens])
        p = recipe.target.model(tokens).logits[0, text.start - 1 : -1].softmax(-1)
        log_q = recipe.draft.model(tokens).logits[0, text.start - 1 : -1].log_softmax(-1)
        total = total + (p * (p.log() - log_q)).sum() / count
    total.backward()
    assert figures["loss"] == pytest.approx(total.item(), rel=1e-4)
    torch.testing.assert_close(
        found, [each.grad for each in recipe.parameters()], atol=1e-5, rtol=1e-3
    )


def test_steps_repeat_from_a_checkpoint(folder):
    texts = some_texts(6)
    first = made(folder, texts)
    fit(first, texts, 3)
    second = made(folder, texts)
    second.load_state({name: each.clone() for name, each in first.state().items()})
    batch = batch_of(texts)
    figures = [each.step(batch, 0.5, torch.Generator()) for each in (first, second)]
    assert figures[0] == figures[1]
    assert [each.shape for each in first.parameters()] == [
        each.shape for each in second.parameters()
    ]


# -- where it learns ------------------------------------------------------------------------


class Rowwise:
    """A draft whose states at position i say i, in place of a model's."""

    def __init__(self, recipe: Distill):
        self.vocab_size = recipe.draft.vocab_size
        self.seen: list[int] = []

    def read(self, tokens, mask):
        width = tokens.shape[1]
        states = torch.eye(width, self.vocab_size)[None].expand(len(tokens), -1, -1)
        return states.clone().requires_grad_()

    def output(self, states):
        self.seen += states.argmax(-1).tolist()
        return states * 1.0


def test_rejected_positions_are_learnt_at_the_row_that_was_wrong(folder):
    """Tokens 6 and 9 took the place of rejected ones (OSD notes 6 and 9, whose rows predict 7 and
    10); with the whole text every row counts."""
    labels = tuple(-1 if i < 4 else 0 if i in (6, 9) else 1 for i in range(12))
    text = Text("a", tuple(range(12)), 4, "traffic", labels)
    for positions, expected in (("rejected", [5, 8]), ("all", list(range(3, 11)))):
        recipe = made(folder, [text], positions=positions)
        recipe.draft = Rowwise(recipe)
        figures = recipe.step(batch_of([text]), 0.0, torch.Generator())
        assert recipe.draft.seen == expected
        assert figures["learnt"] == len(expected) / 8


def test_a_batch_without_rejections_teaches_nothing(folder):
    text = Text("a", tuple(range(12)), 4, "traffic", (-1,) * 4 + (1,) * 7 + (0,))
    recipe = made(folder, [text], positions="rejected")
    figures = recipe.step(batch_of(some_texts(2)), 0.0, torch.Generator())
    assert figures == {"loss": 0.0, "learnt": 0.0}
    assert not any(each.grad.any() for each in recipe.parameters())


def test_beside_a_reference_the_worst_positions_are_learnt(folder, tmp_path):
    """AdaSPEC's selection by the plain formula; everything, if all is kept."""
    texts = some_texts(6)
    reference = made(folder, texts)
    fit(reference, texts, 20)
    out = tmp_path / "reference"
    out.mkdir()
    reference.export(out)
    recipe = made(folder, texts, reference=str(out), keep=0.4)
    batch = batch_of(texts)
    figures = recipe.step(batch, 0.0, torch.Generator())
    losses = []
    for model in (recipe.draft.model, reference.draft.model):
        with torch.no_grad():
            target = recipe.target.model(batch.tokens, attention_mask=batch.mask.long()).logits
            draft = model(batch.tokens, attention_mask=batch.mask.long()).logits
        p, log_q = target[batch.learn].softmax(-1), draft[batch.learn].log_softmax(-1)
        losses.append((p * (p.log() - log_q)).sum(-1))
    own, theirs = losses
    delta = own - theirs
    chosen = delta >= delta.quantile(0.6)
    assert figures["learnt"] == pytest.approx(float(chosen.float().mean()))
    assert figures["loss"] == pytest.approx(float(own[chosen].sum() / len(own)), rel=1e-4)
    everything = made(folder, texts, reference=str(out), keep=1.0).step(
        batch, 0.0, torch.Generator()
    )
    plain = made(folder, texts).step(batch, 0.0, torch.Generator())
    assert everything["loss"] == pytest.approx(plain["loss"], rel=1e-6)


# -- who writes -----------------------------------------------------------------------------


def test_the_runs_texts_are_those_of_the_target(folder):
    assert made(folder).texts_for(0, some_texts(3)) is None


@pytest.mark.parametrize("source", ["draft", "mix_sequence", "mix_token"])
def test_a_draft_writes_behind_the_same_prompts(folder, source):
    texts = some_texts(24)
    recipe = made(folder, texts, source=source, answer_tokens=5)
    written = recipe.texts_for(0, texts)
    assert sorted(text.id for text in written) == sorted(text.id for text in texts)
    before = {text.id: text for text in texts}
    assert all(text.tokens[:4] == before[text.id].tokens[:4] for text in written)
    anew = [text for text in written if text is not before[text.id]]
    assert all(len(text.tokens) == 9 and text.writer == "draft" for text in anew)
    assert (0 < len(anew) < 24) if source == "mix_sequence" else len(anew) == 24
    # It is the same in a run that is done again, and other texts in the next epoch.
    assert recipe.texts_for(0, texts) == written
    assert recipe.texts_for(1, texts) != written


def test_what_is_written_follows_the_drafts_distribution(folder):
    """At temperature 0 its best tokens; the target's differ."""
    texts = some_texts(8)
    recipe = made(folder, texts, source="draft", answer_tokens=3, temperature=0.0)
    others = 0
    for text in recipe.texts_for(0, texts):
        tokens = list(text.tokens)
        for i in range(4, 7):
            with torch.no_grad():
                best = recipe.draft.model(torch.tensor([tokens[:i]])).logits[0, -1].argmax()
                target = recipe.target.model(torch.tensor([tokens[:i]])).logits[0, -1].argmax()
            assert tokens[i] == best
            others += int(target != best)
    assert others > 3


def test_in_bfloat16_a_draft_writes_as_well(folder):
    texts = some_texts(3)
    recipe = made(folder, texts, torch.bfloat16, source="mix_token", answer_tokens=4)
    written = recipe.texts_for(0, texts)
    recipe.step(batch_of(written), 0.0, torch.Generator())
    assert all(torch.isfinite(each.grad).all() for each in recipe.parameters())


# -- what it starts from, and what is served ------------------------------------------------


def test_layers_and_neurons_are_the_targets(folder):
    recipe = made(folder, layers=[2, 0], intermediate_size=40)
    target, draft = recipe.target, recipe.draft
    for new, old in zip(draft.layers, (2, 0), strict=True):
        assert new.self_attn.q_proj.weight.equal(target.layers[old].self_attn.q_proj.weight)
        mlp = target.layers[old].mlp
        weight = (
            mlp.gate_proj.weight.norm(dim=1) * mlp.up_proj.weight.norm(dim=1)
            * mlp.down_proj.weight.norm(dim=0)
        )  # fmt: skip
        best = sorted(weight.argsort(descending=True)[:40].tolist())
        assert new.mlp.up_proj.weight.equal(mlp.up_proj.weight[best])
        assert new.mlp.down_proj.weight.equal(mlp.down_proj.weight[:, best])
    assert draft.output_weight is target.output_weight
    whole = target.layers[0].state_dict()
    assert narrowed(whole, None) is whole


def test_another_model_may_be_the_start(folder, tmp_path):
    """All of it learns, its output layer too."""
    small = save_draft(tmp_path / "small", layers=1)
    texts = some_texts(8)
    recipe = made(folder, texts, draft=small)
    before = {name: each.clone() for name, each in recipe.state().items()}
    assert any("lm_head" in name for name in before)
    at_first = recipe.measure(texts).tvd_acceptance
    fit(recipe, texts, 20)
    assert all(not each.equal(before[name]) for name, each in recipe.state().items())
    assert recipe.measure(texts).tvd_acceptance > at_first
    out = tmp_path / "out"
    out.mkdir()
    recipe.export(out)
    assert not (out / "own").exists()


def test_what_is_written_is_a_draft_model(folder, tmp_path):
    """Read by our loader and by transformers: the logits are those of the draft in training."""
    from transformers import AutoModelForCausalLM

    (folder / "tokenizer_config.json").write_text("{}")
    recipe = made(folder, intermediate_size=40)
    fit(recipe, some_texts(4), 3)
    out = tmp_path / "result"
    out.mkdir()
    recipe.export(out)
    (folder / "tokenizer_config.json").unlink()
    assert (out / "tokenizer_config.json").exists()
    assert parse({"method": "draft_tree", "model": str(out)}).model == str(out)
    tokens = torch.tensor([some_texts(1)[0].tokens])
    with torch.no_grad():
        expected = recipe.draft.model(tokens).logits
        loaded = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        torch.testing.assert_close(loaded(tokens).logits, expected)
    served = DraftModel(str(out), CPU, torch.float32)
    assert served.num_layers == 2
    own = load_file(out / "own" / "layers.safetensors")
    assert set(own) == set(recipe.state())
    assert own["model.norm.weight"].equal(loaded.model.norm.weight)
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"


def test_a_layers_mlp_may_not_be_cut():
    with pytest.raises(TrainingError, match="leave it out"):
        narrowed({"mlp.gate_up_proj.weight": torch.zeros(4, 2)}, 2)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"layers": [0, 3]}, "'layers' is \\[0, 3\\], and the target has 3"),
        ({"intermediate_size": 97}, "the target's MLPs have 96 neurons"),
        ({"positions": "rejected"}, "no text says where that was"),
        ({"draft": "nowhere"}, "is no Hugging Face folder"),
        ({"reference": "nowhere"}, "reference 'nowhere' is no Hugging Face folder"),
    ],
)
def test_what_does_not_fit_the_target(folder, settings, words):
    with pytest.raises(TrainingError, match=words):
        made(folder, some_texts(2), **settings)


def test_a_draft_of_another_vocabulary(folder, tmp_path):
    other = save_draft(tmp_path, vocab=VOCAB + 1)
    with pytest.raises(TrainingError, match="has 97 token ids, the target 96"):
        made(folder, draft=other)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"loss": "kl"}, "unknown loss 'kl'"),
        ({"finish_loss": {"smooth_l1": 1.0}}, "compares hidden states"),
        ({"draft": "a", "layers": [0]}, "leave out one or the other"),
        ({"keep": 0.0}, "keep"),
        ({"source": "elsewhere"}, "source"),
    ],
)
def test_settings_that_make_no_sense(settings, words):
    with pytest.raises(ValidationError, match=words):
        Settings(**settings)


def test_what_it_costs(folder, tmp_path):
    shape = Shape(3, 64, 96, 4, 2, 16, VOCAB, False)
    recipe = made(folder, intermediate_size=40)
    trained = sum(each.numel() for each in recipe.parameters())
    norms = (2 * 2 + 1) * 64
    assert work(shape, Settings(intermediate_size=40)).trained == trained - norms
    assert work(shape, Settings()).target_layers == 0
    on_policy = work(shape, Settings(source="mix_sequence", draft_share=0.25))
    assert (on_policy.target_layers, on_policy.draft_written) == (3, 0.25)
    small = made(folder, draft=save_draft(tmp_path, layers=1))
    counted = work(shape, Settings(draft=str(tmp_path))).trained
    assert counted == pytest.approx(sum(each.numel() for each in small.parameters()), rel=0.01)


def test_rows_leave_out_tokens_that_only_one_of_them_has(folder):
    """Models pad their vocabularies differently."""
    recipe = made(folder)
    recipe._vocab = VOCAB - 6
    batch = batch_of(some_texts(1))
    rows = recipe._rows(batch, batch.learn)(slice(0, 5), torch.zeros(5, 64))
    assert isinstance(rows, Rows)
    assert rows.target_logits.shape == rows.draft_logits.shape == (5, VOCAB - 6)
    assert rows.labels.tolist() == list(some_texts(1)[0].tokens[4:9])


def test_the_embedded_draft_fits_its_target(tmp_path, monkeypatch):
    target = tmp_path / "target"
    target.mkdir()
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 49152,
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
        "max_position_embeddings": 2048,
    }  # fmt: skip
    (target / "config.json").write_text(json.dumps(config))
    embedding = torch.randn(49152, 576, dtype=torch.bfloat16)
    save_file({"model.embed_tokens.weight": embedding}, target / "model.safetensors")
    folder = prepare_draft(target)
    assert prepare_draft(target) == folder
    model = DraftModel(str(folder), torch.device("cpu"), torch.bfloat16, head_tokens=1000)
    assert model.num_layers == 2
    assert model.logits(model.embed(torch.tensor([[5]]))).shape == (1, 1, 1000)
    assert torch.equal(model.embed(torch.tensor([[7]]))[0, 0], embedding[7])
    # Layers of another version do not meet the folder of these.
    other = load_file(cli_model.DRAFT_LAYERS)
    other["model.norm.weight"] = other["model.norm.weight"] + 1
    monkeypatch.setattr(cli_model, "DRAFT_LAYERS", tmp_path / "other.safetensors")
    save_file(other, cli_model.DRAFT_LAYERS)
    assert prepare_draft(target) != folder
