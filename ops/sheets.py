"""Sheets: PNG grids of pictures with their captions, for people. May not live here: where pictures come from."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from torch import Tensor

Pixels = np.ndarray[Any, np.dtype[np.uint8]]

MARGIN_PX = 6
FONT_PX = 11
LABEL_LINES = 3
INK, PAPER = (40, 40, 40), (255, 255, 255)


@dataclass(frozen=True)
class Cell:
    """One picture of a sheet (RGB, HWC) and the text below it."""

    pixels: Pixels
    label: str = ""


def to_pixels(images_BCHW: Tensor) -> Pixels:
    """uint8 pictures BHWC of floats in [0, 1]."""
    scaled = images_BCHW.detach().float().clamp(0.0, 1.0).mul(255.0).round().byte()
    pixels: Pixels = scaled.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return pixels


def png(pixels: Pixels) -> bytes:
    """One picture (HWC) as PNG."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def draw_sheet(rows: Sequence[Sequence[Cell]], title: str = "", cell_px: int = 96) -> bytes:
    """A PNG of rows of cells, each picture enlarged by a whole factor to at least `cell_px` pixels, never smoothed.

    Rows may have different lengths. Raises ValueError for a sheet without cells.
    """
    cells = [cell for row in rows for cell in row]
    if not cells:
        raise ValueError("a sheet needs at least one picture")
    sides = [max(1, -(-cell_px // cell.pixels.shape[0])) * cell.pixels.shape[0] for cell in cells]
    side = max(sides)
    font = ImageFont.load_default(size=FONT_PX)
    labels_px = [(FONT_PX + 3) * LABEL_LINES if any(cell.label for cell in row) else 0 for row in rows]
    title_px = FONT_PX + 2 * MARGIN_PX if title else 0
    columns = max(len(row) for row in rows)
    width = MARGIN_PX + columns * (side + MARGIN_PX)
    height = title_px + MARGIN_PX + len(rows) * (side + MARGIN_PX) + sum(labels_px)
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((MARGIN_PX, MARGIN_PX), _printable(title), fill=INK, font=font)
    for r, row in enumerate(rows):
        for c, cell in enumerate(row):
            x = MARGIN_PX + c * (side + MARGIN_PX)
            y = title_px + MARGIN_PX + r * (side + MARGIN_PX) + sum(labels_px[:r])
            picture = Image.fromarray(cell.pixels).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(picture, (x, y))
            lines = textwrap.wrap(_printable(cell.label), max(8, side // 6))[:LABEL_LINES]
            draw.multiline_text((x, y + side + 1), "\n".join(lines), fill=INK, font=font, spacing=2)
    return png(np.asarray(sheet))


def _printable(text: str) -> str:
    # The font that comes with Pillow has Latin letters only; others would be drawn as boxes.
    return " ".join(text.replace("–", "-").encode("latin-1", "replace").decode("latin-1").split())
