"""Which pairs are wanted, in order of cost: the caption before anything is fetched, the header before anything is
decoded, the pixels last. A filter is one function and one line in a table; it returns None or says why not.

Not here: how bytes become pixels (ops/pictures.py). Paper, section 2.2 and appendix C: captions too short, not English
or boilerplate, aspect ratios outside [1/2, 2].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass as plain_dataclass
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from ops.boilerplate import VERSION, find_boilerplate
from ops.languages import Guess, LanguageModel, guess_languages
from ops.pictures import Header, quiet_cv2
from ops.reasons import Reason, Rejected

Certainty = Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(min_length=1)]
Pixels = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
class FilterSettings:
    """What is wanted. All of it bears identity."""

    caption_required: bool = True
    """Whether a pair without a caption (none, or spaces only) is rejected."""
    min_caption_chars: Annotated[int, Field(ge=0)] = 3
    """Characters without the spaces around; the paper rejects "too short" without a number, LAION below 5. One short
    noun ("cat") is a caption."""
    min_caption_words: Annotated[int, Field(ge=0)] = 0
    """Words between spaces; DataComp wants 3. For lists in languages without spaces leave it at 0."""
    max_caption_chars: Annotated[int, Field(ge=1)] = 1000
    """Characters: about what 256 text positions hold. Longer texts are pages, not captions."""
    languages: tuple[str, ...] = ("en",)
    """ISO 639 codes of the captions that are wanted; none means all. The paper's is English."""
    language_model: LanguageModel = "lid176"
    """What tells the language: fastText's lid.176 (fast), or CLD3, the paper's (`gcld3`)."""
    foreign_certainty: Certainty = (0.98, 0.98, 0.9, 0.85, 0.6, 0.5)
    """How sure the model must be of a language that is not wanted before a caption is rejected: of captions with one
    word, two, three … and the last number for all longer ones; a letter outside ASCII counts as a word. Both models
    misjudge short captions ("dove" is Italian with 0.94), these numbers keep every name of OpenMoji. Above 1 is never.
    [0] is the rule of DataComp: the most probable language must be a wanted one."""
    boilerplate: Literal[0, 1] = VERSION
    """Version of the patterns of captions that say nothing ("IMG_1234", "click to enlarge"); 0 keeps these captions."""
    min_bytes: Annotated[int, Field(ge=0)] = 0
    """Bytes of the file as it is fetched; LAION wants 5,000."""
    min_side_px: Annotated[int, Field(ge=1)] = 200
    """Pixels of the short side (DataComp's basic filter). Pictures are never enlarged when they are stored."""
    max_aspect: Annotated[float, Field(ge=1)] = 2.0
    """Long side over short side; the paper keeps [1/2, 2]."""
    max_pixels: Annotated[int, Field(ge=1)] = 50_000_000
    """Pixels of the whole picture: more are not decoded, a bomb has 400 million in 50 kB."""
    flat_std: Annotated[float, Field(ge=0)] = 2.0
    """Standard deviation, in levels of 255, which a channel must reach; JPEG noise on one colour is below 1."""


# --- captions: a pair without one comes here as ""; the rows that are rejected, each with its detail ------------------
def caption_missing(captions: pa.StringArray, settings: FilterSettings) -> dict[int, str]:
    """No caption, or spaces only."""
    return _rows(pc.equal(_length(captions), 0)) if settings.caption_required else {}


def caption_encoding(captions: pa.StringArray, settings: FilterSettings) -> dict[int, str]:
    """Characters that no text has: the mark of a failed decoding, control characters."""
    return _rows(pc.match_substring_regex(captions, r"[\x{FFFD}\x00-\x08\x0B\x0C\x0E-\x1F\x7F-\x{9F}]"))


def caption_short(captions: pa.StringArray, settings: FilterSettings) -> dict[int, str]:
    """Fewer than `min_caption_chars` or `min_caption_words`, though there is one."""
    length = _length(captions)
    too_short = pc.less(length, settings.min_caption_chars)
    if settings.min_caption_words > 1:
        too_short = pc.or_(too_short, pc.less(pc.count_substring_regex(captions, r"\S+"), settings.min_caption_words))
    return _rows(pc.and_(pc.greater(length, 0), too_short))


def caption_long(captions: pa.StringArray, settings: FilterSettings) -> dict[int, str]:
    """More than `max_caption_chars`."""
    return _rows(pc.greater(_length(captions), settings.max_caption_chars))


def caption_boilerplate(captions: pa.StringArray, settings: FilterSettings) -> dict[int, str]:
    """More than half of it says nothing about the picture; the detail names the pattern."""
    return find_boilerplate(captions) if settings.boilerplate else {}


