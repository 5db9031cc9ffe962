from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import simplejpeg
from PIL import Image

from infra.cluster import QUIET
from ops import demo_web
from ops.pictures import (
    Header,
    decode,
    decode_stored,
    dhash,
    encode_jpeg,
    read_header,
    resize_short_side,
    tokenizer_crop,
    transformer_crop,
)
from ops.reasons import Reason, Rejected
from tests.hostile_web import psnr, saved

REPO = Path(__file__).parents[2]


def pixels_of(data: bytes, at_least_px: int = 10_000) -> np.ndarray:
    header = read_header(data)
    assert isinstance(header, Header)
    pixels = decode(data, header, at_least_px)
    assert isinstance(pixels, np.ndarray), pixels
    assert (pixels.dtype, pixels.shape[2], pixels.flags.c_contiguous) == (np.uint8, 3, True)
    return pixels


def photo(seed: int, width: int, height: int) -> np.ndarray:
    """Colours, edges and grain: harder on a reduced decode than most photographs."""
    rng = np.random.default_rng(seed)
    picture = demo_web.draw(seed, width, height).astype(np.float32)
    for _ in range(12):
        y, x = rng.integers(0, height - 60), rng.integers(0, width - 60)
        picture[y : y + rng.integers(20, 400), x : x + rng.integers(20, 400)] = rng.integers(0, 256, 3)
    grain = rng.integers(-8, 9, picture.shape, dtype=np.int8)
    picture = cv2.GaussianBlur(picture, (0, 0), 1.2) + grain
    return picture.clip(0, 255).astype(np.uint8)


# --- headers ---------------------------------------------------------------------------------------------------------
RGB = Image.fromarray(demo_web.draw(3, 90, 60))
RGBA = Image.fromarray(np.dstack([demo_web.draw(3, 90, 60), np.full((60, 90), 128, np.uint8)]))
EXIF_6 = Image.Exif()
EXIF_6[0x0112] = 6


@pytest.mark.parametrize(
    ("data", "want"),
    [
        (saved(RGB, "JPEG"), Header("jpeg", 90, 60)),
        (saved(RGB, "JPEG", progressive=True), Header("jpeg", 90, 60)),
        (saved(RGB.convert("L"), "JPEG"), Header("jpeg", 90, 60)),
        (saved(RGB.convert("CMYK"), "JPEG"), Header("jpeg", 90, 60)),
        (saved(RGB, "JPEG", exif=EXIF_6, icc_profile=b"x" * 99_999), Header("jpeg", 60, 90, 6)),
        (saved(RGB, "PNG"), Header("png", 90, 60)),
        (saved(RGBA, "PNG"), Header("png", 90, 60, has_alpha=True)),
        (saved(RGB, "PNG", transparency=(1, 2, 3)), Header("png", 90, 60, has_alpha=True)),
        (saved(RGB, "PNG", exif=EXIF_6), Header("png", 60, 90, 6)),
        (saved(RGB, "GIF"), Header("gif", 90, 60, has_alpha=True)),
        (saved(RGB, "BMP"), Header("bmp", 90, 60)),
        (saved(RGB, "WEBP"), Header("webp", 90, 60)),
        (saved(RGB, "WEBP", lossless=True), Header("webp", 90, 60)),
        (saved(RGBA, "WEBP"), Header("webp", 90, 60, has_alpha=True)),
        (saved(RGBA, "WEBP", lossless=True), Header("webp", 90, 60, has_alpha=True)),
        (saved(RGB, "WEBP", exif=EXIF_6), Header("webp", 60, 90, 6)),
    ],
)
def test_a_header_tells_the_upright_size_before_anything_is_decoded(data: bytes, want: Header) -> None:
    assert read_header(data) == want


@pytest.mark.parametrize("data", [b"", b"GIF", b"<html>", b"RIFF\0\0\0\0WAVEfmt ", saved(RGB, "TIFF")])
def test_other_bytes_are_not_an_image(data: bytes) -> None:
    assert read_header(data) == Rejected(Reason.NOT_AN_IMAGE)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "BMP", "WEBP"])
def test_no_bytes_make_a_header_or_a_decoder_raise(format: str) -> None:
    """Every cut, and bytes flipped at random: pixels or a reason."""
    whole, rng = saved(RGB, format), np.random.default_rng(0)
    cuts = [whole[:n] for n in [*range(60), *range(60, len(whole), 97)]]
    flips = []
    for _ in range(150):
        data = bytearray(whole)
        data[rng.integers(0, 64 if rng.random() < 0.5 else len(data))] = rng.integers(0, 256)
        flips.append(bytes(data))
    ends = set()
    for data in cuts + flips:
        header = read_header(data)
        answer = header if isinstance(header, Rejected) else None
        if isinstance(header, Header) and header.width * header.height < 10**6:
            pixels = decode(data, header, 16)
            answer = pixels if isinstance(pixels, Rejected) else None
        ends.add(str(answer.reason) if answer else "success")
    assert ends <= {"success", "decode", "not_an_image"}
    assert "decode" in ends


