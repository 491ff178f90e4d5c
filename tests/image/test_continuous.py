"""Continuous speculative decoding: closed forms, and the law of what comes out."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy import stats

from vllm_specplus.image.continuous import head
from vllm_specplus.image.continuous.acceptance import (
    log_ratio,
    log_weight,
    residual,
    streams_of,
)
from vllm_specplus.image.continuous.causal import CausalLatents, CausalLatentsConfig
from vllm_specplus.image.continuous.chain import Chain, Noise, Schedule, denoise, picture_noise
from vllm_specplus.image.continuous.decoding import (
    Guided,
    GuidedHead,
    Recompute,
    Settings,
    Speculation,
    decode,
    decode_speculative,
)


def gaussian(mean: float, sigma: float, normal: torch.Tensor) -> Chain:
    """Chains of one step, [n, d]."""
    means = torch.full_like(normal, mean)
    logs = torch.full_like(normal, math.log(sigma))
    return Chain(means + sigma * normal, means, logs, torch.zeros(len(normal)))


def streams(count: int) -> list[np.random.Generator]:
    return streams_of(range(count), [0] * count)


@pytest.mark.parametrize(
    ("mean", "sigma", "accepted", "rounds"),
    [(0.5, 1.0, 0.8026, 5.07), (1.0, 1.0, 0.617, 2.60), (0.5, 1.2, 0.807, 5.18)],
)
def test_one_step_has_the_closed_forms_of_the_card(mean, sigma, accepted, rounds):
    torch.manual_seed(0)
    count = 100_000
    normal = torch.randn(count, 1)
    draft, target = gaussian(mean, sigma, normal), gaussian(0.0, 1.0, normal)
    taken = torch.rand(count).log() < log_ratio(draft, target)
    assert taken.float().mean() == pytest.approx(accepted, abs=0.005)
    instead = residual(draft[~taken], target[~taken], streams(int((~taken).sum())))
    assert instead.proposals.float().mean() == pytest.approx(rounds, rel=0.03)
    assert not instead.given_up.any()
    out = draft.sample.clone()
    out[~taken] = instead.sample
    assert stats.kstest(out[:, 0].numpy(), "norm").pvalue > 1e-3


def test_a_residual_that_is_never_found_ends_and_says_so():
    same = gaussian(0.0, 1.0, torch.randn(3, 2))
    instead = residual(same, same, streams(3))
    assert instead.given_up.all()
    assert (instead.proposals == 64 * 64).all()
    assert instead.sample.isfinite().all()


def signal(steps: int) -> float:
    """What ``steps`` trained steps leave of the data's variance (arXiv 2102.09672)."""
    curve = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in (steps, 0)]
    return curve[0] / curve[1]


@dataclass
class ToyHead:
    """Knows data N(condition + offset, spread^2) exactly; ``fraction`` sets the sigmas."""

    offset: float
    fraction: float
    spread: float = 0.5

    def __call__(self, x, times, condition):
        level = signal(int(times[0]) + 1)
        centred = x - math.sqrt(level) * (condition + self.offset)
        noise = centred * math.sqrt(1 - level) / (level * self.spread**2 + 1 - level)
        return noise, torch.full_like(x, self.fraction)


class ToyModel:
    """A latent depends on the one before it and on the label."""

    def __init__(self, offset: float = 0.0, fraction: float = 0.0):
        self.head = ToyHead(offset, fraction)

    def begin(self, labels, length):
        return Recompute(self, labels)

    def conditions(self, latents, labels):
        label = labels.float()[:, None, None].expand(-1, 1, latents.shape[2])
        return torch.cat((label, torch.sin(2 * latents)), 1)


SCHEDULE = Schedule(4, end=300)


