"""What the web answers when it is broken, careless or hostile: a server of raw bytes, and a table of more than 150
answers with what an ingest must make of each.

`python -m tests.hostile_web PAIRS SETTINGS` ingests a planned stage in a process of its own, whose memory can be
measured, with the names of `NAMES` instead of a resolver.
"""

from __future__ import annotations

import gzip
import io
import json
import socket
import ssl
import struct
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageOps

from ops import demo_web
from ops.reasons import SUCCESS

BODY = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Type: image/png\r\n\r\nhello"
RESET = b"reset"
"""Stands for no answer but the end of the connection by a reset."""


class Canned:
    """A server on loopback that answers with the bytes it is told, and remembers who was there when."""

    def __init__(
        self,
        answer: Callable[[bytes, int], bytes | Iterator[bytes]],
        context: ssl.SSLContext | None = None,
        address: tuple[str, int] = ("127.0.0.1", 0),
    ) -> None:
        self.answer = answer
        self.heads: list[bytes] = []
        self.times: list[float] = []
        self.accepted = 0
        self.open = 0
        self.peak = 0
        self._context = context
        self._lock = threading.Lock()
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self._listener = socket.create_server(address, family=family, backlog=256)
        self.port = self._listener.getsockname()[1]
        self.url = f"{'https' if context else 'http'}://127.0.0.1:{self.port}"
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def paths(self) -> Counter[str]:
        """path -> how often it was asked for."""
        return Counter(head.split(b" ")[1].decode("latin-1") for head in self.heads)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self.accepted += 1
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with suppress(OSError), connection:
            if self._context:
                connection = self._context.wrap_socket(connection, server_side=True)
            with connection:
                head = b""
                while b"\r\n\r\n" not in head:
                    part = connection.recv(4096)
                    if not part:
                        return
                    head += part
                with self._lock:
                    self.heads.append(head)
                    self.times.append(time.monotonic())
                    self.open += 1
                    self.peak = max(self.peak, self.open)
                    number = len(self.heads)
                try:
                    answer = self.answer(head, number)
                    for part in [answer] if isinstance(answer, bytes) else answer:
                        if part is RESET:
                            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                        else:
                            connection.sendall(part)
                finally:
                    with self._lock:
                        self.open -= 1


@contextmanager
def canned(
    answer: bytes | Callable[[bytes, int], bytes | Iterator[bytes]] = BODY,
    context: ssl.SSLContext | None = None,
    address: tuple[str, int] = ("127.0.0.1", 0),
) -> Iterator[Canned]:
    """A server for the time of a `with`; `answer` gets the head of the request and its number, from 1."""
    server = Canned((lambda head, number: answer) if isinstance(answer, bytes) else answer, context, address)
    try:
        yield server
    finally:
        server.close()


# --- the table -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Kind:
    """One way to answer, and what must come of it."""

    answer: bytes | Callable[[], Iterator[bytes]]
    want: str
    """Its reason, or `success`."""
    picture: np.ndarray | None = None
    """The pixels that must be stored, [height, width, 3] uint8 RGB."""


def answer(body: bytes = b"", *headers: str, status: int = 200) -> bytes:
    """A whole answer with an honest length unless the headers tell another one."""
    if not any(header.startswith(("Content-Length", "Transfer-Encoding")) for header in headers):
        headers += (f"Content-Length: {len(body)}",)
    return "\r\n".join([f"HTTP/1.1 {status} X", *headers, "", ""]).encode() + body


def chunked(*chunks: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks)


def slowly(data: bytes) -> Callable[[], Iterator[bytes]]:
    """Nothing, then a byte every half second, for as long as somebody listens."""

    def answer() -> Iterator[bytes]:
        for i in range(60):
            time.sleep(0.5)
            yield data[i : i + 1] or b"x"

    return answer


def endless() -> Iterator[bytes]:
    yield answer(b"", "Transfer-Encoding: chunked")
    for _ in range(4096):
        yield chunked(bytes(1 << 16))


def silence() -> Iterator[bytes]:
    time.sleep(60)
    yield b""


