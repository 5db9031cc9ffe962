"""Bytes to pixels and back: headers, decoding, resizing, cropping, hashing. What the web sent is decoded here only.

Not here: whether a picture is wanted (ops/filters.py). Pixels are always [height, width, 3] uint8 RGB, upright, on
white. Crops follow the paper's listings 1 and 2 (appendix A and B); they belong to readers and to tokenize, never to
ingestion, which keeps a picture's aspect.

cv2 is imported inside functions: it reads OPENCV_IO_MAX_IMAGE_PIXELS, the second line against picture bombs, once at
its import, and `infra.cluster.quiet_environment` sets it at the entry. The first line is the header, read before
anything is decoded.
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass as plain_dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from ops.avif import is_avif, read_avif
from ops.reasons import Reason, Rejected

if TYPE_CHECKING:
    Pixels = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
class PictureSettings:
    """How pictures are stored. All of it bears identity."""

    short_side_px: Annotated[int, Field(ge=8)] = 384
    """Pixels of the stored short side; 12/8 of the model's picture, the largest size the paper crops from. Smaller
    pictures stay as they are."""
    jpeg_quality: Annotated[int, Field(ge=1, le=100)] = 90
    """JPEG quality of stored pictures, 1 to 100, with chroma at half size (4:2:0)."""
    engine: Literal["armchair", "img2dataset"] = "armchair"
    """Who makes the JPEG of what was fetched: our code, or img2dataset's Downloader and Resizer at the same size and
    quality. It is slower, and white or sideways where ours is right (ops/img2dataset_engine.py)."""


@plain_dataclass(frozen=True)
class Header:
    """What the first bytes say, before anything is decoded. `width` and `height` are upright."""

    format: str
    width: int
    height: int
    orientation: int = 1
    """EXIF orientation of the stored rows, 1 (upright) to 8."""
    has_alpha: bool = False

    @property
    def stored_size(self) -> tuple[int, int]:
        """(width, height) of the stored rows."""
        return (self.height, self.width) if self.orientation >= 5 else (self.width, self.height)


# --- headers ---------------------------------------------------------------------------------------------------------
def read_header(data: bytes) -> Header | Rejected:
    """Format, upright size and orientation of JPEG, PNG, GIF, WebP, AVIF or BMP, without decoding: microseconds.

    Rejected is `not_an_image` for other bytes and `decode` for a header of these formats that is broken. TIFF, JPEG
    2000, HEIC, ICO and SVG are other bytes: browsers show no photographs in them, and each decoder is one more way in.
    """
    if is_avif(data):
        avif = read_avif(data)
        if avif is None or avif.width < 1 or avif.height < 1:
            return Rejected(Reason.DECODE, "header")
        return _upright("avif", avif.width, avif.height, avif.orientation, avif.has_alpha)
    for magic, read in _READERS.items():
        if data.startswith(magic) and (magic != b"RIFF" or data[8:12] == b"WEBP"):
            try:
                header = read(data)
            except (struct.error, IndexError):
                header = None
            if header is None or header.width < 1 or header.height < 1:
                return Rejected(Reason.DECODE, "header")
            return header
    return Rejected(Reason.NOT_AN_IMAGE)


def _upright(format: str, width: int, height: int, orientation: int, has_alpha: bool = False) -> Header:
    if orientation >= 5:
        width, height = height, width
    return Header(format, width, height, orientation, has_alpha)


def _read_jpeg(data: bytes) -> Header | None:
    at, orientation = 2, 1
    size: tuple[int, int] | None = None
    while True:
        if data[at] != 0xFF:
            return None
        while data[at] == 0xFF:  # any number of fill bytes
            at += 1
        marker = data[at]
        at += 1
        if marker == 0x01 or 0xD0 <= marker <= 0xD8:  # without a length
            continue
        if marker in (0xD9, 0xDA):  # the end, or the pixels
            break
        (length,) = struct.unpack_from(">H", data, at)
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC) and size is None:
            height, width = struct.unpack_from(">HH", data, at + 3)
            size = (width, height)
        elif marker == 0xE1 and data[at + 2 : at + 8] == b"Exif\0\0":
            orientation = _orientation(data[at + 8 : at + length])
        at += max(2, length)
    return _upright("jpeg", *size, orientation) if size else None


def _read_png(data: bytes) -> Header | None:
    if data[12:16] != b"IHDR":
        return None
    width, height, _, colour = struct.unpack_from(">IIBB", data, 16)
    has_alpha, orientation = colour in (4, 6), 1
    at, name = 8, b""
    # To the end: cv2 4.14 allocates what a chunk says it has, up to 3.5 GB for a file of 7 kB.
    while name != b"IEND":
        (length,) = struct.unpack_from(">I", data, at)
        name = data[at + 4 : at + 8]
        if at + 12 + length > len(data):
            return None
        if name == b"tRNS":
            has_alpha = True
        elif name == b"eXIf":
            orientation = _orientation(data[at + 8 : at + 8 + length])
        at += 12 + length
    return _upright("png", width, height, orientation, has_alpha)


def _read_gif(data: bytes) -> Header | None:
    width, height = struct.unpack_from("<HH", data, 6)
    return Header("gif", width, height, has_alpha=True)


def _read_bmp(data: bytes) -> Header | None:
    (size,) = struct.unpack_from("<I", data, 14)
    width, height = struct.unpack_from("<HH", data, 18) if size == 12 else struct.unpack_from("<ii", data, 18)
    return Header("bmp", width, abs(height))  # rows from the top have a negative height


def _read_webp(data: bytes) -> Header | None:
    name = data[12:16]
    if name == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return Header("webp", width & 0x3FFF, height & 0x3FFF)
    if name == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return Header("webp", (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1, has_alpha=bool(bits >> 28 & 1))
    if name != b"VP8X":
        return None
    width = int.from_bytes(data[24:27], "little") + 1
    height = int.from_bytes(data[27:30], "little") + 1
    orientation = 1
    at = 12
    while at + 8 <= len(data):
        (length,) = struct.unpack_from("<I", data, at + 4)
        if data[at : at + 4] == b"EXIF":
            orientation = _orientation(data[at + 8 : at + 8 + length].removeprefix(b"Exif\0\0"))
        at += 8 + length + length % 2
    return _upright("webp", width, height, orientation, has_alpha=bool(data[20] & 0x10))


_READERS = {
    b"\xff\xd8\xff": _read_jpeg,
    b"\x89PNG\r\n\x1a\n": _read_png,
    b"GIF87a": _read_gif,
    b"GIF89a": _read_gif,
    b"RIFF": _read_webp,
    b"BM": _read_bmp,
}


def _orientation(tiff: bytes) -> int:
    """Tag 0x0112 of the first directory of an EXIF block; 1 where it is missing or broken, as browsers do."""
    try:
        order = {b"II": "<", b"MM": ">"}[tiff[:2]]
        (start,) = struct.unpack_from(order + "I", tiff, 4)
        (entries,) = struct.unpack_from(order + "H", tiff, start)
        for i in range(entries):
            tag, kind, _, value = struct.unpack_from(order + "HHIH", tiff, start + 2 + 12 * i)
            if tag == 0x0112:
                return value if kind == 3 and 1 <= value <= 8 else 1
    except (KeyError, struct.error):
        pass
    return 1


# --- decoding --------------------------------------------------------------------------------------------------------
def decode(data: bytes, header: Header, at_least_px: int) -> Pixels | Rejected:
    """Pixels of the first frame: [height, width, 3] uint8 RGB, upright, transparency on white, 16 bits scaled to 8.

    A JPEG is decoded at 1/2, 1/4 or 1/8 where its short side stays at or above `at_least_px` (3 times faster on large
    photos). Corrupt and cut data is refused: `decode`.
    """
    try:
        if header.format == "jpeg":
            pixels = _decode_jpeg(data, header, at_least_px)
        elif header.format in ("gif", "avif") or (header.format == "png" and data[25] == 0 and header.has_alpha):
            pixels = _decode_pillow(data, header)  # cv2 loses the one transparent level of a gray PNG
        else:
            pixels = _decode_cv2(data, header)
    except _Undecodable:
        return Rejected(Reason.DECODE, header.format)
    return np.ascontiguousarray(_turned(pixels, header.orientation))


def decode_stored(data: bytes) -> Pixels:
    """Pixels of a JPEG that ingestion stored. Raises ValueError if it is damaged."""
    import simplejpeg

    pixels: Pixels = simplejpeg.decode_jpeg(data)
    return pixels


def encode_jpeg(pixels: Pixels, quality: int) -> bytes:
    """Pixels as a JPEG (4:2:0). The bytes depend on libjpeg-turbo's version, which receipts record."""
    import simplejpeg

    data: bytes = simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality=quality, colorsubsampling="420")
    return data


