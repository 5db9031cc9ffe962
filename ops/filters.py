"""Which pairs are wanted, in order of cost: the caption before anything is fetched, the header before anything is
decoded, the pixels last. A filter is one function and one line in a table; it returns None or says why not.

Not here: how bytes become pixels (ops/pictures.py). Paper, section 2.2 and appendix C: captions too short, not English
or boilerplate, aspect ratios outside [1/2, 2].
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from ops.pictures import Header, quiet_cv2
from ops.reasons import Reason, Rejected

if TYPE_CHECKING:
    import numpy as np

    Pixels = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
class FilterSettings:
    """What is wanted. All of it bears identity."""

    caption_required: bool = True
    """Whether a pair without a caption (none, or spaces only) is rejected."""
    min_caption_chars: Annotated[int, Field(ge=0)] = 3
    """Characters without the spaces around; the paper rejects "too short" without a number, LAION below 5. One short
    noun ("cat") is a caption."""
    max_caption_chars: Annotated[int, Field(ge=1)] = 1000
    """Characters: about what 256 text positions hold. Longer texts are pages, not captions."""
    min_side_px: Annotated[int, Field(ge=1)] = 200
    """Pixels of the short side (DataComp's basic filter). Pictures are never enlarged when they are stored."""
    max_aspect: Annotated[float, Field(ge=1)] = 2.0
    """Long side over short side; the paper keeps [1/2, 2]."""
    max_pixels: Annotated[int, Field(ge=1)] = 50_000_000
    """Pixels of the whole picture: more are not decoded, a bomb has 400 million in 50 kB."""
    flat_std: Annotated[float, Field(ge=0)] = 2.0
    """Standard deviation, in levels of 255, which a channel must reach; JPEG noise on one colour is below 1."""


# --- captions: a pair without one comes here as "" ------------------------------------------------------------------
def caption_missing(caption: str, settings: FilterSettings) -> Rejected | None:
    """No caption, or spaces only."""
    return Rejected(Reason.CAPTION_MISSING) if settings.caption_required and not caption.strip() else None


def caption_encoding(caption: str, settings: FilterSettings) -> Rejected | None:
    """Characters that no text has: the mark of a failed decoding, half of a surrogate pair, control characters."""
    if caption.isascii() and caption.isprintable():
        return None
    broken = any(c == "\ufffd" or (unicodedata.category(c) in ("Cc", "Cs") and c not in "\t\n\r") for c in caption)
    return Rejected(Reason.CAPTION_ENCODING) if broken else None


def caption_short(caption: str, settings: FilterSettings) -> Rejected | None:
    """Fewer than `min_caption_chars`, though there is one."""
    too_short = 0 < len(caption.strip()) < settings.min_caption_chars
    return Rejected(Reason.CAPTION_SHORT) if too_short else None


def caption_long(caption: str, settings: FilterSettings) -> Rejected | None:
    """More than `max_caption_chars`."""
    return Rejected(Reason.CAPTION_LONG) if len(caption.strip()) > settings.max_caption_chars else None


# --- headers ---------------------------------------------------------------------------------------------------------
def pixels_too_many(header: Header, settings: FilterSettings) -> Rejected | None:
    """More than `max_pixels`; first, since everything after it costs memory."""
    return Rejected(Reason.PIXELS_TOO_MANY) if header.width * header.height > settings.max_pixels else None


def too_small(header: Header, settings: FilterSettings) -> Rejected | None:
    """The short side is below `min_side_px`."""
    return Rejected(Reason.TOO_SMALL) if min(header.width, header.height) < settings.min_side_px else None


def aspect(header: Header, settings: FilterSettings) -> Rejected | None:
    """The long side is more than `max_aspect` times the short one."""
    long, short = max(header.width, header.height), min(header.width, header.height)
    return Rejected(Reason.ASPECT) if long > settings.max_aspect * short else None


# --- pixels ----------------------------------------------------------------------------------------------------------
def flat_image(pixels: Pixels, settings: FilterSettings) -> Rejected | None:
    """One colour, as placeholders for a deleted picture often are."""
    _, std = quiet_cv2().meanStdDev(pixels)
    return Rejected(Reason.FLAT_IMAGE) if float(std.max()) < settings.flat_std else None


CAPTION_FILTERS: dict[str, Callable[[str, FilterSettings], Rejected | None]] = {
    "caption_missing": caption_missing,
    "caption_encoding": caption_encoding,
    "caption_short": caption_short,
    "caption_long": caption_long,
}
"""Before the fetch. The order decides which reason a pair gets when several apply."""

HEADER_FILTERS: dict[str, Callable[[Header, FilterSettings], Rejected | None]] = {
    "pixels_too_many": pixels_too_many,
    "too_small": too_small,
    "aspect": aspect,
}
"""After the fetch, before decoding."""

PIXEL_FILTERS: dict[str, Callable[[Pixels, FilterSettings], Rejected | None]] = {
    "flat_image": flat_image,
}
"""After decoding."""


def judge_caption(caption: str | None, settings: FilterSettings) -> Rejected | None:
    """The first caption filter that says no, or None.

    >>> judge_caption("  ", FilterSettings()).reason
    <Reason.CAPTION_MISSING: 'caption_missing'>
    """
    return _first_no(CAPTION_FILTERS, caption or "", settings)


def judge_header(header: Header, settings: FilterSettings) -> Rejected | None:
    """The first header filter that says no, or None."""
    return _first_no(HEADER_FILTERS, header, settings)


def judge_pixels(pixels: Pixels, settings: FilterSettings) -> Rejected | None:
    """The first pixel filter that says no, or None. Pixels are [height, width, 3] uint8 RGB of any size."""
    return _first_no(PIXEL_FILTERS, pixels, settings)


def _first_no(
    table: dict[str, Callable[[Any, FilterSettings], Rejected | None]], what: Any, settings: FilterSettings
) -> Rejected | None:
    for judge in table.values():
        if (no := judge(what, settings)) is not None:
            return no
    return None
