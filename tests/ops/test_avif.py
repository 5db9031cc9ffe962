from __future__ import annotations

import io
import random
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from ops import demo_web
from ops.avif import AvifHeader, is_avif, read_avif
from ops.pictures import Header, decode, read_header
from ops.reasons import Reason, Rejected
from tests.hostile_web import psnr, saved

REPO = Path(__file__).parents[2]
RGB = Image.fromarray(demo_web.draw(3, 240, 208))
RGBA = RGB.copy()
RGBA.putalpha(128)


def with_size(data: bytes, width: int, height: int) -> bytes:
    """The same file with another size in its boxes."""
    changed = bytearray(data)
    at = -1
    while (at := changed.find(b"ispe", at + 1)) >= 0:
        changed[at + 8 : at + 16] = struct.pack(">II", width, height)
    return bytes(changed)


@pytest.mark.parametrize(
    ("picture", "options"),
    [
        (RGB, {}),
        (RGB.convert("L"), {}),
        (RGBA, {}),
        (RGB, {"subsampling": "4:4:4", "quality": 100}),
        (RGB, {"icc_profile": b"x" * 70_000}),
    ],
)
def test_the_boxes_tell_size_and_alpha(picture: Image.Image, options: dict[str, Any]) -> None:
    data = saved(picture, "AVIF", **options)
    assert is_avif(data)
    assert read_avif(data) == AvifHeader(240, 208, 1, picture.mode == "RGBA")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_come_out_upright_as_pillow_shows_them(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(RGB, "AVIF", exif=exif, quality=90)
    header = read_header(data)
    assert isinstance(header, Header)
    pixels = decode(data, header, 9999)
    with Image.open(io.BytesIO(data)) as picture:
        upright = np.array(ImageOps.exif_transpose(picture))
    assert isinstance(pixels, np.ndarray)
    assert (header.height, header.width) == pixels.shape[:2] == upright.shape[:2]
    assert psnr(pixels, upright) > 60
    assert header.orientation == orientation


def test_alpha_is_laid_on_white() -> None:
    clear = RGB.copy()
    clear.putalpha(0)
    data = saved(clear, "AVIF")
    header = read_header(data)
    assert isinstance(header, Header)
    pixels = decode(data, header, 9999)
    assert isinstance(pixels, np.ndarray)
    assert pixels.min() == 255


def test_a_sequence_is_not_taken() -> None:
    assert read_header(saved(RGB, "AVIF", save_all=True, append_images=[RGB.rotate(9)])) == Rejected(
        Reason.NOT_AN_IMAGE
    )


@pytest.mark.parametrize("picture", [RGB, RGBA], ids=["RGB", "RGBA"])
def test_boxes_that_say_less_than_the_picture_inside_are_refused(picture: Image.Image) -> None:
    data = saved(picture, "AVIF")
    for size in ((239, 208), (240, 207), (8, 8), (0, 0)):
        assert read_header(with_size(data, *size)) == Rejected(Reason.DECODE, "header")


def test_boxes_that_say_more_than_the_picture_inside_are_refused_when_it_is_decoded_or_filtered() -> None:
    data = with_size(saved(RGB, "AVIF"), 60_000, 60_000)
    header = read_header(data)
    assert isinstance(header, Header)
    assert header.width * header.height > 10**9
    assert decode(data, header, 384) == Rejected(Reason.DECODE, "avif")


def test_a_small_file_with_a_huge_picture_inside_costs_no_memory(tmp_path: Path) -> None:
    """6,000 x 6,000 in 1 kB whose boxes say 300 x 240: Pillow gives it room, and shows it."""
    liar = tmp_path / "liar.avif"
    liar.write_bytes(with_size(saved(Image.new("RGB", (6000, 6000), "teal"), "AVIF", speed=10), 300, 240))
    program = """
import sys
from pathlib import Path
from ops.pictures import quiet_cv2, read_header
from tests.hostile_web import peak_mb
data = Path(sys.argv[1]).read_bytes()
quiet_cv2()
before = peak_mb()
print(read_header(data).reason, peak_mb() - before)
"""
    run = subprocess.run(
        [sys.executable, "-c", program, str(liar)], cwd=REPO, capture_output=True, text=True, check=True
    )
    reason, grown_mb = run.stdout.split()
    assert reason == "decode"
    assert float(grown_mb) < 10


def test_no_bytes_make_the_header_or_the_decoder_raise() -> None:
    whole, rng = saved(RGBA, "AVIF"), random.Random(1)
    ends = set()
    for n in range(400):
        data = bytearray(whole[: rng.randrange(len(whole))] if n % 4 == 0 else whole)
        for _ in range(rng.randrange(1, 4)):
            if data:
                data[rng.randrange(min(len(data), 600))] = rng.randrange(256)
        header = read_header(bytes(data))
        answer: object = header
        if isinstance(header, Header) and header.width * header.height < 10**6:
            answer = decode(bytes(data), header, 16)
        ends.add(str(answer.reason) if isinstance(answer, Rejected) else "success")
    assert {"decode", "not_an_image", "success"} == ends


@pytest.mark.parametrize("share", [0.5, 0.95])
def test_a_cut_file_is_refused(share: float) -> None:
    data = saved(RGB, "AVIF", quality=90)
    assert read_header(data[: int(len(data) * share)]) == Rejected(Reason.DECODE, "header")