def is_foreign(caption: str, guess: Guess, settings: FilterSettings) -> bool:
    """Whether it is probably in a language that is not wanted; doubt keeps it, and there is more of it in few words."""
    if not settings.languages or guess.language in settings.languages:
        return False
    words = len(caption.split()) + sum(c.isalpha() and not c.isascii() for c in caption)
    return guess.probability >= settings.foreign_certainty[min(words, len(settings.foreign_certainty)) - 1]


def _length(captions: pa.StringArray) -> pa.Array:
    return pc.utf8_length(pc.utf8_trim_whitespace(captions))


def _rows(mask: pa.BooleanArray, detail: str = "") -> dict[int, str]:
    return dict.fromkeys(np.flatnonzero(mask.to_numpy(zero_copy_only=False)).tolist(), detail)


# --- files and headers -----------------------------------------------------------------------------------------------
def too_few_bytes(size: int, settings: FilterSettings) -> Rejected | None:
    """The file is smaller than `min_bytes`: a button, a pixel that counts visitors."""
    return Rejected(Reason.TOO_SMALL, "bytes") if size < settings.min_bytes else None


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


CAPTION_FILTERS: dict[str, Callable[[pa.StringArray, FilterSettings], dict[int, str]]] = {
    "caption_missing": caption_missing,
    "caption_encoding": caption_encoding,
    "caption_short": caption_short,
    "caption_long": caption_long,
    "caption_boilerplate": caption_boilerplate,
}
"""Before the fetch, and before the language, which costs most. The order decides which of several reasons is given."""

FILE_FILTERS: dict[str, Callable[[int, FilterSettings], Rejected | None]] = {
    "too_small": too_few_bytes,
}
"""After the fetch, from the number of bytes alone."""

HEADER_FILTERS: dict[str, Callable[[Header, FilterSettings], Rejected | None]] = {
    "pixels_too_many": pixels_too_many,
    "too_small": too_small,
    "aspect": aspect,
}
"""From the header's sizes, before decoding."""

PIXEL_FILTERS: dict[str, Callable[[Pixels, FilterSettings], Rejected | None]] = {
    "flat_image": flat_image,
}
"""After decoding."""


@plain_dataclass(frozen=True)
class CaptionVerdicts:
    """One entry a caption, in order. `reasons` and `details` are None for a caption that is wanted."""

    reasons: list[Reason | None]
    details: list[str | None]
    languages: list[str | None]
    """ISO 639 codes; None where a cheaper filter said no already, or there is no text."""
    probabilities: list[float | None]
    """How sure the language model is of that language, in [0, 1]."""


def judge_captions(captions: Sequence[str | None] | pa.StringArray, settings: FilterSettings) -> CaptionVerdicts:
    """What the caption filters say, the language last. Many at once: a regular expression costs a call, not a text.

    >>> judge_captions(["  ", "a red apple on a table"], FilterSettings()).reasons
    [<Reason.CAPTION_MISSING: 'caption_missing'>, None]
    """
    texts = _texts(captions)
    count = len(texts)
    verdicts = CaptionVerdicts([None] * count, [None] * count, [None] * count, [None] * count)
    for name, judge in CAPTION_FILTERS.items():
        for row, detail in judge(texts, settings).items():
            if verdicts.reasons[row] is None:
                verdicts.reasons[row], verdicts.details[row] = Reason(name), detail or None
    left = [(row, text) for row, text in enumerate(texts.to_pylist()) if text.strip() and not verdicts.reasons[row]]
    guesses = guess_languages([text for _, text in left], settings.language_model)
    for (row, text), guess in zip(left, guesses, strict=True):
        verdicts.languages[row], verdicts.probabilities[row] = guess
        if is_foreign(text, guess, settings):
            verdicts.reasons[row], verdicts.details[row] = Reason.CAPTION_LANGUAGE, None
    return verdicts


def _texts(captions: Sequence[str | None] | pa.StringArray) -> pa.StringArray:
    """Without nulls; half of a surrogate pair, which no UTF-8 can hold, becomes the mark of a failed decoding."""
    if not isinstance(captions, pa.Array):
        captions = pa.array(
            [(c or "").encode("utf-16", "surrogatepass").decode("utf-16", "replace") for c in captions], pa.string()
        )
    return captions.fill_null("")


def judge_file(size: int, settings: FilterSettings) -> Rejected | None:
    """The first file filter that says no to a file of `size` bytes, or None."""
    return _first_no(FILE_FILTERS, size, settings)


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