def test_weight_is_the_ratio_of_the_sigmas_on_the_way():
    """(a/b)^(d (T-1)) for constant sigmas a of the draft and b of the target."""
    size, steps = 3, 5
    a, b = 0.7, 0.9
    path = [(steps - 1) * size * math.log(sigma) for sigma in (a, b)]
    one = gaussian(0.0, 1.0, torch.randn(1, size))
    draft, target = (
        Chain(one.sample, one.mean, one.log_sigma, torch.tensor([value])) for value in path
    )
    wanted = size * (steps - 1) * math.log(a / b)
    assert float(log_weight(draft, target, "paper")) == pytest.approx(wanted, rel=1e-5)
    assert float(log_weight(draft, target, "reference")) == pytest.approx(-wanted, rel=1e-5)
    assert float(log_weight(draft, target, "exact")) == 0


def test_chains_sum_their_log_sigmas_but_the_last():
    head, noise = ToyHead(0.0, -0.5), picture_noise(0, 6, SCHEDULE.steps, 2)
    chain = denoise(head, SCHEDULE, torch.zeros(6, 2), noise)
    x, path = noise.start, 0.0
    for i in range(SCHEDULE.steps):
        mean, log_sigma = SCHEDULE.step(
            i, x, *head(x, SCHEDULE.times[i : i + 1], torch.zeros(6, 2))
        )
        x = mean + log_sigma.exp() * noise.steps[:, i]
        path = path + log_sigma.sum(-1) if i < SCHEDULE.steps - 1 else path
    torch.testing.assert_close(chain.sample, x)
    torch.testing.assert_close(chain.path_log_sigma, path)
    torch.testing.assert_close(chain.mean, mean)


def test_shared_noise_brings_samples_closer():
    """By 2 tr((C C')^(1/2)) in expected squared distance, for one step."""
    torch.manual_seed(1)
    count, size, a, b = 200_000, 4, 0.6, 1.1
    normal, other = torch.randn(2, count, size)
    draft = gaussian(0.3, a, normal)
    shared = (draft.sample - gaussian(0.0, b, normal).sample).square().sum(-1).mean()
    apart = (draft.sample - gaussian(0.0, b, other).sample).square().sum(-1).mean()
    assert float(apart - shared) == pytest.approx(2 * size * a * b, rel=0.02)


@pytest.mark.parametrize("end", [0, 200])
def test_a_chain_of_the_true_noise_ends_at_the_data(end):
    """Data N(0, 0.5^2), whose best prediction of the noise is linear; after ``end`` trained
    steps it is as noisy as they leave it."""
    schedule = Schedule(250, end=end)
    noise = picture_noise(3, 20_000, schedule.steps, 1)
    chain = denoise(ToyHead(0.0, -1.0), schedule, torch.ones(20_000, 1), noise)
    left = signal(end)
    assert float(chain.sample.std()) == pytest.approx(math.sqrt(left / 4 + 1 - left), rel=0.03)
    assert float(chain.sample.mean()) == pytest.approx(math.sqrt(left), abs=0.02)


def settings(length: int = 4, size: int = 2, schedule: Schedule = SCHEDULE) -> Settings:
    return Settings(length, size, schedule)


@pytest.mark.parametrize("rule", ["exact", "paper", "reference"])
def test_a_draft_that_is_the_target_is_always_accepted(rule):
    model, labels, seeds = ToyModel(), torch.arange(6), list(range(6))
    plain = decode(model, labels, seeds, settings(9))
    out, counts = decode_speculative(
        model, model, labels, seeds, settings(9), Speculation(window=3, rule=rule)
    )
    assert torch.equal(out, plain)
    assert counts.acceptance == 1
    assert counts.target_passes.tolist() == [3] * 6  # 4, 4 and 1
    # Every fourth latent is the target's own.
    assert counts.judged_at.tolist() == [6, 6, 6, 0, 6, 6, 6, 0, 0]
    assert counts.accepted_at.tolist() == counts.judged_at.tolist()


