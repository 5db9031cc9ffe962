"""A web server on loopback that hands out pictures and also misbehaves, for the demo and for tests.

Lives here: the server, the pictures it draws, and `HOSTILE`: each way to misbehave with the status that an ingest with
default settings must record for it. Nothing of the pipeline is imported. As its own process:
`python -m ops.demo_web FOLDER [--port P]` prints its URL as the first line and serves until it is killed.

    /pictures/<path>              a file of FOLDER
    /generated/<seed>.jpg         a small picture, another one for each seed; ?delay_ms=50 answers later
    /hostile/<kind>/<any id>      see HOSTILE; an id has its own counter and, where a picture comes, its own picture
    /robots.txt                   404: all is allowed; not counted
    /_counts                      JSON {path without query: requests}
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import struct
import sys
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, unquote, urlsplit

if TYPE_CHECKING:
    import numpy as np

HOSTILE: dict[str, str] = {
    "missing": "http_4xx",  # 404
    "heals": "success",  # 503 for the first request of each id, then a picture
    "heals_later": "http_5xx",  # 503 three times (a try and two retries), then a picture: a rerun gets it
    "broken": "http_5xx",  # 503, always
    "retry_after": "success",  # 429 with Retry-After: 1, then a picture
    "html": "not_an_image",
    "svg": "not_an_image",
    "empty": "empty",
    "video": "content_type",
    "mislabelled": "success",  # a picture as text/plain
    "endless": "too_large",  # chunks without end, as fast as they are taken
    "declared_huge": "too_large",  # Content-Length: one terabyte
    "gzip_bomb": "too_large",  # 40 MB of zeros in 40 kB
    "gzipped": "success",  # a picture in gzip that nobody asked for
    "slow": "timeout",  # a byte of the body every half second
    "dripped_headers": "timeout",  # a byte of the headers every half second
    "silent": "timeout",  # never an answer
    "hangs_up": "connect",  # closes without an answer
    "not_http": "http_status",  # answers in another protocol
    "truncated": "truncated",  # Content-Length lies
    "moved": "success",  # 302 to a picture
    "redirect_loop": "redirect_limit",
    "private_redirect": "redirect_forbidden",  # 302 to http://10.0.0.1/
    "file_redirect": "redirect_forbidden",  # 302 to file:///etc/hostname
    "corrupt": "decode",  # a JPEG with flipped bytes
    "cut": "decode",  # the first half of a JPEG, with an honest length
    "bomb": "pixels_too_many",  # a PNG of 20,000 x 20,000 in 50 kB
    "tiny": "too_small",
    "narrow": "aspect",
    "flat": "flat_image",
    "sideways": "success",  # EXIF orientation 6: to be kept upright
    "transparent": "success",  # a PNG with alpha: to be kept on white
    "palette": "success",  # a PNG with palette and transparent colour
    "sixteen_bit": "success",
    "cmyk": "success",
    "animated": "success",  # a GIF: its first frame
}
"""Kind of misbehaviour -> the `status` of its pair after one ingest with default settings."""

CHUNK = b"\0" * 65536


class DemoWeb:
    """A running server. `url` has no slash at the end; while `outage` is True every answer is a 503."""

    def __init__(self, folder: Path, port: int) -> None:
        self.outage = False
        self.closing = threading.Event()
        self._folder = folder.resolve()
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._bytes_out = 0
        self.server = _Server(("127.0.0.1", port), _handler(self))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def counts(self) -> dict[str, int]:
        """How often each path (without its query) was asked for. Control paths (`/_…`) do not count."""
        with self._lock:
            return dict(self._counts)

    def bytes_out(self) -> int:
        """Bytes of bodies that were handed to sockets."""
        with self._lock:
            return self._bytes_out

    def file(self, relative: str) -> Path | None:
        """The file of FOLDER under this path, or None: not there, or outside."""
        path = (self._folder / relative).resolve()
        return path if path.is_relative_to(self._folder) and path.is_file() else None

    def count(self, path: str) -> int:
        """Counts a request and returns its number, from 1."""
        with self._lock:
            self._counts[path] += 1
            return self._counts[path]

    def add_bytes(self, n: int) -> None:
        """Adds to `bytes_out`."""
        with self._lock:
            self._bytes_out += n


@contextmanager
def serve(folder: Path, port: int = 0) -> Iterator[DemoWeb]:
    """Serves `folder` on 127.0.0.1 (port 0: any free one) in a thread for the time of a `with`."""
    web = DemoWeb(folder, port)
    # A short poll: the end of a `with` waits for it.
    thread = threading.Thread(target=web.server.serve_forever, args=(0.05,), name="demo-web", daemon=True)
    thread.start()
    try:
        yield web
    finally:
        web.closing.set()
        web.server.shutdown()
        web.server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256  # the default of 5 makes 64 fetch threads wait a second for a lost SYN

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are this server's daily bread; everything else is shown."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


def _handler(web: DemoWeb) -> type[BaseHTTPRequestHandler]:
    return type("Handler", (_Handler,), {"web": web})


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 60
    web: DemoWeb

    def log_message(self, format: str, *args: object) -> None:
        """Silence: the counters are the log."""

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        if path == "/_counts":
            self.answer(200, json.dumps(self.web.counts()).encode(), "application/json")
            return
        if path == "/robots.txt":
            self.answer(503 if self.web.outage else 404)
            return
        number = self.web.count(path)
        room, _, rest = path.lstrip("/").partition("/")
        if self.web.outage:
            self.answer(503)
        elif room == "pictures" and (file := self.web.file(rest)) is not None:
            self.answer(200, file.read_bytes(), _content_type(file.suffix))
        elif room == "generated" and rest.removesuffix(".jpg").isdecimal():
            delay_ms = parse_qs(parts.query).get("delay_ms", ["0"])[0]
            self.web.closing.wait(float(delay_ms) / 1000)
            self.picture(jpeg(int(rest.removesuffix(".jpg"))))
        elif room == "hostile" and (kind := rest.partition("/")[0]) in HOSTILE:
            seed = zlib.crc32(path.encode())
            if (behave := getattr(self, f"do_{kind}", None)) is not None:
                behave(seed, number)
            elif (make := _PICTURES.get(kind)) is not None:
                self.picture(make(seed))
            else:
                status, body, content_type = _BODIES[kind]
                self.answer(status, body, content_type)
        else:
            self.answer(404)

    # --- answers -----------------------------------------------------------------------------------------------------
    def answer(self, status: int, body: bytes = b"", content_type: str = "text/plain", **headers: str) -> None:
        """A whole answer; `Content_Length="9"` among the headers lies and ends the connection."""
        self.send_response_only(status)
        sent = {"Content-Type": content_type, "Content-Length": str(len(body))}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        for name, value in sent.items():
            self.send_header(name, value)
        if sent["Content-Length"] != str(len(body)):
            self.send_header("Connection", "close")
        self._headers_buffer.append(b"\r\n" + body)  # type: ignore[attr-defined]  # one segment for head and body
        self.web.add_bytes(len(body))  # before the client can have read it
        self.flush_headers()

    def picture(self, data: bytes) -> None:
        """A 200 with what the bytes are."""
        kinds = {b"\x89P": "image/png", b"GI": "image/gif", b"\xff\xd8": "image/jpeg"}
        self.answer(200, data, kinds[data[:2]])

    def drip(self, data: bytes) -> None:
        """A byte every half second, until the client or the server goes."""
        self.close_connection = True
        for i in range(len(data)):
            if self.web.closing.wait(0.5):
                return
            self.wfile.write(data[i : i + 1])

    # --- ways to misbehave that are more than a body ----------------------------------------------------------------
    def do_heals(self, seed: int, number: int) -> None:
        self.answer(503) if number == 1 else self.picture(jpeg(seed))

    def do_heals_later(self, seed: int, number: int) -> None:
        self.answer(503) if number <= 3 else self.picture(jpeg(seed))

    def do_retry_after(self, seed: int, number: int) -> None:
        self.answer(429, Retry_After="1") if number == 1 else self.picture(jpeg(seed))

    def do_mislabelled(self, seed: int, number: int) -> None:
        self.answer(200, jpeg(seed), "text/plain")

    def do_endless(self, seed: int, number: int) -> None:
        self.close_connection = True
        self.wfile.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
        )
        while not self.web.closing.is_set():
            self.wfile.write(b"10000\r\n" + CHUNK + b"\r\n")
            self.web.add_bytes(len(CHUNK))

    def do_declared_huge(self, seed: int, number: int) -> None:
        self.answer(200, CHUNK, "image/jpeg", Content_Length=str(10**12))

    def do_gzip_bomb(self, seed: int, number: int) -> None:
        self.answer(200, _gzip_bomb(), "image/png", Content_Encoding="gzip")

    def do_gzipped(self, seed: int, number: int) -> None:
        self.answer(200, gzip.compress(jpeg(seed), mtime=0), "image/jpeg", Content_Encoding="gzip")

    def do_slow(self, seed: int, number: int) -> None:
        data = jpeg(seed)
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(data))
        self.drip(data)

    def do_dripped_headers(self, seed: int, number: int) -> None:
        self.drip(b"HTTP/1.1 200 OK\r\nX-Padding: " + b"x" * 500)

    def do_silent(self, seed: int, number: int) -> None:
        self.close_connection = True
        self.web.closing.wait(60)

    def do_hangs_up(self, seed: int, number: int) -> None:
        self.close_connection = True

    def do_not_http(self, seed: int, number: int) -> None:
        self.close_connection = True
        self.wfile.write(b"220 mail.example ESMTP\r\n")

    def do_truncated(self, seed: int, number: int) -> None:
        data = jpeg(seed)
        self.answer(200, data[: len(data) // 2], "image/jpeg", Content_Length=str(len(data)))
        self.close_connection = True

    def do_moved(self, seed: int, number: int) -> None:
        self.answer(302, Location=f"/generated/{seed}.jpg")

    def do_redirect_loop(self, seed: int, number: int) -> None:
        self.answer(302, Location=self.path)

    def do_private_redirect(self, seed: int, number: int) -> None:
        self.answer(302, Location="http://10.0.0.1/private.jpg")

    def do_file_redirect(self, seed: int, number: int) -> None:
        self.answer(302, Location="file:///etc/hostname")


_BODIES: dict[str, tuple[int, bytes, str]] = {
    "missing": (404, b"no such picture", "text/plain"),
    "broken": (503, b"", "text/plain"),
    "html": (200, b"<!doctype html><title>Sign in</title><p>Please sign in to see this picture.</p>", "text/html"),
    "svg": (200, b'<svg xmlns="http://www.w3.org/2000/svg"><rect width="9" height="9"/></svg>', "image/svg+xml"),
    "empty": (200, b"", "image/jpeg"),
    "video": (200, b"\0\0\0\x20ftypisom", "video/mp4"),
}  # fmt: skip


def _content_type(suffix: str) -> str:
    kinds = {
        ".jpg": "image/jpeg",
        ".jpeg": "image/jpeg",
        ".png": "image/png",
        ".gif": "image/gif",
        ".webp": "image/webp",
    }
    return kinds.get(suffix.lower(), "application/octet-stream")


# --- pictures --------------------------------------------------------------------------------------------------------
def draw(seed: int, width: int = 240, height: int = 208) -> np.ndarray:
    """A smooth drawing of random colours, [height, width, 3] uint8 RGB; another one for each seed."""
    import cv2
    import numpy as np

    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return np.asarray(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC))


def jpeg(seed: int) -> bytes:
    """`draw(seed)` as a JPEG of about 5 kB."""
    import simplejpeg

    return bytes(simplejpeg.encode_jpeg(draw(seed), quality=85))


def _saved(image: object, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)  # type: ignore[attr-defined]
    return buffer.getvalue()


def _sideways(seed: int) -> bytes:
    """Upright it is 208 wide and 240 high: EXIF 6 says that the stored rows run down the right side."""
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6
    return _saved(Image.fromarray(draw(seed)), "JPEG", quality=90, exif=exif)


def _transparent(seed: int) -> bytes:
    """The left half is see-through, over black."""
    import numpy as np
    from PIL import Image

    rgba = np.dstack([draw(seed), np.full((208, 240), 255, np.uint8)])
    rgba[:, :120] = 0
    return _saved(Image.fromarray(rgba), "PNG")


def _palette(seed: int) -> bytes:
    """Indexed colours; the left half is the see-through one, which is black to those who do not know."""
    import numpy as np
    from PIL import Image

    indexed = Image.fromarray(draw(seed)).quantize(31)
    indices = np.array(indexed)
    indices[:, :120] = 31
    picture = Image.fromarray(indices, "L")
    picture.putpalette([*(indexed.getpalette() or [])[: 31 * 3], 0, 0, 0])
    return _saved(picture, "PNG", transparency=31)


def _sixteen_bit(seed: int) -> bytes:
    import cv2
    import numpy as np

    rgb = draw(seed).astype(np.uint16) * 257
    return bytes(cv2.imencode(".png", rgb[:, :, ::-1])[1].tobytes())


def _cmyk(seed: int) -> bytes:
    from PIL import Image

    return _saved(Image.fromarray(draw(seed)).convert("CMYK"), "JPEG", quality=90)


def _animated(seed: int) -> bytes:
    from PIL import Image

    frames = [Image.fromarray(draw(seed + i)).quantize(64) for i in range(3)]
    return _saved(frames[0], "GIF", save_all=True, append_images=frames[1:])


def _tiny(seed: int) -> bytes:
    from PIL import Image

    return _saved(Image.fromarray(draw(seed, 24, 24)), "PNG")


def _narrow(seed: int) -> bytes:
    from PIL import Image

    return _saved(Image.fromarray(draw(seed, 640, 208)), "JPEG")


@lru_cache
def _flat(seed: int) -> bytes:
    import numpy as np
    from PIL import Image

    return _saved(Image.fromarray(np.full((208, 240, 3), seed % 256, np.uint8)), "PNG")


@lru_cache
def _corrupt() -> bytes:
    """The same for every id: whether flipped bytes can be noticed depends on where they lie."""
    data = bytearray(jpeg(7))
    for at in range(len(data) // 2, len(data) // 2 + 40):
        data[at] ^= 0x55
    return bytes(data)


@lru_cache
def _bomb(side: int = 20_000) -> bytes:
    """A PNG of one bit a pixel, all black."""
    packer = zlib.compressobj(9)
    rows = b"\0" * ((1 + side // 8) * 100)
    body = b"".join([*(packer.compress(rows) for _ in range(side // 100)), packer.flush()])

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@lru_cache
def _gzip_bomb() -> bytes:
    return gzip.compress(b"\0" * (40 << 20), mtime=0)


_PICTURES: dict[str, Callable[[int], bytes]] = {
    "corrupt": lambda seed: _corrupt(),
    "cut": lambda seed: jpeg(seed)[:2500],
    "bomb": lambda seed: _bomb(),
    "tiny": _tiny,
    "narrow": _narrow,
    "flat": _flat,
    "sideways": _sideways,
    "transparent": _transparent,
    "palette": _palette,
    "sixteen_bit": _sixteen_bit,
    "cmyk": _cmyk,
    "animated": _animated,
}


def main() -> None:
    """The process: prints its URL, then serves until it is killed."""
    parser = argparse.ArgumentParser(prog="python -m ops.demo_web", description="Serves pictures, and misbehaves.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=0)
    arguments = parser.parse_args()
    web = DemoWeb(arguments.folder, arguments.port)
    sys.stdout.write(web.url + "\n")
    sys.stdout.flush()
    try:
        web.server.serve_forever()
    except KeyboardInterrupt:
        web.server.server_close()


if __name__ == "__main__":
    main()
