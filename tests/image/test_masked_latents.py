"""Masked models of latents: what each way of verifying keeps of the target's law."""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from tests.image.test_continuous import SCHEDULE, ToyHead, p_value, settings
from vllm_specplus.image.continuous.chain import Schedule, denoise
from vllm_specplus.image.continuous.decoding import noise_of
from vllm_specplus.image.continuous.masked import (
    Guidance,
    MaskedConfig,
    MaskedLatents,
    MaskedSpeculation,
    decode_masked,
    decode_masked_speculative,
    known_latents,
    orders,
)


@pytest.mark.parametrize("length", [1, 2, 3, 16, 64, 256])
def test_the_schedule_is_the_cosine_and_never_idle(length):
    for iterations in {1, max(length // 3, 1), length}:
        known = known_latents(length, iterations)
        assert len(known) == iterations + 1
        assert (known[0], known[-1]) == (0, length)
        assert all(a < b for a, b in pairwise(known))
    assert known_latents(256, 64)[32] == 256 - math.floor(256 * math.cos(math.pi / 4))
    with pytest.raises(ValueError, match="has 1 to 4"):
        known_latents(4, 5)


def test_orders_are_permutations_of_the_seed():
    both = orders([5, 6], 20)
    assert torch.equal(both.sort(1).values, torch.arange(20).expand(2, -1))
    assert torch.equal(both[1:], orders([6], 20))
    assert not torch.equal(both[0], both[1])


def test_the_defaults_are_mar_b():
    """208 million parameters, and the names of the checkpoint's parts."""
    with torch.device("meta"):
        model = MaskedLatents(MaskedConfig())
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(208e6, rel=0.01)
    names = set(model.state_dict())
    assert {
        "class_emb.weight", "fake_latent", "z_proj_ln.bias", "mask_token",
        "encoder_blocks.11.attn.qkv.bias", "decoder_blocks.0.mlp.fc2.weight",
        "encoder_pos_embed_learned", "diffusion_pos_embed_learned",
        "diffloss.net.res_blocks.5.adaLN_modulation.1.weight",
    } <= names  # fmt: skip
    assert model.state_dict()["decoder_pos_embed_learned"].shape == (1, 64 + 256, 768)


def toy(offset: float = 0.0, fraction: float = 0.0) -> SimpleNamespace:
    """Every latent depends on the sum of those that are known."""

    def conditions(latents, known, labels):
        total = (latents * known[..., None]).sum(1, keepdim=True)
        return (1 + torch.sin(2 * total)).expand_as(latents)

    return SimpleNamespace(conditions=conditions, head=ToyHead(offset, fraction))


PICTURES = 6000


def plain_law(iterations: int, seed: int = 10**6):
    labels, seeds = torch.zeros(PICTURES).long(), [seed + i for i in range(PICTURES)]
    latents = decode_masked(toy(0.0, 0.5), labels, seeds, settings(3, 1), iterations)
    return in_order(latents, seeds)


def in_order(latents, seeds):
    """[n, 3] as they became known, so that laws can be compared."""
    return latents[..., 0].gather(1, orders(seeds, 3))


def speculative_law(contexts: str, window: int, steps: int | None = None):
    labels, seeds = torch.zeros(PICTURES).long(), list(range(PICTURES))
    out, counts = decode_masked_speculative(
        toy(0.0, 0.5), toy(0.5, -0.9), labels, seeds, settings(3, 1), 3,
        MaskedSpeculation(window, contexts, steps=steps),
    )  # fmt: skip
    assert 0.1 < counts.acceptance < 0.95
    return in_order(out, seeds)


@pytest.mark.parametrize("steps", [None, 2])
def test_own_contexts_keep_the_targets_law(steps):
    assert p_value(speculative_law("own", 2, steps), plain_law(3)) > 1e-3


def test_guidance_grows_with_what_is_known():
    """MAR's linear schedule, by the share known after the iteration."""
    assert [Guidance(3.0).at(share) for share in (0.25, 0.5, 1.0)] == [1.5, 2.0, 3.0]
    assert Guidance(3.0, "constant").at(0.25) == 3.0


def test_guided_pictures_are_those_of_mixed_heads():
    """Against the formula; and a draft that is the target is kept."""
    model, labels, seeds = small(spread=0.3), torch.tensor([0, 1, 2, 0]), [1, 2, 3, 4]
    how = settings(9, 4, Schedule(3, end=250, prediction="velocity"))
    guidance = Guidance(2.5)
    known, latents = known_latents(9, 3), torch.zeros(4, 9, 4)
    order, noise = orders(seeds, 9), noise_of(seeds, how)
    for i in range(3):
        seen = order.argsort(1) < known[i]
        says = [model.conditions(latents, seen, each) for each in (labels, torch.full((4,), -1))]
        scale = 1 + 1.5 * known[i + 1] / 9

        def mixed(x, times, condition, scale=scale):
            label, other = condition.chunk(2, -1)
            said, fraction = model.head(x, times, label)
            without, _ = model.head(x, times, other)
            return without + scale * (said - without), fraction

        for b in range(4):
            for n in order[b, known[i] : known[i + 1]].tolist():
                both = torch.cat([each[b, n] for each in says])[None]
                own = noise[torch.tensor([b]), torch.tensor([n])]
                latents[b, n] = denoise(mixed, how.schedule, both, own).sample[0]
    made = decode_masked(model, labels, seeds, how, 3, guidance)
    torch.testing.assert_close(made, latents, atol=1e-3, rtol=1e-4)
    assert not torch.allclose(made, decode_masked(model, labels, seeds, how, 3), atol=1e-2)
    same, counts = decode_masked_speculative(
        model, model, labels, seeds, how, 3, MaskedSpeculation(2), guidance
    )
    torch.testing.assert_close(same, made, atol=1e-3, rtol=1e-4)
    assert int(counts.rejected.sum()) == 0


def test_shared_contexts_have_the_law_of_fewer_iterations():
    out = speculative_law("shared", 3)
    assert p_value(out, plain_law(1)) > 1e-3
    assert p_value(out, plain_law(3)) < 1e-6


def small(seed: int = 0, depth: int = 1, spread: float = 0.15) -> MaskedLatents:
    torch.manual_seed(seed)
    model = MaskedLatents(
        MaskedConfig(
            length=9, size=4, num_classes=3, encoder_width=16, encoder_depth=depth,
            encoder_heads=2, decoder_width=16, decoder_depth=depth, decoder_heads=2,
            buffer_size=2, head_width=16, head_depth=1,
        )
    )  # fmt: skip
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=spread)
    return model.eval()


def test_conditions_see_known_latents_and_the_label_alone():
    model, latents = small(), torch.randn(2, 9, 4)
    known = torch.zeros(2, 9, dtype=torch.bool)
    known[0, [1, 5]] = known[1, [0, 8]] = True
    labels = torch.tensor([0, -1])
    one = model.conditions(latents, known, labels)
    other = torch.where(known[..., None], latents, torch.randn(2, 9, 4))
    assert torch.equal(one, model.conditions(other, known, labels))
    assert not torch.equal(one, model.conditions(-latents, known, labels))
    assert not torch.equal(one, model.conditions(latents, known, torch.tensor([1, 2])))
    alone = model.conditions(latents[1:], known[1:], labels[1:])
    torch.testing.assert_close(alone[0], one[1])


@pytest.mark.parametrize("contexts", ["own", "shared"])
def test_a_draft_that_is_the_target_is_accepted_in_its_own_contexts(contexts):
    model, labels, seeds = small(), torch.tensor([0, 1, 2, -1]), [3, 4, 5, 6]
    how = settings(9, 4, Schedule(4, end=300, prediction="velocity"))
    plain = decode_masked(model, labels, seeds, how, 5)
    out, counts = decode_masked_speculative(
        model, model, labels, seeds, how, 5, MaskedSpeculation(2, contexts)
    )
    if contexts == "own":
        torch.testing.assert_close(out, plain, atol=1e-4, rtol=1e-4)
        assert counts.acceptance == 1
        assert counts.target_passes.tolist() == [5] * 4
    else:
        assert counts.target_passes.tolist() == [3] * 4
        assert counts.drafted.tolist() == [9] * 4
        assert counts.judged_at.tolist() == [4] * 9
        assert int(counts.accepted_at.sum()) == int(counts.accepted.sum())


@pytest.mark.parametrize("contexts", ["own", "shared"])
def test_a_masked_picture_does_not_depend_on_its_batch(contexts):
    target, draft = toy(), toy(0.8, -0.3)
    labels, seeds = torch.zeros(6).long(), list(range(40, 46))
    how, speculation = settings(12, 1, SCHEDULE), MaskedSpeculation(3, contexts, prefill=1)
    together, _ = decode_masked_speculative(target, draft, labels, seeds, how, 8, speculation)
    for i in range(6):
        alone, _ = decode_masked_speculative(
            target, draft, labels[:1], seeds[i : i + 1], how, 8, speculation
        )
        torch.testing.assert_close(alone[0], together[i])


def test_impossible_windows_are_refused():
    with pytest.raises(ValueError, match="window=0"):
        MaskedSpeculation(0)