class _Undecodable(Exception):
    """The library refused the bytes."""


def _decode_jpeg(data: bytes, header: Header, at_least_px: int) -> Pixels:
    import simplejpeg

    width, height = header.stored_size
    # Powers of two only: libjpeg's other scales (3/8, 5/8 …) are faster than a resize but 20 dB worse.
    factor = next((f for f in (8, 4, 2) if min(width, height) >= f * at_least_px), 1)
    reduced = (-(-height // factor), -(-width // factor))
    try:
        # strict: libjpeg's warnings are errors. cv2 keeps corrupt pictures and prints to stderr.
        pixels: Pixels = simplejpeg.decode_jpeg(data, min_height=reduced[0], min_width=reduced[1])
    except ValueError as error:
        if "subsampling" in str(error):  # TurboJPEG knows the usual samplings only, for CMYK one; rare on the web
            return _decode_pillow(data, header)
        raise _Undecodable from error
    if pixels.shape[:2] != reduced:
        raise _Undecodable
    return pixels


def _decode_cv2(data: bytes, header: Header) -> Pixels:
    cv2 = quiet_cv2()
    # IMREAD_COLOR scales 16 bits right and drops alpha; UNCHANGED keeps both as they are.
    flags = cv2.IMREAD_UNCHANGED if header.has_alpha else cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:  # more than OPENCV_IO_MAX_IMAGE_PIXELS
        raise _Undecodable from error
    if pixels is None or pixels.shape[1::-1] != header.stored_size:
        raise _Undecodable
    if pixels.dtype == np.uint16:
        pixels = cv2.convertScaleAbs(pixels, alpha=1 / 257)
    if pixels.ndim == 2:
        return _as_pixels(cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB))
    if pixels.shape[2] == 4:
        return _on_white(cv2.cvtColor(pixels, cv2.COLOR_BGRA2RGBA))
    return _as_pixels(cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB))


