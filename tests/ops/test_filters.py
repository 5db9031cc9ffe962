from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from ops import demo_web
from ops.filters import (
    CAPTION_FILTERS,
    FILE_FILTERS,
    HEADER_FILTERS,
    PIXEL_FILTERS,
    FilterSettings,
    judge_captions,
    judge_file,
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


def test_words_are_counted_where_a_least_number_is_asked_for() -> None:
    captions = ["a red apple", "red  apple", " apple ", "", "a red\napple tree"]
    reasons = judge_captions(captions, FilterSettings(min_caption_words=3)).reasons
    assert reasons == [None, "caption_short", "caption_short", "caption_missing", None]


def test_boilerplate_is_rejected_with_the_pattern_s_name_unless_it_is_wanted() -> None:
    verdicts = judge_captions(["IMG_1234.jpg", "a red apple"], FilterSettings())
    assert verdicts.reasons == ["caption_boilerplate", None]
    assert verdicts.details == ["a camera's file name", None]
    assert judge_captions(["IMG_1234.jpg"], FilterSettings(boilerplate=0)).reasons == [None]


LONG = {
    "de": "ein kleiner Hund läuft am Strand entlang, während die Sonne untergeht",
    "fr": "Vue sur la vieille ville avec le château en arrière-plan",
    "es": "Una mujer con abrigo rojo espera en la parada del autobús",
    "it": "Soggiorno con un divano grigio e molte piante",
    "pt": "um cachorro pequeno corre pela praia enquanto o sol se põe",
    "nl": "Een vrouw in een rode jas wacht bij de bushalte",
    "pl": "Widok na stare miasto z zamkiem w tle",
    "sv": "en liten hund springer längs stranden medan solen går ner",
    "tr": "güneş batarken küçük bir köpek sahilde koşuyor",
    "cs": "Žena v červeném kabátě čeká na autobusové zastávce",
    "vi": "Quang cảnh phố cổ với lâu đài phía sau",
    "ru": "Гостиная с серым диваном и множеством растений",
    "zh": "一只小狗在海滩上奔跑，太阳正在落山",
    "ja": "灰色のソファとたくさんの植物があるリビングルーム",
    "ar": "منظر للمدينة القديمة والقلعة في الخلفية",
}
SHORT = ["красное яблоко", "海滩上的狗", "夜の大聖堂", "كلب على الشاطئ", "quả táo đỏ", "Blauwe jurk voor dames"]
DOUBTFUL = ["dove", "bone", "top hat", "spaghetti alla carbonara", "Toyota Corolla 2014 sedan", "Tour Eiffel, Paris"]


def test_what_is_probably_another_language_is_rejected_and_every_language_is_told() -> None:
    verdicts = judge_captions(list(LONG.values()), FilterSettings())
    assert verdicts.reasons == ["caption_language"] * len(LONG)
    assert verdicts.languages == list(LONG)
    assert judge_captions(SHORT, FilterSettings()).reasons == ["caption_language"] * len(SHORT)


def test_a_short_english_caption_that_the_model_takes_for_another_language_stays() -> None:
    verdicts = judge_captions(DOUBTFUL, FilterSettings())
    assert verdicts.reasons == [None] * 3 + ["caption_language"] + [None] * 2  # carbonara is Italian with 0.98
    assert "en" not in verdicts.languages
    assert judge_captions(DOUBTFUL, FilterSettings(foreign_certainty=(0,))).reasons == ["caption_language"] * 6


def test_no_caption_of_openmoji_is_rejected_for_its_language() -> None:
    openmoji = pytest.importorskip("ops.openmoji")
    captions = [described.caption for described in openmoji.describe(openmoji.names())]
    verdicts = judge_captions(captions, FilterSettings(min_caption_chars=2))
    assert [caption for caption, no in zip(captions, verdicts.reasons, strict=True) if no] == []


def test_other_languages_may_be_wanted_or_all() -> None:
    german = [LONG["de"], LONG["fr"], "a small dog on the beach at sunset"]
    assert judge_captions(german, FilterSettings(languages=("de", "fr"))).reasons == [None, None, "caption_language"]
    verdicts = judge_captions(german, FilterSettings(languages=()))
    assert verdicts.reasons == [None] * 3
    assert verdicts.languages == ["de", "fr", "en"]


def test_the_language_is_asked_last_and_only_where_there_is_text() -> None:
    verdicts = judge_captions(["IMG_1234", "", "a red apple"], FilterSettings(caption_required=False))
    assert verdicts.languages == [None, None, "en"]
    assert [probability is None for probability in verdicts.probabilities] == [True, True, False]


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


def test_files_are_judged_by_their_bytes_where_a_least_number_is_asked_for() -> None:
    assert judge_file(4_999, FilterSettings()) is judge_file(5_000, FilterSettings(min_bytes=5_000)) is None
    assert judge_file(4_999, FilterSettings(min_bytes=5_000)) == Rejected(Reason.TOO_SMALL, "bytes")


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
    for name in [*CAPTION_FILTERS, *FILE_FILTERS, *HEADER_FILTERS, *PIXEL_FILTERS]:
        assert reason_class(Reason(name)) is ReasonClass.POLICY


def test_limits_that_make_no_sense_are_refused() -> None:
    for bad in (
        {"max_aspect": 0.5},
        {"min_side_px": 0},
        {"min_side": 3},
        {"flat_std": -1},
        {"boilerplate": 2},
        {"foreign_certainty": ()},
    ):
        with pytest.raises(ValidationError):
            FilterSettings(**bad)