def test_a_picture_does_not_depend_on_its_batch():
    target, draft = ToyModel(), ToyModel(0.8, -0.3)
    labels, seeds = torch.arange(8) % 3, [100 + i for i in range(8)]
    how = Speculation(window=3)
    together, counts = decode_speculative(target, draft, labels, seeds, settings(12), how)
    assert int(counts.accepted_at.sum()) == int(counts.accepted.sum())
    judged = counts.accepted.sum() + counts.rejected.sum()
    assert int(counts.judged_at.sum()) == int(judged)
    for i in range(8):
        alone, _ = decode_speculative(
            target, draft, labels[i : i + 1], seeds[i : i + 1], settings(12), how
        )
        assert torch.equal(alone[0], together[i])


def test_prefilling_everything_is_plain_decoding():
    target, draft = ToyModel(), ToyModel(0.8, -0.3)
    labels, seeds = torch.arange(3), [1, 2, 3]
    out, counts = decode_speculative(
        target, draft, labels, seeds, settings(5), Speculation(window=2, prefill=5)
    )
    assert torch.equal(out, decode(target, labels, seeds, settings(5)))
    assert counts.drafted.sum() == 0
    assert counts.target_passes.tolist() == [5] * 3


def law(rule: str | None, seed: int, aligned: bool = True, steps: int = 4, drafted=None):
    """Latents [n, 3] of many pictures, and the acceptance. The draft's sigmas are others, and its
    steps ``drafted``, if that is a number."""
    count = 6000
    target, draft = ToyModel(0.0, 0.5), ToyModel(0.5, -0.9)
    labels, seeds = torch.zeros(count, dtype=torch.long), [seed + i for i in range(count)]
    how = settings(3, 1, Schedule(steps, end=300))
    if rule is None:
        return decode(target, labels, seeds, how)[..., 0], None
    out, counts = decode_speculative(
        target, draft, labels, seeds, how,
        Speculation(window=2, rule=rule, aligned=aligned, steps=drafted),
    )  # fmt: skip
    return out[..., 0], counts


def p_value(one: torch.Tensor, other: torch.Tensor) -> float:
    """The least over positions, and over sums of neighbours, which see what they share."""
    pairs = [(one[:, i], other[:, i]) for i in range(3)]
    pairs += [(one[:, i] + one[:, i + 1], other[:, i] + other[:, i + 1]) for i in range(2)]
    return min(stats.ks_2samp(a.numpy(), b.numpy()).pvalue for a, b in pairs)


@pytest.fixture(scope="module")
def plain():
    return law(None, 10**6)[0]


@pytest.mark.parametrize(
    ("aligned", "drafted"), [(True, None), (False, None), (True, 2), (True, 1)]
)
def test_exact_keeps_the_law_over_many_steps(plain, aligned, drafted):
    """Of draft chains as long as the target's, and of shorter ones."""
    out, counts = law("exact", 0, aligned, drafted=drafted)
    assert 0.1 < counts.acceptance < 0.95  # both paths were taken
    assert counts.given_up.sum() == 0
    assert p_value(out, plain) > 1e-3


@pytest.mark.parametrize("rule", ["paper", "reference"])
def test_weights_of_the_way_change_the_law(plain, rule):
    """The negative controls: with unlike sigmas neither the paper's weight nor its inverse
    keeps the target's law."""
    out, _ = law(rule, 0)
    assert p_value(out, plain) < 1e-6


def test_one_step_needs_no_weight():
    one, _ = law("exact", 0, steps=1)
    other, _ = law("paper", 0, steps=1)
    assert torch.equal(one, other)
    assert p_value(one, law(None, 10**6, steps=1)[0]) > 1e-3