def _decode_pillow(data: bytes, header: Header) -> Pixels:
    from PIL import AvifImagePlugin, Image

    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # a worker has its CPU, and threads of its own
    try:
        with Image.open(io.BytesIO(data)) as picture:
            if picture.size != header.stored_size:  # a first frame that is larger than its GIF
                raise _Undecodable
            return _on_white(np.array(picture.convert("RGBA")))
    except (OSError, ValueError, RuntimeError, SyntaxError, EOFError, Warning, Image.DecompressionBombError) as error:
        raise _Undecodable from error


def _on_white(pixels_rgba: Pixels) -> Pixels:
    """255 + (c - 255) * alpha / 255, rounded; img2dataset and browsers do the same."""
    pixels = np.empty((*pixels_rgba.shape[:2], 3), np.uint8)
    for y in range(0, len(pixels), 256):  # strips: 16-bit copies of a large picture would be three times its size
        alpha = pixels_rgba[y : y + 256, :, 3:].astype(np.uint16)
        pixels[y : y + 256] = (pixels_rgba[y : y + 256, :, :3] * alpha + 255 * (255 - alpha) + 127) // 255
    return pixels


def _turned(pixels: Pixels, orientation: int) -> Pixels:
    """Upright rows from stored ones. EXIF 2.3, tag 274: where row 0 and column 0 of the stored rows lie."""
    turns: dict[int, Pixels] = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.transpose(1, 0, 2),
        6: np.rot90(pixels, -1),
        7: pixels[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(pixels),
    }
    return turns[orientation]


def _as_pixels(array: Any) -> Pixels:
    return np.asarray(array, np.uint8)


@lru_cache
def quiet_cv2() -> Any:
    """cv2, quiet and with one thread: a worker has its CPU, and threads of its own."""
    import cv2

    cv2.setNumThreads(1)
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    return cv2


# --- sizes, hashes ---------------------------------------------------------------------------------------------------
def resize_short_side(pixels: Pixels, px: int) -> Pixels:
    """The picture with its short side at `px`, its aspect kept (area averaging); a smaller one as it is.

    >>> resize_short_side(np.zeros((300, 200, 3), np.uint8), 100).shape
    (150, 100, 3)
    """
    height, width = pixels.shape[:2]
    short = min(height, width)
    if short <= px:
        return pixels
    return _shrink(pixels, (round(width * px / short), round(height * px / short)))


