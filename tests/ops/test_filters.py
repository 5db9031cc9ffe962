from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from ops import demo_web
from ops.filters import (
    CAPTION_FILTERS,
    HEADER_FILTERS,
    PIXEL_FILTERS,
    FilterSettings,
    judge_captions,
    judge_header,
    judge_pixels,
)
from ops.pictures import Header, decode_stored, encode_jpeg
from ops.reasons import Reason, ReasonClass, Rejected, reason_class


def reason(rejected: Rejected | None) -> str | None:
    return None if rejected is None else str(rejected.reason)


@pytest.mark.parametrize(
    ("caption", "why"),
    [
        ("cat", None), ("  a red apple ", None), ("x" * 1000, None),
        ("naïve café ☕ 猫\tand\nmore", None), ("👩‍⚖️ judge", None),
        (None, "caption_missing"), ("", "caption_missing"), (" \n", "caption_missing"),
        ("ox", "caption_short"), (" a ", "caption_short"), ("x" * 1001, "caption_long"),
        ("caf\ufffd au lait", "caption_encoding"), ("a cat\0", "caption_encoding"),
        ("half \ud83d pair", "caption_encoding"),
        ("red \x1b[31m text", "caption_encoding"), ("\ufffd", "caption_encoding"),
    ],
)  # fmt: skip
def test_captions_are_judged_before_anything_is_fetched(caption: str | None, why: str | None) -> None:
    assert judge_captions([caption], FilterSettings()).reasons == [why]


def test_a_pair_may_do_without_a_caption_where_none_is_required() -> None:
    settings = FilterSettings(caption_required=False)
    assert judge_captions([None, "  ", "a"], settings).reasons == [None, None, "caption_short"]


@pytest.mark.parametrize(
    ("width", "height", "why"),
    [
        (200, 400, None), (400, 200, None), (200, 401, "aspect"), (401, 200, "aspect"),
        (199, 300, "too_small"), (300, 199, "too_small"), (199, 800, "too_small"),
        (10_000, 5_000, None), (10_001, 5_000, "pixels_too_many"), (20_000, 20_000, "pixels_too_many"),
        (60_000_000, 1, "pixels_too_many"),
    ],
)  # fmt: skip
def test_headers_are_judged_at_their_limits(width: int, height: int, why: str | None) -> None:
    assert reason(judge_header(Header("png", width, height), FilterSettings())) == why


def test_flat_pictures_are_rejected_and_small_drawings_are_not() -> None:
    settings = FilterSettings()
    flat = np.full((96, 120, 3), (200, 30, 90), np.uint8)
    assert reason(judge_pixels(flat, settings)) == "flat_image"
    assert reason(judge_pixels(decode_stored(encode_jpeg(flat, 50)), settings)) == "flat_image"
    flat[40:56, 50:66] = 0
    assert judge_pixels(flat, settings) is None
    only_blue = np.zeros((96, 120, 3), np.uint8)
    only_blue[:48, :, 2] = 8  # one channel is enough
    assert judge_pixels(only_blue, settings) is None
    assert judge_pixels(demo_web.draw(1), settings) is None


def test_a_filter_gives_the_reason_it_is_named_after_and_that_is_a_policy() -> None:
    for name in [*CAPTION_FILTERS, *HEADER_FILTERS, *PIXEL_FILTERS]:
        assert reason_class(Reason(name)) is ReasonClass.POLICY


def test_limits_that_make_no_sense_are_refused() -> None:
    for bad in ({"max_aspect": 0.5}, {"min_side_px": 0}, {"min_side": 3}, {"flat_std": -1}):
        with pytest.raises(ValidationError):
            FilterSettings(**bad)
