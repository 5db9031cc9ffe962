"""The frozen tokenizer as `tokenize` runs it: once in a process, on a CPU or a GPU, in float32 or with bfloat16.

On a CPU all is float32. On a GPU the residual paths of the encoder run in bfloat16 and all else in IEEE float32, if
that gives the codes of float32: each shard's first `SAMPLE_BATCHES` batches are encoded both ways, and a shard that
agrees on less than `AGREEMENT` of their codes is encoded in float32. May not live here: shards (ops/tokenize.py).
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from ops.errors import DamagedArtifact
from ops.trained import load_tokenizer

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from models.dvae import Dvae, DvaeSettings

ENCODE_BATCH = 64
"""Most pictures encoded at once. No setting: another batch could round another way, and give other bytes."""
CPU_BATCH_BYTES = 4 << 20
"""What a batch's widest layer may take on a CPU, to stay in the caches' reach: with 64 channels of 64 pixels a picture
costs 9.1 CPU-ms in batches of 4 and 12 to 13 in those of 64, with the same codes (2 cores of an EPYC:
`python -m tests.bench.tokenize --tried`)."""
SAMPLE_BATCHES = 2
"""Batches of a shard that are encoded both ways: 131,072 codes of the published size, of which 131 may differ."""
AGREEMENT = 0.999
"""Least share of a sample's codes that bfloat16 must give as float32 does."""

PixelBatch = np.ndarray[Any, np.dtype[np.uint8]]


@lru_cache(maxsize=1)
def frozen_tokenizer(tokens: str, digest: str, device: str = "cpu") -> Dvae:
    """The tokenizer of TOKENS, loaded once a process. Raises DamagedArtifact if it is another than `digest` names."""
    import torch

    dvae, found = load_tokenizer(tokens)
    if found != digest:
        raise DamagedArtifact(f"{tokens}/tokenizer", f"digest {digest}", f"digest {found}")
    if device == "cuda":
        dvae.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return dvae


def encode_batch(settings: DvaeSettings, device: str) -> int:
    """Pictures that are encoded at once: a matter of the tokenizer's size and of the kind of device alone.

    >>> from models.dvae import DvaeSettings
    >>> encode_batch(DvaeSettings(image_size=64, widths=(64, 128)), "cpu")
    4
    """
    if device != "cpu":
        return ENCODE_BATCH
    picture = 4 * settings.widths[0] * (settings.image_size // settings.stem_unshuffle) ** 2
    return min(ENCODE_BATCH, max(1, CPU_BATCH_BYTES // picture))


class Encoding:
    """Pictures to codes, batch by batch, for one shard; with how far bfloat16 was to be trusted.

    `half` is the type of the residual paths, None for float32 throughout.
    """

    def __init__(self, dvae: Dvae, half: torch.dtype | None) -> None:
        import torch

        self.half = half
        self.dvae = dvae
        if next(dvae.parameters()).is_cuda:
            # torch's default is TF32, of 10 bits: no float32 to compare with, and too coarse for the stream.
            torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]
        self._sampled = self._equal = self._compared = 0

    @property
    def agreement(self) -> float | None:
        """Share of the sample's codes that came out as in float32; None where nothing was compared."""
        return self._equal / self._compared if self._compared else None

    def __call__(self, pixels_BHWC: PixelBatch) -> Tensor:
        """codes_BN on the tokenizer's device; a GPU may still be at work on them when this returns."""
        images_BCHW = self._images(pixels_BHWC)
        if self.half is None or self._sampled == SAMPLE_BATCHES:
            return self._encode(images_BCHW, self.half)
        codes_BN = self._encode(images_BCHW, None)
        self._equal += int((codes_BN == self._encode(images_BCHW, self.half)).sum())
        self._compared += codes_BN.numel()
        self._sampled += 1
        if self._sampled == SAMPLE_BATCHES and self._equal < AGREEMENT * self._compared:
            self.half = None
        return codes_BN

    def _images(self, pixels_BHWC: PixelBatch) -> Tensor:
        """images_BCHW in [0, 1], channels last as they came, on the tokenizer's device."""
        import torch

        pixels = torch.from_numpy(pixels_BHWC)
        device = next(self.dvae.parameters()).device
        if device.type == "cuda":
            pixels = pixels.pin_memory().to(device, non_blocking=True)  # bytes: a quarter of the floats
        return pixels.permute(0, 3, 1, 2).float().div_(255.0)

    def _encode(self, images_BCHW: Tensor, half: torch.dtype | None) -> Tensor:
        import torch

        self.dvae.run_residuals_in(half)
        with torch.inference_mode():
            return self.dvae.encode(images_BCHW)