def _shrink(pixels: Pixels, size: tuple[int, int]) -> Pixels:
    """Area averaging to (width, height), neither larger than the picture's: the bytes of cv2's INTER_AREA."""
    cv2, (width, height) = quiet_cv2(), size
    has_way_for_bytes = pixels.shape[1] % width == 0 and pixels.shape[0] % height == 0
    if has_way_for_bytes or pixels.size > 12 << 20:  # floats would be four times as much memory
        return _as_pixels(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA))
    # Elsewhere cv2 turns byte by byte into floats and adds them up; given the floats it does the same a quarter faster.
    return _as_pixels(cv2.convertScaleAbs(cv2.resize(pixels.astype(np.float32), size, interpolation=cv2.INTER_AREA)))


def dhash(pixels: Pixels) -> str:
    """64 bits as 16 hex digits: whether each of 9x8 gray cells is brighter than its right neighbour. Pictures that
    differ in size or JPEG quality are at most 4 bits apart, different ones 14 and more (measured on 60)."""
    cv2 = quiet_cv2()
    cells = cv2.resize(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), (9, 8), interpolation=cv2.INTER_AREA)
    return np.packbits(cells[:, :-1] > cells[:, 1:]).tobytes().hex()


# --- crops -----------------------------------------------------------------------------------------------------------
def tokenizer_crop(pixels: Pixels, size: int, rng: np.random.Generator, *, crop: bool, flip: bool) -> Pixels:
    """A training picture of the tokenizer, [size, size, 3] (listing 1): random square crop of the short side, area
    resize into [9/8, 12/8] of `size`, random crop, horizontal flip. Without `crop` the central square, resized."""
    height, width = pixels.shape[:2]
    short = min(height, width)
    if crop:
        y, x = int(rng.integers(0, height - short, endpoint=True)), int(rng.integers(0, width - short, endpoint=True))
        smallest, largest = (min(short, round(share * size)) for share in (9 / 8, 12 / 8))
        scaled = max(size, int(rng.integers(smallest, largest, endpoint=True)))
        dy, dx = (int(d) for d in rng.integers(0, scaled - size, 2, endpoint=True))
        pixels = _square(pixels, x, y, short, scaled)[dy : dy + size, dx : dx + size]
    else:
        pixels = _square(pixels, (width - short) // 2, (height - short) // 2, short, size)
    if flip and rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def transformer_crop(
    pixels: Pixels, size: int, rng: np.random.Generator, *, crop: bool
) -> tuple[Pixels, tuple[float, float, float]]:
    """A picture to be tokenized, [size, size, 3] (listing 2), and its crop (x, y, side) in pixels of `pixels`:
    near-centre square (3/8 to 5/8 of the slack), area resize into [1, 9/8] of `size`, random crop, no flip since
    pictures hold text. Without `crop` the central square, resized."""
    height, width = pixels.shape[:2]
    short = min(height, width)
    if not crop:
        x, y = (width - short) // 2, (height - short) // 2
        return np.ascontiguousarray(_square(pixels, x, y, short, size)), (float(x), float(y), float(short))
    y, x = (_near_centre(slack, rng) for slack in (height - short, width - short))
    scaled = int(rng.integers(size, max(size, min(short, round(9 / 8 * size))), endpoint=True))
    dy, dx = (int(d) for d in rng.integers(0, scaled - size, 2, endpoint=True))
    picture = _square(pixels, x, y, short, scaled)[dy : dy + size, dx : dx + size]
    scale = short / scaled
    return np.ascontiguousarray(picture), (x + dx * scale, y + dy * scale, size * scale)


def _near_centre(slack: int, rng: np.random.Generator) -> int:
    return int(rng.integers(3 * slack // 8, max(3 * slack // 8 + 1, 5 * slack // 8)))


def _square(pixels: Pixels, x: int, y: int, side: int, size: int) -> Pixels:
    """The square at (x, y) resized to `size`: area averaging down, linear up (a picture smaller than the model's)."""
    square = pixels[y : y + side, x : x + side]
    if side == size:
        return square
    if side > size:
        return _shrink(square, (size, size))
    return _as_pixels(quiet_cv2().resize(square, (size, size), interpolation=quiet_cv2().INTER_LINEAR))
