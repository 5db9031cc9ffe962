"""Stage one: the discrete VAE with a Gumbel-softmax relaxation (paper, §2.1 and App. A). Network, loss and measures.

One class from 32×32 pixels and 0.7 M parameters to the published 256×256 and 97.6 M: only settings differ. There is no
norm layer and no embedding table: the decoder's first 1×1 convolution *is* the codebook.

What is minimised, per picture and per dimension (dims = 3·H·W):

    ( −ln f(x | z)  +  β · KL(q(z|x) ‖ uniform) ) / dims

Both terms are sums over the picture, then means over the batch: neither changes when the batch grows. The KL reads the
encoder's logits as plain categoricals although z is a relaxed sample, as OpenAI's did.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass as plain_dataclass
from typing import Annotated, Self

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from models.likelihood import discretised_logit_laplace_nats, logit_laplace_nats, map_pixels, unmap_pixels
from models.schedules import half_cosine

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
class DvaeSettings:
    """Sizes, initialisation and schedules of the dVAE. The defaults are the published model (App. A)."""

    image_size: Count = 256
    """Pixels a side of the square pictures it reads and draws."""
    widths: Annotated[tuple[Count, ...], Field(min_length=1)] = (256, 512, 1024, 2048)
    """Channels of each group of the encoder (the decoder's in reverse). Every group but the last halves the picture."""
    blocks_per_group: Count = 2
    """Residual blocks in each group."""
    stem_unshuffle: Count = 1
    """Pixels a side that are folded into channels before the first convolution (and unfolded after the last); 1: none,
    as published. 2 makes the finest, dearest level four times cheaper."""
    stem_kernel: Count = 7
    """Side of the encoder's first convolution, odd; pixels after folding."""
    bottleneck: Count = 4
    """A block's inner channels are its outer ones divided by this."""
    post_gain: Annotated[float, Field(gt=0.0)] | None = None
    """Factor on each block's residual path. Unset: 1 / (number of blocks)², as published."""
    vocabulary: Annotated[int, Field(ge=2)] = 8192
    """Number of codes V."""
    codebook_width: Count = 128
    """Channels of a code's vector, the output of the decoder's first convolution."""
    codebook_std: Annotated[float, Field(gt=0.0)] | None = None
    """Standard deviation of the code vectors at the start. Unset: 1/√V, the rule of the other convolutions, as
    published; but a code reads one row of a one-hot product, so that an embedding's 1.0 learns much faster
    (+2 dB within 200 steps, measured at 32 pixels)."""
    logit_std: Annotated[float, Field(gt=0.0)] | None = None
    """Standardises each code's logit on the first pictures to this standard deviation, so that no code starts dead.
    Unset: off, as published."""
    ln_b_min: float = -3.0
    """Lower clamp of ln b. Flat areas push b down to it and then own the gradients: short runs want it higher (650
    steps on line drawings of 32 pixels: 16.1 dB at −1.5, 17.2 dB at −0.5, and fewer bits per dimension too)."""
    ln_b_max: float = 2.0
    """Upper clamp of ln b."""
    beta: Annotated[float, Field(ge=0.0)] = 6.6
    """Final weight β of the KL in the paper's convention. β/(3·f²) weighs the KL of one code per pixel and channel, so
    it does not carry over to another factor f of reduction."""
    beta_steps: Annotated[int, Field(ge=0)] = 5_000
    """Updates over which β rises from 0, half-cosine."""
    tau_start: Annotated[float, Field(gt=0.0)] = 1.0
    """Temperature τ of the relaxation at step 0."""
    tau_end: Annotated[float, Field(gt=0.0)] = 1 / 16
    """Temperature at the end; 1/16 closes the gap between relaxed and hard codes."""
    tau_steps: Annotated[int, Field(ge=0)] = 150_000
    """Updates over which τ falls, half-cosine (a linear fall "typically led to divergence")."""
    usage: Annotated[float, Field(ge=0.0)] = 0.0
    """Weight of KL(batch mean of q ‖ uniform), nats. Keeps codes alive in short runs; not in the paper, hence 0."""

    @property
    def factor(self) -> int:
        """Pixels a side of one code, f."""
        return self.stem_unshuffle << (len(self.widths) - 1)

    @property
    def grid(self) -> int:
        """Codes a side."""
        return self.image_size // self.factor

    @property
    def gain(self) -> float:
        """Factor on each block's residual path."""
        return self.post_gain if self.post_gain is not None else 1.0 / (len(self.widths) * self.blocks_per_group) ** 2

    @property
    def dims(self) -> int:
        """Numbers in a picture, 3·H·W."""
        return 3 * self.image_size**2

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        if self.image_size % self.factor:
            raise ValueError(f"image_size {self.image_size} is no multiple of the reduction {self.factor}")
        if self.stem_kernel % 2 == 0:
            raise ValueError(f"stem_kernel {self.stem_kernel} is even: a convolution that keeps the size is odd")
        if any(width % self.bottleneck for width in self.widths):
            raise ValueError(f"widths {self.widths} are not all multiples of the bottleneck {self.bottleneck}")
        if self.ln_b_min >= self.ln_b_max:
            raise ValueError(f"ln_b_min {self.ln_b_min} is not below ln_b_max {self.ln_b_max}")
        return self


def _convolution(n_in: int, n_out: int, kernel: int) -> nn.Conv2d:
    """Keeps height and width; weights N(0, 1/√(n_in·k²)), biases 0 (App. A.1)."""
    convolution = nn.Conv2d(n_in, n_out, kernel, padding=kernel // 2)
    nn.init.normal_(convolution.weight, std=1.0 / math.sqrt(n_in * kernel**2))
    nn.init.zeros_(_bias(convolution))
    return convolution


def _bias(convolution: nn.Conv2d) -> Tensor:
    assert convolution.bias is not None  # optional in torch; ours all have one
    return convolution.bias


class Block(nn.Module):
    """A pre-activation bottleneck: skip(x) + gain · conv(relu(conv(relu(conv(relu(conv(relu(x))))))))."""

    def __init__(self, n_in: int, n_out: int, kernels: tuple[int, int, int, int], settings: DvaeSettings) -> None:
        super().__init__()
        n_hidden = n_out // settings.bottleneck
        self.gain = settings.gain
        self.residual_dtype: torch.dtype | None = None
        self.skip = _convolution(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        self.conv_1 = _convolution(n_in, n_hidden, kernels[0])
        self.conv_2 = _convolution(n_hidden, n_hidden, kernels[1])
        self.conv_3 = _convolution(n_hidden, n_hidden, kernels[2])
        self.conv_4 = _convolution(n_hidden, n_out, kernels[3])

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Same height and width, n_out channels."""
        if self.residual_dtype is None:
            hidden = self._residual(x_BCHW)
        else:
            with torch.autocast(x_BCHW.device.type, self.residual_dtype):
                hidden = self._residual(x_BCHW).to(x_BCHW.dtype)
        return torch.add(self.skip(x_BCHW), hidden, alpha=self.gain)

    def _residual(self, x_BCHW: Tensor) -> Tensor:
        hidden = self.conv_1(F.relu(x_BCHW))
        hidden = self.conv_2(F.relu(hidden, inplace=True))
        hidden = self.conv_3(F.relu(hidden, inplace=True))
        hidden_BCHW: Tensor = self.conv_4(F.relu(hidden, inplace=True))
        return hidden_BCHW


def _groups(
    n_in: int, widths: Sequence[int], kernels: tuple[int, int, int, int], settings: DvaeSettings
) -> nn.ModuleList:
    groups = nn.ModuleList()
    for width in widths:
        blocks = [Block(n_in if b == 0 else width, width, kernels, settings) for b in range(settings.blocks_per_group)]
        groups.append(nn.Sequential(*blocks))
        n_in = width
    return groups


class Encoder(nn.Module):
    """Mapped pixels to the logits of the codes. Maximum pooling halves the picture: better than the mean (App. A.1)."""

    def __init__(self, settings: DvaeSettings) -> None:
        super().__init__()
        self.unshuffle = settings.stem_unshuffle
        self.input = _convolution(3 * self.unshuffle**2, settings.widths[0], settings.stem_kernel)
        self.groups = _groups(settings.widths[0], settings.widths, (3, 3, 3, 1), settings)
        self.output = _convolution(settings.widths[-1], settings.vocabulary, 1)

    def forward(self, mapped_BCHW: Tensor) -> Tensor:
        """logits_BVhw."""
        x = mapped_BCHW if self.unshuffle == 1 else F.pixel_unshuffle(mapped_BCHW, self.unshuffle)
        # Channels last: 1.2 to 1.4 times as fast on a CPU. The weights stay contiguous, as files and DDP want them.
        x = self.input(x.contiguous(memory_format=torch.channels_last))
        for number, group in enumerate(self.groups):
            x = group(x if number == 0 else F.max_pool2d(x, 2))
        logits_BVhw: Tensor = self.output(F.relu(x))
        return logits_BVhw


class Decoder(nn.Module):
    """Codes, relaxed or hard, to the six statistics of each pixel: μ and ln b of red, green and blue."""

    def __init__(self, settings: DvaeSettings) -> None:
        super().__init__()
        self.unshuffle = settings.stem_unshuffle
        self.input = _convolution(settings.vocabulary, settings.codebook_width, 1)
        if settings.codebook_std is not None:
            nn.init.normal_(self.input.weight, std=settings.codebook_std)
        self.groups = _groups(settings.codebook_width, settings.widths[::-1], (1, 3, 3, 3), settings)
        self.output = _convolution(settings.widths[0], 6 * self.unshuffle**2, 1)

    def vectors_of_codes(self, codes_Bhw: Tensor) -> Tensor:
        """What the first convolution gives for one-hot codes, BDhw, without the one-hot: 32 MiB a published picture."""
        codebook_VD = self.input.weight[:, :, 0, 0].T
        vectors_BhwD = F.embedding(codes_Bhw, codebook_VD).add_(_bias(self.input))
        return vectors_BhwD.permute(0, 3, 1, 2)

    def forward(self, vectors_BDhw: Tensor) -> Tensor:
        """statistics_B6HW from the code vectors (the output of `input` or of `vectors_of_codes`)."""
        x = vectors_BDhw
        for number, group in enumerate(self.groups):
            x = group(x if number == 0 else F.interpolate(x, scale_factor=2.0, mode="nearest"))
        x = self.output(F.relu(x))
        return x if self.unshuffle == 1 else F.pixel_shuffle(x, self.unshuffle)


class Dvae(nn.Module):
    """The discrete VAE, an `ImageTokenizer`. Weights are drawn from torch's default generator."""

    def __init__(self, settings: DvaeSettings) -> None:
        super().__init__()
        self.settings = settings
        self.image_size, self.grid, self.vocabulary = settings.image_size, settings.grid, settings.vocabulary
        self.encoder = Encoder(settings)
        self.decoder = Decoder(settings)

    def logits(self, images_BCHW: Tensor) -> Tensor:
        """logits_BVhw of q(z|x). Raises ValueError for pictures of another size, channel count or type."""
        expected = (3, self.image_size, self.image_size)
        if images_BCHW.dim() != 4 or tuple(images_BCHW.shape[1:]) != expected:
            raise ValueError(
                f"pictures of shape (B, {', '.join(map(str, expected))}) wanted, {tuple(images_BCHW.shape)} given"
            )
        if not images_BCHW.is_floating_point():
            raise ValueError(f"pictures in [0, 1] as floats wanted, {images_BCHW.dtype} given")
        logits_BVhw: Tensor = self.encoder(map_pixels(images_BCHW))
        return logits_BVhw

    def statistics(self, relaxed_BVhw: Tensor) -> tuple[Tensor, Tensor]:
        """(μ, ln b), each BCHW, of the logit-Laplace, for relaxed (or one-hot) codes; ln b is clamped."""
        return self._split(self.decoder(self.decoder.input(relaxed_BVhw)))

    def statistics_of_codes(self, codes_BN: Tensor) -> tuple[Tensor, Tensor]:
        """(μ, ln b) for hard codes: equal to `statistics` of their one-hot, which is never built."""
        codes_Bhw = codes_BN.reshape(-1, self.grid, self.grid)
        return self._split(self.decoder(self.decoder.vectors_of_codes(codes_Bhw)))

    def _split(self, statistics_B6HW: Tensor) -> tuple[Tensor, Tensor]:
        mu, ln_b = statistics_B6HW.float().chunk(2, dim=1)
        return mu, ln_b.clamp(self.settings.ln_b_min, self.settings.ln_b_max)

    @torch.no_grad()
    def encode(self, images_BCHW: Tensor) -> Tensor:
        """codes_BN, int64, raster order: the most probable code of each cell."""
        return self.logits(images_BCHW).argmax(dim=1).flatten(1)

    def run_residuals_in(self, dtype: torch.dtype | None) -> None:
        """Has the encoder compute its residual paths in `dtype` and the stream that they are added to as it is.

        The gain (1/64 as published) makes their rounding small: with bfloat16 99.95 % of the codes stay, and 96 to 98 %
        where autocast takes the whole encoder (random and shortly trained weights, 64 and 128 pixels). None: off.
        """
        for module in self.encoder.modules():
            if isinstance(module, Block):
                module.residual_dtype = dtype

    @torch.no_grad()
    def decode(self, codes_BN: Tensor) -> Tensor:
        """images_BCHW = φ⁻¹(sigmoid μ); ln b plays no part (App. A.3)."""
        mu, _ = self.statistics_of_codes(codes_BN)
        return unmap_pixels(torch.sigmoid(mu))

    @torch.no_grad()
    def initialise_on(self, images_BCHW: Tensor) -> None:
        """Scales the encoder's last convolution so that each code's logit has mean 0 and deviation `logit_std` here.

        Called once, before step 0, with a few hundred training pictures; does nothing if `logit_std` is unset.
        """
        if self.settings.logit_std is None:
            return
        logits_VM = self.logits(images_BCHW).transpose(0, 1).flatten(1)
        std_V, mean_V = torch.std_mean(logits_VM, dim=1)
        scale_V = self.settings.logit_std / std_V.clamp(min=1e-6)
        self.encoder.output.weight.mul_(scale_V[:, None, None, None])
        _bias(self.encoder.output).sub_(mean_V).mul_(scale_V)

    def forward(self, images_BCHW: Tensor, seeds_B: Sequence[int], step: int) -> DvaeLoss:
        """`dvae_loss`, so that a wrapper such as DDP sees a forward pass."""
        return dvae_loss(self, images_BCHW, seeds_B, step)


@plain_dataclass(frozen=True)
class DvaeLoss:
    """The parts of one batch's loss. Sums are per picture, so that a batch may be split and added up again."""

    loss_B: Tensor
    """(distortion + β·KL) / dims of each picture, nats per dimension: what is minimised, together with the usage."""
    distortion_B: Tensor
    """−ln f(x|z) at the relaxed z, nats per picture (of a density: may be negative)."""
    kl_B: Tensor
    """KL(q ‖ uniform), nats per picture."""
    usage_loss: Tensor
    """KL(batch mean of q ‖ uniform), nats: a statistic of this batch; the caller adds `settings.usage` times it."""
    mean_q_V: Tensor
    """The batch mean of q that `usage_loss` is of: workers that share a batch need the mean over all their parts."""
    tau: float
    beta: float


def gumbel_noise(seeds_B: Sequence[int], rows: int, vocabulary: int, device: torch.device) -> Tensor:
    """noise_BNV, standard Gumbel, row b from a generator of its own: splitting a batch changes no picture's noise."""
    noise_BNV = torch.empty(len(seeds_B), rows, vocabulary, device=device)
    for noise_NV, seed in zip(noise_BNV, seeds_B, strict=True):
        noise_NV.exponential_(generator=torch.Generator(device).manual_seed(seed))
    return noise_BNV.clamp_(min=1e-30).log_().neg_()


def relax(logits_BVhw: Tensor, seeds_B: Sequence[int], tau: float) -> Tensor:
    """relaxed_BVhw, a sample of the Gumbel-softmax: softmax((logits + g)/τ), soft in the forward and backward pass."""
    B, V, h, w = logits_BVhw.shape
    noise_BhwV = gumbel_noise(seeds_B, h * w, V, logits_BVhw.device).view(B, h, w, V)
    # With channels last the permuted views are contiguous, and the softmax runs over the last axis.
    return F.softmax((logits_BVhw.permute(0, 2, 3, 1) + noise_BhwV) / tau, dim=-1).permute(0, 3, 1, 2)


def kl_to_uniform(logits_BVhw: Tensor) -> tuple[Tensor, Tensor]:
    """(kl_B, mean_q_V): KL(q ‖ uniform) = ln V + Σ q ln q in nats, summed over each picture's grid; the mean of all q.

    The KL is a sum per picture, so that its mean over a batch does not change with the batch's size.
    """
    log_q_BNV = F.log_softmax(logits_BVhw.permute(0, 2, 3, 1).flatten(1, 2).float(), dim=-1)
    _, N, V = log_q_BNV.shape
    q_BNV = log_q_BNV.exp()
    kl_B = N * math.log(V) + (q_BNV * log_q_BNV).sum(dim=(1, 2))
    return kl_B, q_BNV.mean(dim=(0, 1))


def usage_of(mean_q_V: Tensor) -> Tensor:
    """KL(mean q ‖ uniform) in nats: 0 if the codes share the pictures' cells alike, ln V if one code has them all."""
    # The clamp keeps the gradient finite for a code whose probability underflows everywhere.
    return math.log(len(mean_q_V)) + (mean_q_V * mean_q_V.clamp(min=1e-12).log()).sum()


def dvae_loss(dvae: Dvae, images_BCHW: Tensor, seeds_B: Sequence[int], step: int) -> DvaeLoss:
    """One training pass: encode, relax at τ(step), decode, likelihood and KL. `seeds_B` seed each picture's noise."""
    settings = dvae.settings
    tau = half_cosine(step, settings.tau_start, settings.tau_end, settings.tau_steps)
    beta = half_cosine(step, 0.0, settings.beta, settings.beta_steps)
    logits_BVhw = dvae.logits(images_BCHW)
    mu, ln_b = dvae.statistics(relax(logits_BVhw, seeds_B, tau))
    distortion_B = logit_laplace_nats(images_BCHW, mu, ln_b).sum(dim=(1, 2, 3))
    kl_B, mean_q_V = kl_to_uniform(logits_BVhw)
    loss_B = (distortion_B + beta * kl_B) / settings.dims
    return DvaeLoss(loss_B, distortion_B, kl_B, usage_of(mean_q_V), mean_q_V, tau, beta)


@plain_dataclass(frozen=True)
class DvaeEvaluation:
    """Measures of each picture; their means over a sweep are what is reported."""

    mse_B: Tensor
    """Mean squared error of the hard reconstruction, pixels in [0, 1]; `psnr_db` turns it to decibels."""
    hard_bits_per_dim_B: Tensor
    """Discretised distortion with hard codes: bits that code the 8-bit pixels given the codes."""
    hard_nats_per_dim_B: Tensor
    """−ln f/dims with hard codes."""
    relaxed_nats_per_dim_B: Tensor
    """−ln f/dims with codes relaxed at τ. Hard minus relaxed is the gap that training cannot see."""
    kl_B: Tensor
    """KL(q ‖ uniform), nats per picture. Either ELBO per dimension (β = 1) is −(nats_per_dim + kl/dims)."""
    codes_BN: Tensor


@torch.no_grad()
def evaluate_batch(dvae: Dvae, images_BCHW: Tensor, tau: float, seeds_B: Sequence[int]) -> DvaeEvaluation:
    """Distortion with hard and with relaxed codes, rate and codes of each picture."""
    logits_BVhw = dvae.logits(images_BCHW)
    codes_BN = logits_BVhw.argmax(dim=1).flatten(1)
    hard = dvae.statistics_of_codes(codes_BN)
    relaxed = dvae.statistics(relax(logits_BVhw, seeds_B, tau))
    per_picture = (1, 2, 3)
    return DvaeEvaluation(
        mse_B=(unmap_pixels(torch.sigmoid(hard[0])) - images_BCHW).square().mean(dim=per_picture),
        hard_bits_per_dim_B=discretised_logit_laplace_nats(images_BCHW, *hard).mean(dim=per_picture) / math.log(2.0),
        hard_nats_per_dim_B=logit_laplace_nats(images_BCHW, *hard).mean(dim=per_picture),
        relaxed_nats_per_dim_B=logit_laplace_nats(images_BCHW, *relaxed).mean(dim=per_picture),
        kl_B=kl_to_uniform(logits_BVhw)[0],
        codes_BN=codes_BN,
    )


def psnr_db(mse: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of pixels in [0, 1], decibels: −10 log₁₀ mse; at most 100.

    >>> psnr_db(torch.tensor([0.01, 0.0])).tolist()
    [20.0, 100.0]
    """
    return -10.0 * mse.clamp(min=1e-10).log10()


def perplexity_and_used(codes: Tensor, vocabulary: int) -> tuple[float, float]:
    """(exp of the entropy of the codes' frequencies, share of the vocabulary that occurs), over all of `codes`.

    To be taken over a whole held-out sweep: a batch holds too few codes to use a vocabulary.

    >>> perplexity_and_used(torch.tensor([0, 0, 1, 1]), vocabulary=8)
    (2.0, 0.25)
    """
    counts_V = torch.bincount(codes.flatten(), minlength=vocabulary).double()
    entropy = torch.special.entr(counts_V / counts_V.sum()).sum()
    return float(entropy.exp()), float((counts_V > 0).double().mean())
