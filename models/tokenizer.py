"""What every picture tokenizer offers, whatever its codes are made with. Only the interface lives here."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class ImageTokenizer(Protocol):
    """Pictures to codes and back. Pictures are float32 RGB in [0, 1], square, `image_size` pixels a side."""

    @property
    def image_size(self) -> int:
        """Pixels a side."""

    @property
    def grid(self) -> int:
        """Codes a side: a picture has N = grid² of them, in raster order."""

    @property
    def vocabulary(self) -> int:
        """Codes are 0 … vocabulary − 1."""

    def encode(self, images_BCHW: Tensor) -> Tensor:
        """codes_BN, int64."""

    def decode(self, codes_BN: Tensor) -> Tensor:
        """images_BCHW, float32 in [0, 1]."""