# --- decoding --------------------------------------------------------------------------------------------------------
def test_flat_and_smooth_pictures_come_back_as_they_were() -> None:
    rgb = demo_web.draw(5)
    for data, least_db in [
        (saved(Image.fromarray(rgb), "PNG"), 99),
        (saved(Image.fromarray(rgb), "BMP"), 99),
        (saved(Image.fromarray(rgb), "WEBP", lossless=True), 99),
        (saved(Image.fromarray(rgb), "JPEG", quality=95), 38),
    ]:
        assert psnr(pixels_of(data), rgb) >= least_db


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_pictures_are_upright_whatever_their_exif_says(orientation: int, format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(Image.fromarray(demo_web.draw(5)), format, exif=exif, **({} if format == "PNG" else {"quality": 95}))
    with Image.open(io.BytesIO(data)) as picture:
        picture.load()
        picture.getexif()[0x0112] = orientation
        from PIL import ImageOps

        upright = np.array(ImageOps.exif_transpose(picture).convert("RGB"))
    pixels = pixels_of(data)
    assert pixels.shape == upright.shape
    assert psnr(pixels, upright) > 40


def test_a_sideways_jpeg_is_upright_also_when_it_is_decoded_small() -> None:
    data = saved(Image.fromarray(demo_web.draw(5, 1200, 1000)), "JPEG", exif=EXIF_6)
    small, whole = pixels_of(data, 240), pixels_of(data)
    assert (small.shape, whole.shape) == ((300, 250, 3), (1200, 1000, 3))
    assert psnr(small, cv2.resize(whole, (250, 300), interpolation=cv2.INTER_AREA)) > 40


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_alpha_is_laid_on_white(format: str) -> None:
    rgba = np.zeros((60, 90, 4), np.uint8)
    rgba[:, 30:60] = (200, 100, 0, 128)
    rgba[:, 60:] = (200, 100, 0, 255)
    pixels = pixels_of(saved(Image.fromarray(rgba), format, **({"lossless": True} if format == "WEBP" else {})))
    assert pixels[30, 10].tolist() == [255, 255, 255]
    assert np.abs(pixels[30, 45].astype(int) - [227, 177, 127]).max() <= 1
    assert pixels[30, 75].tolist() == [200, 100, 0]


def test_every_form_of_transparency_is_laid_on_white() -> None:
    gray = Image.fromarray(np.repeat(np.arange(90, dtype=np.uint8)[None], 60, 0))
    rgb = Image.merge("RGB", [gray] * 3)
    cases = {
        "gray level": saved(gray, "PNG", transparency=20),
        "rgb level": saved(rgb, "PNG", transparency=(20, 20, 20)),
        "palette": saved(gray.convert("P"), "PNG", transparency=20),
        "gif": saved(gray.convert("P"), "GIF", transparency=20),
        "gray and alpha": saved(Image.merge("LA", [gray, gray.point(lambda level: 255 * (level != 20))]), "PNG"),
    }
    for name, data in cases.items():
        pixels = pixels_of(data)
        assert pixels[:, 20].min() == 255, name
        assert (pixels[:, 40] == 40).all(), name


def test_sixteen_bits_keep_their_levels() -> None:
    """img2dataset 1.47 makes these white."""
    rgb = demo_web.draw(5)
    wide = rgb.astype(np.uint16) * 257
    alpha = np.full((*rgb.shape[:2], 1), 65535, np.uint16)
    for array in (wide[:, :, ::-1], np.dstack([wide[:, :, ::-1], alpha])):
        assert psnr(pixels_of(cv2.imencode(".png", array)[1].tobytes()), rgb) > 50
    gray = pixels_of(cv2.imencode(".png", wide[:, :, 0])[1].tobytes())
    assert psnr(gray, np.repeat(rgb[:, :, :1], 3, 2)) > 50


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:0"])
def test_cmyk_has_pillows_colours(subsampling: str) -> None:
    data = saved(Image.fromarray(demo_web.draw(5)).convert("CMYK"), "JPEG", quality=95, subsampling=subsampling)
    with Image.open(io.BytesIO(data)) as picture:
        assert psnr(pixels_of(data), np.array(picture.convert("RGB"))) > 40


def test_gray_jpegs_have_three_equal_channels() -> None:
    pixels = pixels_of(saved(RGB.convert("L"), "JPEG"))
    assert (pixels[:, :, 0] == pixels[:, :, 2]).all()
    assert psnr(pixels[:, :, 0], np.array(RGB.convert("L"))) > 35


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_an_animation_gives_its_first_frame(format: str) -> None:
    frames = [Image.fromarray(demo_web.draw(seed)) for seed in (1, 2)]
    options = {"lossless": True} if format == "WEBP" else {}
    data = saved(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert psnr(pixels_of(data), demo_web.draw(1)) > 25  # a GIF has 256 colours


def test_a_gif_whose_first_frame_is_larger_than_it_says_is_refused() -> None:
    data = bytearray(saved(RGB, "GIF"))
    data[6:10] = b"\x10\0\x10\0"
    header = read_header(bytes(data))
    assert isinstance(header, Header)
    assert decode(bytes(data), header, 16) == Rejected(Reason.DECODE, "gif")


def test_corrupt_jpegs_are_refused_though_cv2_keeps_them() -> None:
    data = demo_web._corrupt()
    assert cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) is not None
    header = read_header(data)
    assert isinstance(header, Header)
    for at_least_px in (26, 10_000):  # also when it is decoded at an eighth
        assert decode(data, header, at_least_px) == Rejected(Reason.DECODE, "jpeg")


def test_a_reduced_decode_is_as_good_as_a_full_one() -> None:
    """Promise: median PSNR to full decode and area resize at least 40 dB; the scale is a power of two."""
    found = []
    for seed, (width, height) in enumerate([(1600, 1200), (1000, 800), (1030, 1537), (900, 1300), (3104, 1552)]):
        data = saved(Image.fromarray(photo(seed, width, height)), "JPEG", quality=90, progressive=seed % 2 == 1)
        reduced = pixels_of(data, 384)
        factor = round(width / reduced.shape[1])
        assert factor in (2, 4, 8)
        assert 384 <= min(reduced.shape[:2]) < 768
        reference = resize_short_side(pixels_of(data), 384)
        found.append(psnr(resize_short_side(reduced, 384), reference))
    assert np.median(found) >= 40, found
    assert min(found) >= 30, found


def test_a_chunk_that_claims_gigabytes_is_refused_from_the_header() -> None:
    data = bytearray(saved(RGB, "PNG"))
    data[33] = 0x7F  # the length of the first chunk after IHDR
    assert read_header(bytes(data)) == Rejected(Reason.DECODE, "header")


def test_a_picture_bomb_costs_no_memory(tmp_path: Path) -> None:
    """Neither where the header is judged nor, behind it, in the decoder: 20,000 x 20,000 would be 1.2 GB."""
    program = """
from ops.demo_web import _bomb
from ops.filters import FilterSettings, judge_header
from ops.pictures import decode, quiet_cv2, read_header
from tests.hostile_web import peak_mb
quiet_cv2()
data = _bomb()
before = peak_mb()
header = read_header(data)
print(judge_header(header, FilterSettings()).reason, decode(data, header, 384).reason)
print(peak_mb() - before)
"""
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=REPO, env=QUIET, capture_output=True, text=True, check=True
    )
    reasons, grown_mb = run.stdout.splitlines()
    assert reasons == "pixels_too_many decode"
    assert float(grown_mb) < 20


