"""The dVAE: the published size, the paper's loss, invariances of batch and split, and that it learns."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from models.dvae import (
    Dvae,
    DvaeSettings,
    dvae_loss,
    evaluate_batch,
    gumbel_noise,
    kl_to_uniform,
    perplexity_and_used,
    psnr_db,
    relax,
    usage_of,
)
from models.likelihood import discretised_logit_laplace_nats, logit_laplace_nats, map_pixels

DEMO = {
    "image_size": 32,
    "widths": (64, 128),
    "stem_unshuffle": 2,
    "stem_kernel": 3,
    "bottleneck": 2,
    "post_gain": 0.5,
    "vocabulary": 256,
    "codebook_width": 64,
    "codebook_std": 1.0,
    "logit_std": 1.5,
    "ln_b_min": -1.5,
    "beta": 0.5,
}
PUBLISHED_SHAPE = {"image_size": 32, "widths": (8, 16, 24, 32), "vocabulary": 40, "codebook_width": 12}
SHAPES = [DEMO, PUBLISHED_SHAPE]


def build(seed: int = 0, **settings) -> Dvae:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Dvae(DvaeSettings(**settings))


def pictures(count: int, size: int, seed: int = 0) -> torch.Tensor:
    """Smooth random pictures in 256 levels."""
    noise = torch.rand(count, 3, size // 4, size // 4, generator=torch.Generator().manual_seed(seed))
    return (F.interpolate(noise, size=(size, size), mode="bilinear").clamp(0, 1) * 255).round() / 255


# Size and shape --------------------------------------------------------------------------------------------------


def test_the_defaults_are_the_published_model():
    with torch.device("meta"):
        dvae = Dvae(DvaeSettings())
    assert sum(p.numel() for p in dvae.encoder.parameters()) == 53_786_240
    assert sum(p.numel() for p in dvae.decoder.parameters()) == 43_829_766
    assert (dvae.image_size, dvae.grid, dvae.vocabulary) == (256, 32, 8192)
    assert dvae.settings.gain == 1 / 64


@pytest.mark.parametrize("shape", SHAPES)
def test_pictures_become_a_grid_of_codes_and_pictures_again(shape):
    dvae = build(**shape)
    images = pictures(3, 32)
    codes = dvae.encode(images)
    assert codes.shape == (3, dvae.grid**2)
    assert codes.dtype == torch.int64
    assert 0 <= int(codes.min()) <= int(codes.max()) < dvae.vocabulary
    decoded = dvae.decode(codes)
    assert decoded.shape == images.shape
    assert decoded.dtype == torch.float32
    assert 0 <= float(decoded.min()) <= float(decoded.max()) <= 1


@pytest.mark.parametrize("shape", SHAPES)
def test_hard_codes_give_the_statistics_of_their_one_hot(shape):
    dvae = build(**shape)
    codes = torch.randint(0, dvae.vocabulary, (2, dvae.grid**2), generator=torch.Generator().manual_seed(1))
    one_hot = F.one_hot(codes, dvae.vocabulary).float().view(2, dvae.grid, dvae.grid, -1).permute(0, 3, 1, 2)
    for gathered, multiplied in zip(dvae.statistics_of_codes(codes), dvae.statistics(one_hot), strict=True):
        assert torch.allclose(gathered, multiplied, atol=1e-5)


def test_a_code_stands_where_its_pixels_stand():
    # Changing one corner's pixels changes the codes of that corner, in raster order: row first.
    dvae = build(**{**DEMO, "stem_kernel": 1})
    images = pictures(1, 32)
    changed = images.clone()
    changed[:, :, :4, 28:] = 1 - changed[:, :, :4, 28:]
    difference = (dvae.logits(images) - dvae.logits(changed)).abs().sum(dim=1).flatten(1)
    assert int(difference.argmax()) == dvae.grid - 1


@pytest.mark.parametrize("wrong", [torch.rand(2, 3, 16, 16), torch.rand(2, 1, 32, 32), torch.rand(3, 32, 32)])
def test_pictures_of_another_shape_are_refused_in_words(wrong):
    with pytest.raises(ValueError, match=r"pictures of shape \(B, 3, 32, 32\) wanted"):
        build(**DEMO).encode(wrong)


def test_bytes_are_refused_in_words():
    with pytest.raises(ValueError, match=r"as floats wanted, torch\.uint8 given"):
        build(**DEMO).encode(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image_size": 30}, "no multiple of the reduction 4"),
        ({"stem_kernel": 4}, "is even"),
        ({"widths": (63, 128)}, "bottleneck"),
        ({"ln_b_min": 2.0}, "not below"),
        ({"channels": 64}, "channels"),
        ({"vocabulary": 1}, "greater than or equal to 2"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_in_words(change, words):
    with pytest.raises(ValidationError, match=words):
        DvaeSettings(**{**DEMO, **change})


# The loss --------------------------------------------------------------------------------------------------------


def test_the_kl_of_a_picture_does_not_change_with_the_batch():
    logits = torch.randn(1, 40, 4, 4, generator=torch.Generator().manual_seed(0)) * 2
    alone, _ = kl_to_uniform(logits)
    for batch in (2, 8, 32):
        together, _ = kl_to_uniform(logits.expand(batch, -1, -1, -1))
        assert torch.allclose(together, alone.expand(batch), rtol=1e-6)


def test_the_kl_runs_from_nothing_to_all_bits_of_the_grid():
    uniform, _ = kl_to_uniform(torch.zeros(1, 8192, 4, 4))
    certain, _ = kl_to_uniform(F.one_hot(torch.arange(16).view(1, 4, 4), 8192).permute(0, 3, 1, 2) * 1000.0)
    assert uniform.item() == pytest.approx(0.0, abs=1e-3)
    assert certain.item() / math.log(2) == pytest.approx(13 * 16, rel=1e-5)


def test_the_usage_is_zero_if_all_codes_share_and_all_bits_if_one_takes_all():
    each_its_own = F.one_hot(torch.arange(16).view(1, 4, 4), 16).permute(0, 3, 1, 2) * 1000.0
    all_the_same = torch.zeros(2, 16, 4, 4)
    all_the_same[:, 3] = 1000.0
    assert usage_of(kl_to_uniform(each_its_own)[1]).item() == pytest.approx(0.0, abs=1e-5)
    logits = all_the_same.requires_grad_()
    usage = usage_of(kl_to_uniform(logits)[1])
    assert usage.item() == pytest.approx(math.log(16), rel=1e-5)
    usage.backward()
    assert bool(logits.grad.isfinite().all())  # codes of probability 0 included


def test_workers_that_share_a_batch_can_follow_the_usage_of_all_of_it():
    # With m the mean of all q, held constant, the parts' means of Σ q·ln(m·V) add up to the usage and to its gradient.
    logits = torch.randn(4, 16, 2, 2, generator=torch.Generator().manual_seed(0), requires_grad=True)
    mean_q_V = kl_to_uniform(logits)[1]
    whole = usage_of(mean_q_V)
    log_ratio_V = (mean_q_V.detach() * 16).log()
    parts = torch.stack([(kl_to_uniform(part)[1] * log_ratio_V).sum() for part in logits.split(2)]).mean()
    assert parts.item() == pytest.approx(whole.item(), rel=1e-5)
    (expected,) = torch.autograd.grad(whole, logits, retain_graph=True)
    (added,) = torch.autograd.grad(parts, logits)
    assert torch.allclose(added, expected, atol=1e-7)


def test_the_loss_is_the_paper_s_in_nats_per_dimension():
    dvae = build(**{**DEMO, "beta": 3.0, "beta_steps": 10, "tau_steps": 20})
    images, seeds, step = pictures(2, 32), [5, 6], 5
    loss = dvae_loss(dvae, images, seeds, step)
    assert loss.beta == pytest.approx(1.5)
    assert loss.tau == pytest.approx(1 / 16 + (1 - 1 / 16) * 0.5 * (1 + math.cos(math.pi / 4)))
    logits = dvae.logits(images)
    mu, ln_b = dvae.statistics(relax(logits, seeds, loss.tau))
    b, y = ln_b.exp(), map_pixels(images)
    density = torch.exp(-(torch.logit(y) - mu).abs() / b) / (2 * b * y * (1 - y))
    distortion = -density.log().sum(dim=(1, 2, 3))
    q = logits.softmax(dim=1)
    kl = (q * (q.log() - math.log(1 / 256))).sum(dim=(1, 2, 3))
    assert torch.allclose(loss.distortion_B, distortion, rtol=1e-4)
    assert torch.allclose(loss.kl_B, kl, rtol=1e-4)
    assert loss.usage_loss.item() == pytest.approx(usage_of(q.mean(dim=(0, 2, 3))).item(), rel=1e-4)
    assert torch.allclose(loss.loss_B, (distortion + 1.5 * kl) / (3 * 32 * 32), rtol=1e-4)


def test_a_batch_split_between_workers_has_the_same_losses():
    dvae = build(**DEMO)
    images, seeds = pictures(4, 32), [11, 12, 13, 14]
    whole = dvae_loss(dvae, images, seeds, 100)
    halves = [dvae_loss(dvae, images[part], seeds[part], 100) for part in (slice(0, 2), slice(2, 4))]
    for name in ("loss_B", "distortion_B", "kl_B"):
        parts = torch.cat([getattr(half, name) for half in halves])
        assert torch.allclose(getattr(whole, name), parts, rtol=1e-4), name
    assert torch.equal(
        gumbel_noise(seeds, 6, 5, torch.device("cpu"))[2:], gumbel_noise(seeds[2:], 6, 5, torch.device("cpu"))
    )


def test_the_module_s_forward_is_the_loss():
    dvae = build(**DEMO)
    assert torch.equal(dvae(pictures(1, 32), [1], 0).loss_B, dvae_loss(dvae, pictures(1, 32), [1], 0).loss_B)


def test_each_picture_needs_its_seed():
    with pytest.raises(RuntimeError):
        dvae_loss(build(**DEMO), pictures(2, 32), [1], 0)


def test_the_noise_is_gumbel():
    noise = gumbel_noise([0, 1], 500, 200, torch.device("cpu"))
    assert noise.isfinite().all()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.02)


def test_the_relaxation_draws_codes_with_their_probabilities_and_hardens_as_tau_falls():
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits = probabilities.log().view(1, 4, 1, 1).expand(1, 4, 100, 100)
    relaxed = relax(logits, [3], tau=0.01)
    assert torch.allclose(relaxed.sum(dim=1), torch.ones(1, 100, 100), atol=1e-5)
    frequencies = torch.bincount(relaxed.argmax(dim=1).flatten(), minlength=4) / 10_000
    assert torch.allclose(frequencies, probabilities, atol=0.02)
    assert relaxed.max(dim=1).values.mean() > 0.98
    assert relax(logits, [3], tau=100.0).max() < 0.4


def test_the_logits_start_standardised_where_that_is_asked_for():
    images = pictures(40, 32)
    dvae = build(**DEMO)
    dvae.initialise_on(images)
    logits_VM = dvae.logits(images).transpose(0, 1).flatten(1)
    assert torch.allclose(logits_VM.mean(dim=1), torch.zeros(256), atol=1e-3)
    assert torch.allclose(logits_VM.std(dim=1), torch.full((256,), 1.5), rtol=1e-3)
    plain = build(**{**DEMO, "logit_std": None})
    before = plain.logits(images)
    plain.initialise_on(images)
    assert torch.equal(plain.logits(images), before)


def test_the_codebook_starts_at_the_asked_deviation_else_as_a_convolution():
    assert build(**DEMO).decoder.input.weight.std().item() == pytest.approx(1.0, rel=0.05)
    published = build(**{**DEMO, "codebook_std": None}).decoder.input.weight
    assert published.std().item() == pytest.approx(1 / math.sqrt(256), rel=0.05)


def test_ln_b_stays_within_its_clamp():
    dvae = build(**DEMO)
    with torch.no_grad():
        dvae.decoder.output.weight.mul_(1000)
    _, ln_b = dvae.statistics_of_codes(torch.arange(64).view(1, 64))
    assert (ln_b.min().item(), ln_b.max().item()) == (-1.5, 2.0)


def test_a_few_steps_learn_a_few_pictures():
    dvae = build(**{**DEMO, "image_size": 16, "widths": (32, 32), "vocabulary": 64, "beta_steps": 10, "tau_steps": 60})
    images = pictures(8, 16)
    dvae.initialise_on(images)
    optimizer = torch.optim.AdamW(dvae.parameters(), lr=4e-3)
    start = evaluate_batch(dvae, images, 1.0, range(8))
    for step in range(80):
        loss = dvae_loss(dvae, images, [step * 8 + i for i in range(8)], step)
        optimizer.zero_grad()
        (loss.loss_B.mean() + 0.05 * loss.usage_loss).backward()
        optimizer.step()
    end = evaluate_batch(dvae, images, loss.tau, range(8))
    assert psnr_db(end.mse_B).mean() > psnr_db(start.mse_B).mean() + 4
    assert end.hard_bits_per_dim_B.mean() < start.hard_bits_per_dim_B.mean() - 0.7
    assert abs(float((end.hard_nats_per_dim_B - end.relaxed_nats_per_dim_B).mean())) < 0.2
    assert perplexity_and_used(end.codes_BN, 64)[0] > 8


# Measures --------------------------------------------------------------------------------------------------------


def test_the_measures_are_those_of_the_hard_and_of_the_relaxed_codes():
    dvae = build(**DEMO)
    images, seeds, tau = pictures(3, 32), [1, 2, 3], 0.5
    measured = evaluate_batch(dvae, images, tau, seeds)
    codes = dvae.encode(images)
    assert torch.equal(measured.codes_BN, codes)
    mse = ((dvae.decode(codes) - images) ** 2).flatten(1).mean(dim=1)
    assert torch.allclose(measured.mse_B, mse, rtol=1e-4)
    hard = dvae.statistics_of_codes(codes)
    bits = discretised_logit_laplace_nats(images, *hard).flatten(1).mean(dim=1) / math.log(2)
    assert torch.allclose(measured.hard_bits_per_dim_B, bits, rtol=1e-4)
    assert torch.allclose(
        measured.hard_nats_per_dim_B, logit_laplace_nats(images, *hard).flatten(1).mean(dim=1), rtol=1e-4
    )
    training = dvae_loss(build(**{**DEMO, "tau_start": tau, "tau_end": tau}), images, seeds, 0)
    assert torch.allclose(measured.relaxed_nats_per_dim_B, training.distortion_B / 3072, rtol=1e-4)
    assert torch.allclose(measured.kl_B, training.kl_B, rtol=1e-4)
    assert not measured.hard_nats_per_dim_B.requires_grad


def test_relaxed_equals_hard_where_the_encoder_is_certain():
    dvae = build(**DEMO)
    with torch.no_grad():
        dvae.encoder.output.weight.mul_(1e5)
    measured = evaluate_batch(dvae, pictures(2, 32), 1 / 16, [1, 2])
    assert torch.allclose(measured.hard_nats_per_dim_B, measured.relaxed_nats_per_dim_B, atol=1e-4)


def test_perplexity_counts_the_codes_that_share_the_work():
    assert perplexity_and_used(torch.arange(64).repeat(3), 64) == (pytest.approx(64.0), 1.0)
    assert perplexity_and_used(torch.zeros(5, 7, dtype=torch.int64), 64) == (1.0, 1 / 64)