def saved(picture: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def seen(data: bytes) -> np.ndarray:
    """What Pillow shows: the first frame, upright, on white, 16 bits scaled to 8."""
    with Image.open(io.BytesIO(data)) as opened:
        picture = ImageOps.exif_transpose(opened)
        if picture.mode.startswith("I"):
            return np.repeat((np.array(picture) / 257).round().astype(np.uint8)[:, :, None], 3, 2)
        white = Image.new("RGBA", picture.size, "white")
        return np.array(Image.alpha_composite(white, picture.convert("RGBA")).convert("RGB"))


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """dB; 99 for equal pictures."""
    error = np.mean((a.astype(float) - b.astype(float)) ** 2)
    return 99.0 if error == 0 else float(10 * np.log10(255**2 / error))


def statuses() -> dict[str, Kind]:
    wanted = {
        204: "empty", 300: "http_status", 301: "http_status", 304: "http_status", 400: "http_4xx", 401: "http_4xx",
        403: "http_4xx", 404: "http_4xx", 408: "http_408", 410: "http_4xx", 418: "http_4xx", 425: "http_425",
        429: "http_429", 451: "http_4xx", 500: "http_5xx", 502: "http_5xx", 503: "http_5xx", 504: "http_5xx",
        599: "http_5xx", 700: "http_status",
    }  # fmt: skip
    return {f"status-{status}": Kind(answer(status=status), want) for status, want in wanted.items()}


def lengths() -> dict[str, Kind]:
    data = demo_web.jpeg(1)
    pixels, half = seen(data), len(data) // 2
    gzipped, zipped_zeros = gzip.compress(data, mtime=0), gzip.compress(bytes(40 << 20), mtime=0)
    return {
        "length-too-long": Kind(answer(data, f"Content-Length: {len(data) + 1}"), "truncated"),
        "length-too-short": Kind(answer(data, f"Content-Length: {half}"), "decode"),
        "length-of-a-terabyte": Kind(answer(data, f"Content-Length: {10**12}"), "too_large"),
        "length-negative": Kind(answer(data, "Content-Length: -5"), SUCCESS, pixels),
        "length-a-word": Kind(answer(data, "Content-Length: many"), SUCCESS, pixels),
        "length-none": Kind(answer(data, "Content-Length-Not: 0", "Transfer-Encoding: identity"), SUCCESS, pixels),
        "chunked": Kind(
            answer(chunked(data[:9], data[9:], b""), "Transfer-Encoding: chunked"), SUCCESS, pixels
        ),
        "chunked-cut": Kind(answer(chunked(data[:99]), "Transfer-Encoding: chunked"), "truncated"),
        "chunked-nonsense": Kind(answer(b"zz\r\n" + data, "Transfer-Encoding: chunked"), "truncated"),
        "chunked-for-ever": Kind(endless, "too_large"),
        "a-byte-now-and-then": Kind(slowly(answer(data)[:20]), "timeout"),
        "a-byte-of-the-head-now-and-then": Kind(slowly(b"HTTP/1.1 200 OK\r\nX-Padding: "), "timeout"),
        "a-byte-of-the-body-now-and-then": Kind(
            lambda: iter([answer(data[:9], "Content-Length: 5000"), *slowly(data)()]), "timeout"
        ),
        "silence": Kind(silence, "timeout"),
        "hang-up": Kind(b"", "connect"),
        "reset": Kind(lambda: iter([RESET]), "connect"),
        "reset-in-the-body": Kind(lambda: iter([answer(data[:99], "Content-Length: 5000"), RESET]), "truncated"),
        "head-cut": Kind(b"HTTP/1.1 200 OK\r\nContent-Type: ima", "truncated"),
        "head-of-one-long-line": Kind(answer(data, "X-Long: " + "x" * 70_000), "http_status"),
        "head-of-many-lines": Kind(answer(data, *(f"X-{i}: x" for i in range(200))), "http_status"),
        "another-protocol": Kind(b"220 mail.example ESMTP\r\n", "http_status"),
        "old-protocol": Kind(b"HTTP/1.0 200 OK\r\n\r\n" + data, SUCCESS, pixels),
        "gzip": Kind(answer(gzipped, "Content-Encoding: gzip"), SUCCESS, pixels),
        "gzip-chunked": Kind(
            answer(chunked(gzipped, b""), "Content-Encoding: x-gzip", "Transfer-Encoding: chunked"), SUCCESS, pixels
        ),
        "deflate": Kind(answer(zlib.compress(data), "Content-Encoding: deflate"), SUCCESS, pixels),
        "gzip-bomb": Kind(answer(zipped_zeros, "Content-Encoding: gzip"), "too_large"),
        "gzip-cut": Kind(answer(gzipped[:-20], "Content-Encoding: gzip"), "truncated"),
        "gzip-not": Kind(answer(data, "Content-Encoding: gzip"), "decode"),
        "brotli": Kind(answer(data, "Content-Encoding: br"), "content_type"),
        "gzip-twice": Kind(answer(gzipped, "Content-Encoding: gzip, gzip"), "content_type"),
        "empty": Kind(answer(b""), "empty"),
        "empty-chunked": Kind(answer(chunked(b""), "Transfer-Encoding: chunked"), "empty"),
        "empty-without-a-length": Kind(b"HTTP/1.1 200 OK\r\n\r\n", "truncated"),
    }  # fmt: skip


def redirects(trap_port: int) -> dict[str, Kind]:
    data = demo_web.jpeg(2)
    pixels = seen(data)
    found = {
        f"redirect-{status}": Kind(answer(b"", "Location: /target", status=status), SUCCESS, pixels)
        for status in (301, 302, 303, 307, 308)
    }
    found["target"] = Kind(answer(data), SUCCESS, pixels)
    found["target?x"] = found["target"]
    found["redirect-relative"] = Kind(answer(b"", "Location: target?x#part", status=302), SUCCESS, pixels)
    found["redirect-with-spaces"] = Kind(answer(b"", "Location:   /target ", status=302), SUCCESS, pixels)
    found["redirect-loop"] = Kind(answer(b"", "Location: /redirect-loop", status=302), "redirect_limit")
    found["redirect-nowhere"] = Kind(answer(b"", "Location: ", status=302), "http_status")
    for name, host in FORBIDDEN.items():
        to = Kind(answer(b"", f"Location: http://{host}:{trap_port}/", status=302), "redirect_forbidden")
        found[f"redirect-to-{name}"] = to
    for name, url in {
        "file": "file:///etc/hostname", "ftp": f"ftp://127.0.0.2:{trap_port}/x", "data": "data:image/png;base64,iVBO",
        "javascript": "javascript:alert(1)", "a-user": f"http://me@127.0.0.2:{trap_port}/", "nonsense": "http://[",
    }.items():  # fmt: skip
        found[f"redirect-to-{name}"] = Kind(answer(b"", f"Location: {url}", status=302), "redirect_forbidden")
    return found


FORBIDDEN = {
    "loopback": "127.0.0.2",
    "loopback-decimal": "2130706434",
    "loopback-octal": "0177.0.0.2",
    "loopback-hex": "0x7f.2",
    "loopback-short": "127.2",
    "loopback-v6": "[::1]",
    "loopback-v4-in-v6": "[::ffff:127.0.0.2]",
    "loopback-compatible": "[::127.0.0.2]",
    "loopback-nat64": "[64:ff9b::7f00:2]",
    "loopback-6to4": "[2002:7f00:2::]",
    "anything": "0.0.0.0",
    "private": "10.0.0.1",
    "private-v6": "[fc00::1]",
    "link-local": "169.254.169.254",
    "carrier": "100.64.0.1",
    "multicast": "224.0.0.1",
    "a-private-name": "trap.example",
    "a-name-of-two": "both.example",
}
"""Ways to say an address that must not be connected to; a trap listens where one can."""

_ASKED: Counter[str] = Counter()


def _names(host: str) -> list[str]:
    """The resolver of the process that ingests."""
    _ASKED[host] += 1
    if host == "rebinding.example":
        return ["127.0.0.1"] if _ASKED[host] == 1 else ["127.0.0.2"]
    known = {
        "trap.example": ["127.0.0.2"],
        "both.example": ["127.0.0.1", "127.0.0.2"],
        "xn--bcher-kva.example": ["127.0.0.1"],
    }
    if host == "none.example":
        raise socket.gaierror(socket.EAI_NONAME, "")
    if host == "again.example":
        raise socket.gaierror(socket.EAI_AGAIN, "")
    return known[host]


def things() -> dict[str, Kind]:
    """Bodies that are no pictures."""
    data, page = demo_web.jpeg(3), b"<!doctype html><p>Please sign in."
    drawing = b'<svg xmlns="http://www.w3.org/2000/svg"/>'
    return {
        "html": Kind(answer(page, "Content-Type: text/html"), "not_an_image"),
        "html-as-a-jpeg": Kind(answer(page, "Content-Type: image/jpeg"), "not_an_image"),
        "svg": Kind(answer(drawing, "Content-Type: image/svg+xml"), "not_an_image"),
        "json": Kind(answer(b'{"error": "gone"}'), "not_an_image"),
        "pdf": Kind(answer(b"%PDF-1.7\n"), "not_an_image"),
        "zip": Kind(answer(b"PK\3\4" + bytes(40)), "not_an_image"),
        "one-byte": Kind(answer(b"\xff"), "not_an_image"),
        "magic-alone": Kind(answer(b"\xff\xd8\xff"), "decode"),
        "video": Kind(answer(b"\0\0\0\x20ftypisom", "Content-Type: video/mp4"), "content_type"),
        "audio": Kind(answer(b"ID3", "Content-Type: audio/mpeg"), "content_type"),
        "jpeg-as-text": Kind(answer(data, "Content-Type: text/html; charset=utf-8"), SUCCESS, seen(data)),
        "noai": Kind(answer(data, "X-Robots-Tag: noai, noimageai"), "opt_out"),
        "noai-after-a-date": Kind(
            answer(data, "X-Robots-Tag: unavailable_after: 25 Jun 2010 15:00:00 PST, noai"), "opt_out"
        ),
        "noindex-for-another": Kind(answer(data, "X-Robots-Tag: googlebot: noindex"), SUCCESS, seen(data)),
        "tdm-reservation": Kind(answer(data, "tdm-reservation: 1"), "opt_out"),
        "closed/by-robots": Kind(answer(data), "robots"),
        "robots.txt": Kind(answer(b"User-agent: *\nDisallow: /closed/\n"), SUCCESS),
    }  # fmt: skip


def pictures() -> dict[str, Kind]:
    rgb = demo_web.draw(4)
    picture = Image.fromarray(rgb)
    gray = picture.convert("L")
    alpha = np.full(rgb.shape[:2], 255, np.uint8)
    alpha[:, :80], alpha[:, 80:120] = 0, 128
    rgba = Image.fromarray(np.dstack([rgb, alpha]))
    level_and_alpha = Image.merge("LA", [gray, Image.fromarray(alpha)])
    indices = np.array(picture.quantize(31))
    indices[:, :90] = 31
    indexed = Image.fromarray(indices, "L")
    indexed.putpalette([*(picture.quantize(31).getpalette() or [])[: 31 * 3], 0, 0, 0])
    wide = rgb.astype(np.uint16) * 257
    rgba16 = np.dstack([wide[:, :, ::-1], alpha.astype(np.uint16) * 257])
    frames = [Image.fromarray(demo_web.draw(seed)) for seed in (4, 5, 6)]
    moving: dict[str, Any] = {"save_all": True, "append_images": frames[1:]}
    jpeg, png = saved(picture, "JPEG", quality=90), saved(picture, "PNG")
    known = {
        "jpeg": jpeg,
        "jpeg-progressive": saved(picture, "JPEG", quality=90, progressive=True),
        "jpeg-444": saved(picture, "JPEG", quality=90, subsampling=0),
        "jpeg-gray": saved(gray, "JPEG", quality=90),
        "jpeg-cmyk": saved(picture.convert("CMYK"), "JPEG", quality=90),
        "jpeg-with-a-tail": jpeg + b"tail" * 99,
        "png": png,
        "png-gray": saved(gray, "PNG"),
        "png-one-bit": saved(gray.convert("1"), "PNG"),
        "png-gray-16": cv2.imencode(".png", wide[:, :, 1])[1].tobytes(),
        "png-rgba": saved(rgba, "PNG"),
        "png-la": saved(level_and_alpha, "PNG"),
        "png-palette": saved(picture.quantize(64), "PNG"),
        "png-palette-transparent": saved(indexed, "PNG", transparency=31),
        "png-animated": saved(frames[0], "PNG", **moving),
        "gif": saved(picture.quantize(64), "GIF"),
        "gif-animated": saved(frames[0].quantize(64), "GIF", **moving),
        "webp": saved(picture, "WEBP", quality=90),
        "webp-lossless-rgba": saved(rgba, "WEBP", lossless=True),
        "webp-animated": saved(frames[0], "WEBP", quality=90, **moving),
        "bmp": saved(picture, "BMP"),
        "avif": saved(picture, "AVIF", quality=90),
        "avif-gray": saved(gray, "AVIF", quality=90),
        "avif-rgba": saved(rgba, "AVIF", quality=90),
    }  # fmt: skip
    liar = bytearray(saved(Image.new("RGB", (3000, 3000), "teal"), "AVIF", speed=10))
    at = liar.index(b"ispe") + 8
    liar[at : at + 8] = struct.pack(">II", 300, 240)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        known[f"exif-{orientation}"] = saved(picture, "JPEG", quality=90, exif=exif)
    found = {name: Kind(answer(data), SUCCESS, seen(data)) for name, data in known.items()}
    # Pillow reads these with 8 bits; cv2 wrote them from the drawing.
    found["png-rgb-16"] = Kind(answer(cv2.imencode(".png", wide[:, :, ::-1])[1].tobytes()), SUCCESS, rgb)
    found["png-rgba-16"] = Kind(answer(cv2.imencode(".png", rgba16)[1].tobytes()), SUCCESS, seen(saved(rgba, "PNG")))
    huge_jpeg = bytearray(jpeg)
    at = huge_jpeg.index(b"\xff\xc0") + 5
    huge_jpeg[at : at + 4] = struct.pack(">HH", 60_000, 60_000)
    bad = {
        "png-bomb": (demo_web._bomb(), "pixels_too_many"),
        "jpeg-bomb": (bytes(huge_jpeg), "pixels_too_many"),
        "jpeg-cut-at-50": (jpeg[: len(jpeg) // 2], "decode"),
        "jpeg-cut-at-95": (jpeg[: len(jpeg) * 95 // 100], "decode"),
        "png-cut-at-50": (png[: len(png) // 2], "decode"),
        "png-cut-at-95": (png[: len(png) * 95 // 100], "decode"),
        "webp-cut-at-50": (known["webp"][: len(known["webp"]) // 2], "decode"),
        "avif-cut-at-50": (known["avif"][: len(known["avif"]) // 2], "decode"),
        "avif-animated": (saved(frames[0], "AVIF", **moving), "not_an_image"),
        "avif-larger-inside": (bytes(liar), "decode"),
        "jpeg-flipped": (demo_web._corrupt(), "decode"),
        "png-flipped": (png[: len(png) // 2] + bytes(9) + png[len(png) // 2 + 9 :], "decode"),
        "jpeg2000": (saved(picture, "JPEG2000"), "not_an_image"),
        "tiff": (saved(picture, "TIFF"), "not_an_image"),
        "ico": (saved(picture.resize((64, 64)), "ICO"), "not_an_image"),
        "one-pixel": (saved(picture.resize((1, 1)), "PNG"), "too_small"),
        "a-line": (saved(picture.resize((4000, 10)), "PNG"), "too_small"),
        "a-strip": (saved(picture.resize((900, 250)), "JPEG"), "aspect"),
        "flat": (saved(Image.new("RGB", (240, 208), "teal"), "JPEG"), "flat_image"),
        "see-through": (saved(Image.new("RGBA", (240, 208), (9, 9, 9, 0)), "PNG"), "flat_image"),
    }  # fmt: skip
    return found | {name: Kind(answer(data), want) for name, (data, want) in bad.items()}


def kinds(trap_port: int) -> dict[str, Kind]:
    """Path -> what the server answers and what must come of it."""
    return statuses() | lengths() | redirects(trap_port) | things() | pictures()


def serve_kinds(table: dict[str, Kind]) -> Callable[[bytes, int], bytes | Iterator[bytes]]:
    def answer(head: bytes, number: int) -> bytes | Iterator[bytes]:
        kind = table.get(head.split(b" ")[1].decode().lstrip("/").partition("#")[0])
        if kind is None:
            return b"HTTP/1.1 404 X\r\nContent-Length: 0\r\n\r\n"
        return kind.answer if isinstance(kind.answer, bytes) else kind.answer()

    return answer


# --- the process that ingests ----------------------------------------------------------------------------------------
def peak_mb() -> float:
    """Resident at most so far. Not getrusage's: that begins with what the parent process had."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


def main(location: str, settings: str) -> None:
    """Prints {"seconds", "grown_mb", "states"} of one ingest with these fetch settings."""
    from infra.cluster import quiet_environment

    quiet_environment()
    from infra.store import open_store
    from ops.fetch import FetchSettings
    from ops.ingest import ingest_shard
    from ops.pictures import PictureSettings
    from tests.pairs import pending

    def getaddrinfo(host: str, *args: Any, **options: Any) -> list[Any]:
        if host.endswith(".example"):
            return [(0, 0, 0, "", (address, 0)) for address in _names(host)]
        return of_the_system(host, *args, **options)

    of_the_system = socket.getaddrinfo
    socket.getaddrinfo = getaddrinfo  # type: ignore[assignment]
    tasks = pending(
        open_store(location),
        fetch=FetchSettings(**json.loads(settings)),
        picture=PictureSettings(short_side_px=384, jpeg_quality=95),
        accept_partial=True,
    )
    import pyarrow.parquet  # noqa: F401
    import simplejpeg  # noqa: F401

    before, start = peak_mb(), time.monotonic()
    states = [ingest_shard(task).state for task in tasks]
    grown_mb = peak_mb() - before
    print(json.dumps({"seconds": time.monotonic() - start, "grown_mb": grown_mb, "states": states}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