# --- storing ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("size", "want"),
    [((600, 900), (384, 576)), ((900, 600), (576, 384)), ((300, 700), (300, 700)), ((385, 385), (384, 384))],
)
def test_stored_pictures_keep_their_aspect_and_are_never_enlarged(size: tuple[int, int], want: tuple[int, int]) -> None:
    assert resize_short_side(np.zeros((*size, 3), np.uint8), 384).shape[:2] == want


@pytest.mark.parametrize(
    "size", [(480, 640), (683, 1024), (257, 300), (512, 768), (768, 768), (1024, 600), (2300, 2000)], ids=str
)
def test_a_resized_picture_has_the_bytes_of_cv2s_area_averaging(size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (*size, 3), np.uint8)
    small = resize_short_side(pixels, 256)
    assert (small == cv2.resize(pixels, small.shape[1::-1], interpolation=cv2.INTER_AREA)).all()


def test_storing_and_reading_back_is_a_round_trip_with_equal_bytes() -> None:
    pixels = demo_web.draw(9)
    data = encode_jpeg(pixels, 90)
    assert data == encode_jpeg(pixels.copy(), 90)
    assert simplejpeg.decode_jpeg_header(data)[2:] == ("YCbCr", "420")
    assert psnr(decode_stored(data), pixels) > 32
    assert len(encode_jpeg(pixels, 50)) < len(data)
    with pytest.raises(ValueError, match="Premature end"):
        decode_stored(data[: len(data) // 2])


def test_a_hash_survives_re_encoding_and_resizing_and_tells_pictures_apart() -> None:
    def apart(a: np.ndarray, b: np.ndarray) -> int:
        return (int(dhash(a), 16) ^ int(dhash(b), 16)).bit_count()

    pictures = [photo(seed, 600, 480) for seed in range(12)]
    assert len(dhash(pictures[0])) == 16
    for picture in pictures:
        assert apart(picture, decode_stored(encode_jpeg(picture, 50))) <= 4
        assert apart(picture, resize_short_side(picture, 300)) <= 4
    assert min(apart(a, b) for i, a in enumerate(pictures) for b in pictures[:i]) > 4


# --- crops -----------------------------------------------------------------------------------------------------------
def coordinates(width: int, height: int) -> np.ndarray:
    """Each pixel holds where it lies: x in red, y in green, as shares of 200."""
    y, x = np.mgrid[:height, :width]
    return np.dstack([x * 200 / width, y * 200 / height, 0 * x]).astype(np.uint8)


def test_tokenizer_crops_follow_listing_1() -> None:
    pixels, rng = coordinates(600, 400), np.random.default_rng(0)
    sides, lefts, flipped = [], [], 0
    for _ in range(300):
        crop = tokenizer_crop(pixels, 64, rng, crop=True, flip=True)
        assert crop.shape == (64, 64, 3)
        if is_flipped := int(crop[32, 0, 0]) > int(crop[32, -1, 0]):
            crop = crop[:, ::-1]
        flipped += is_flipped
        sides.append((int(crop[-1, 32, 1]) - int(crop[0, 32, 1])) / 200)  # share of the height that is seen
        lefts.append(crop[32, 0, 0] / 200 * 600)
    # A square of the whole height is resized to 72..96 and 64 of it are seen: 64/96 to 64/72 of the height.
    assert 0.62 < min(sides) < 0.70 < 0.84 < max(sides) < 0.91
    assert min(lefts) < 25
    assert max(lefts) > 250
    assert 100 < flipped < 200


def test_transformer_crops_follow_listing_2_and_record_what_they_saw() -> None:
    pixels, rng = coordinates(600, 400), np.random.default_rng(0)
    for _ in range(200):
        crop, (x, y, side) = transformer_crop(pixels, 64, rng, crop=True)
        assert crop.shape == (64, 64, 3)
        assert 400 * 64 / 72 - 0.01 <= side <= 400
        assert 75 <= x <= 125 + 400 - side
        assert 0 <= y <= 400 - side + 0.01
        assert int(crop[32, 0, 0]) < int(crop[32, -1, 0])  # never flipped
        seen_x, seen_y = crop[32, 32, 0] / 200 * 600, crop[32, 32, 1] / 200 * 400
        assert abs(seen_x - (x + side / 2)) < 12
        assert abs(seen_y - (y + side / 2)) < 12


def test_without_crop_it_is_the_central_square() -> None:
    pixels, rng = coordinates(600, 400), np.random.default_rng(0)
    crop, where = transformer_crop(pixels, 64, rng, crop=False)
    assert where == (100.0, 0.0, 400.0)
    assert (crop == cv2.resize(pixels[:, 100:500], (64, 64), interpolation=cv2.INTER_AREA)).all()
    assert (tokenizer_crop(pixels, 64, rng, crop=False, flip=False) == crop).all()
    either = {tokenizer_crop(pixels, 64, rng, crop=False, flip=True).tobytes() for _ in range(20)}
    assert either == {crop.tobytes(), crop[:, ::-1].tobytes()}


@pytest.mark.parametrize("side", [20, 64, 65, 71])
def test_pictures_at_or_below_the_models_size_are_cropped_too(side: int) -> None:
    pixels, rng = coordinates(side * 2, side), np.random.default_rng(0)
    for _ in range(10):
        assert tokenizer_crop(pixels, 64, rng, crop=True, flip=True).shape == (64, 64, 3)
        crop, (x, y, seen) = transformer_crop(pixels, 64, rng, crop=True)
        assert crop.shape == (64, 64, 3)
        assert seen <= side + 0.01
        assert x + seen <= 2 * side + 0.01
        assert y + seen <= side + 0.01


def test_a_crop_depends_on_its_generator_only() -> None:
    pixels = photo(0, 500, 400)
    one, two, other = (transformer_crop(pixels, 64, np.random.default_rng(seed), crop=True) for seed in (5, 5, 6))
    assert (one[0] == two[0]).all()
    assert one[1] == two[1] != other[1]