def test_alignment_lifts_acceptance():
    aligned, apart = law("exact", 0)[1].acceptance, law("exact", 0, aligned=False)[1].acceptance
    assert aligned > 1.1 * apart


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="1 to 700 of the 1000"):
        Schedule(701, end=300)
    with pytest.raises(ValueError, match="steps=5: a draft has at most the target's 4"):
        settings().drafting(5)
    with pytest.raises(ValueError, match="window=0"):
        Speculation(window=0)
    with pytest.raises(ValueError, match="prefill=-1"):
        Speculation(window=1, prefill=-1)


def test_shorter_chains_end_with_the_same_noise():
    noise = picture_noise(5, 4, 6, 2)
    for steps, places in ((6, [0, 1, 2, 3, 4, 5]), (3, [0, 2, 5]), (1, [5])):
        thin = noise.thinned(steps)
        assert torch.equal(thin.steps, noise.steps[:, places])
        assert torch.equal(thin.start, noise.start)
    shorter = Schedule(6, end=250, prediction="velocity").shortened(3)
    assert (shorter.steps, shorter.end, shorter.prediction) == (3, 250, "velocity")


def test_noise_is_of_the_seed():
    one, again = picture_noise(5, 4, 3, 2), picture_noise(5, 4, 3, 2)
    assert isinstance(one, Noise)
    assert all(torch.equal(getattr(one, n), getattr(again, n)) for n in ("start", "steps"))
    assert not torch.equal(one.start, picture_noise(6, 4, 3, 2).start)


def test_all_64_bits_of_a_seed_count():
    """A CPU's generator in torch takes 5 and 5 + 2^32 for one seed, and ``hash`` -1 and -2."""
    seeds = [5, 5 + 2**32, 5 + 2**61 - 1, 5 + 2**63, -1, -2, 0, 2**64 - 5]
    starts = [tuple(picture_noise(seed, 1, 1, 2).start[0].tolist()) for seed in seeds]
    assert len(set(starts)) == len(seeds)
    drawn = {float(each.random()) for each in streams_of(seeds, [0] * len(seeds))}
    drawn |= {float(each.random()) for each in streams_of(seeds, [1] * len(seeds))}
    assert len(drawn) == 2 * len(seeds)
    again = picture_noise(-5, 1, 1, 2).start[0]  # modulo 2^64
    assert tuple(again.tolist()) == starts[-1]


def test_noise_is_standard_normal_and_its_uniforms_uniform():
    noise = picture_noise(2**63, 5000, 2, 2)
    assert (noise.start.dtype, noise.uniforms.dtype) == (torch.float32, torch.float32)
    drawn = torch.cat((noise.start[:, None], noise.steps), 1).flatten().numpy()
    assert stats.kstest(drawn, "norm").pvalue > 1e-3
    assert stats.kstest(noise.uniforms.numpy(), "uniform").pvalue > 1e-3


def small_model(layers: int = 2, seed: int = 0, **keys) -> CausalLatents:
    torch.manual_seed(seed)
    config = CausalLatentsConfig(
        num_classes=3, grid_size=3, hidden_size=32, intermediate_size=64, size=4, head_width=32,
        head_depth=2, num_hidden_layers=layers, num_attention_heads=2, **keys,
    )  # fmt: skip
    return CausalLatents(config)


def trained(model: CausalLatents, schedule: Schedule, steps: int = 150) -> CausalLatents:
    """On latents whose every next one is the last one turned, plus noise."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        latents = torch.randn(32, 9, 4)
        for i in range(1, 9):
            latents[:, i] = 0.9 * latents[:, i - 1].roll(1, -1) + 0.4 * latents[:, i]
        loss = model.loss(latents, latents, torch.zeros(32, dtype=torch.long), schedule)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.slow
def test_a_causal_model_learns_and_speculates():
    schedule = Schedule(8, end=250, prediction="velocity")
    target, draft = small_model(), small_model(layers=1, seed=1)
    before = _mean_bound(target, schedule)
    trained(target, schedule)
    trained(draft, schedule)
    assert _mean_bound(target, schedule) < 0.7 * before
    how, labels, seeds = settings(9, 4, schedule), torch.zeros(64).long(), list(range(64))
    plain = decode(target, labels, seeds, how)
    same, counts = decode_speculative(target, target, labels, seeds, how, Speculation(window=4))
    # Of another batch shape, so equal but for rounding; which may also reject once in a while.
    close = (same - plain).abs().amax((1, 2)) < 1e-3
    assert close.float().mean() > 0.9
    assert counts.acceptance > 0.99
    out, counts = decode_speculative(target, draft, labels, seeds, how, Speculation(window=4))
    assert 0.05 < counts.acceptance < 1
    assert counts.target_passes.float().mean() < 9
    # The data's law came through: neighbours are correlated as learnt.
    pairs = (out[:, 1:] * out[:, :-1].roll(1, -1)).mean()
    wanted = (plain[:, 1:] * plain[:, :-1].roll(1, -1)).mean()
    assert float(pairs) == pytest.approx(float(wanted), abs=0.1)


@torch.no_grad()
def _mean_bound(model: CausalLatents, schedule: Schedule) -> float:
    torch.manual_seed(7)
    latents = torch.randn(64, 9, 4)
    for i in range(1, 9):
        latents[:, i] = 0.9 * latents[:, i - 1].roll(1, -1) + 0.4 * latents[:, i]
    return float(model.loss(latents, latents, torch.zeros(64, dtype=torch.long), schedule, 8))


@torch.no_grad()
def shaken(model: CausalLatents) -> CausalLatents:
    """Heads start as the identity, which hides mistakes."""
    for parameter in model.head.parameters():
        parameter.add_(0.03 * torch.randn_like(parameter))
    return model.eval()


class Naive:
    """The same model, which reads whole pictures."""

    def __init__(self, model: CausalLatents):
        self.model, self.head = model, model.head

    def begin(self, labels, length):
        return Recompute(self.model, labels)


@pytest.mark.parametrize("window", [1, 3, 8])
def test_cached_keys_change_nothing(window):
    target, draft = shaken(small_model()), shaken(small_model(layers=1, seed=1))
    schedule = Schedule(4, end=250, prediction="velocity")
    how, labels, seeds = settings(9, 4, schedule), torch.arange(20) % 3, list(range(20))
    naive = decode(Naive(target), labels, seeds, how)
    torch.testing.assert_close(decode(target, labels, seeds, how), naive, atol=1e-4, rtol=0)
    how_much = Speculation(window=window)
    slow, counted = decode_speculative(Naive(target), Naive(draft), labels, seeds, how, how_much)
    fast, counts = decode_speculative(target, draft, labels, seeds, how, how_much)
    assert 0.05 < counts.acceptance < 0.99  # rejections and full windows
    torch.testing.assert_close(fast, slow, atol=1e-3, rtol=0)
    assert torch.equal(counts.target_passes, counted.target_passes)


@pytest.mark.parametrize("ahead", [1, 1 << 24])
def test_a_head_says_the_same_along_a_chain(monkeypatch, ahead):
    """Whatever is computed ahead of it."""
    monkeypatch.setattr(head, "AHEAD", ahead)
    mlp, times = shaken(small_model()).head, torch.tensor([900, 600, 300, 20])
    x, both, scale = torch.randn(5, 4), torch.randn(5, 64), torch.rand(5, 1)
    for each, condition in (
        (mlp, both[:, :32]),
        (GuidedHead(mlp), torch.cat((both, scale), 1)),
    ):
        for time, say in zip(times[:, None], each.along(times, condition), strict=True):
            torch.testing.assert_close(say(x), each(x, time, condition), atol=1e-5, rtol=0)
            everyone = time.expand(len(x))
            torch.testing.assert_close(say(x), each(x, everyone, condition), atol=1e-5, rtol=0)


def test_guidance_mixes_what_the_head_says():
    model = shaken(small_model())
    latents, labels = torch.randn(4, 8, 4), torch.tensor([0, 1, 2, 0])
    x, times = torch.randn(4, 4), torch.full((4,), 500)
    anything = torch.full_like(labels, 3)
    label, other = (model.conditions(latents, each)[:, 5] for each in (labels, anything))
    (said, fraction), (without, _) = (model.head(x, times, each) for each in (label, other))
    guided = Guided(model, anything=3, scale=2.5)
    session = guided.begin(labels, 9)
    padded = torch.cat((latents, torch.zeros(4, 1, 4)), 1)
    both = session.conditions(padded, torch.arange(4), torch.full((4,), 5), 1)[:, 0]
    mixed, kept = guided.head(x, times, both)
    torch.testing.assert_close(mixed, without + 2.5 * (said - without), atol=1e-5, rtol=0)
    torch.testing.assert_close(kept, fraction, atol=1e-5, rtol=0)


def test_guided_models_speculate():
    target, draft = shaken(small_model()), shaken(small_model(layers=1, seed=1))
    how = settings(9, 4, Schedule(4, end=250, prediction="velocity"))
    labels, seeds = torch.arange(6) % 3, list(range(6))
    target, draft = (Guided(model, anything=3, scale=1.5) for model in (target, draft))
    plain = decode(target, labels, seeds, how)
    same, counts = decode_speculative(target, target, labels, seeds, how, Speculation(window=4))
    torch.testing.assert_close(same, plain, atol=1e-3, rtol=0)
    assert counts.target_passes.tolist() == [2] * 6
    out, counts = decode_speculative(target, draft, labels, seeds, how, Speculation(window=4))
    assert out.isfinite().all()
    assert 0 < counts.acceptance < 1


def test_a_condition_sees_what_is_before_it_alone():
    model = small_model()
    latents, labels = torch.randn(2, 8, 4), torch.tensor([0, 2])
    changed = latents.clone()
    changed[:, 5] += 1
    one, other = model.conditions(latents, labels), model.conditions(changed, labels)
    torch.testing.assert_close(one[:, :6], other[:, :6])
    assert not torch.allclose(one[:, 6:], other[:, 6:])


@pytest.mark.parametrize("prediction", ["noise", "velocity"])
def test_the_bound_is_zero_for_the_true_posterior_alone(prediction):
    torch.manual_seed(0)
    schedule = Schedule(6, end=100, prediction=prediction)
    step = torch.arange(6)
    clean, noise = torch.randn(2, 6, 3)
    x, aim = schedule.noised(step, clean, noise), schedule.aim(step, clean, noise)
    least, most = torch.full_like(x, -1.0), torch.ones_like(x)
    # Predicted noise says nothing near pure noise, but to the last bit of a float.
    shown = slice(1 if prediction == "noise" else 0, None)
    none = schedule.bound(step, x, clean, aim, least)[shown]
    torch.testing.assert_close(none, torch.zeros_like(none), atol=1e-3, rtol=0)
    assert (schedule.bound(step, x, clean, aim + 0.5, least)[shown] > 1e-3).all()
    assert (schedule.bound(step, x, clean, aim, most)[shown] > 1e-4).all()


def test_times_are_exact_in_a_model_of_half_precision():
    exact = small_model().head.time_embed.frequencies
    torch.set_default_dtype(torch.bfloat16)  # as vLLM does while it builds a model
    try:
        built = small_model().head.float().time_embed.frequencies
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(built, exact)


def test_the_head_has_the_names_of_the_public_checkpoints():
    names = {name.rsplit(".", 1)[0] for name in small_model().head.state_dict()}
    assert {
        "time_embed.mlp.0", "time_embed.mlp.2", "cond_embed", "input_proj", "res_blocks.0.in_ln",
        "res_blocks.1.mlp.2", "res_blocks.0.adaLN_modulation.1", "final_layer.linear",
        "final_layer.adaLN_modulation.1",
    } <= names  # fmt: skip
