"""The other engine, `picture.engine = "img2dataset"`: pictures as img2dataset 1.47 makes them, by its own code.

img2dataset's `Downloader` runs the rows of one shard with its own threads, and its `Resizer` decodes, resizes and
encodes. Three parts of ours are put in where it lets us:

    opener         `urllib.request.install_opener`, for the time of the shard: every `urlopen` becomes a row of our
                   Fetcher. urllib itself can keep neither a deadline for the whole answer nor a limit of bytes, and
                   looks a name up again after it was checked; so connections, redirects, robots.txt, opt-outs, waits
                   and retries are ours, and `file:`, `ftp:` and `data:` reach nobody.
    resizer        our header filters, decoder and pixel filters judge a picture before theirs may touch it, so that
                   bombs and corrupt data end under the same reasons with both engines.
    sample writer  takes what really arrives. The shard is counted from that and never from their statistics: a
                   picture that they call a success and lose is `internal`, which `rerun` asks for again.

What stays theirs, and is worse: photos that a camera turned are stored as they lie (`exif_orientation` of the sidecar
tells), 16-bit pictures come out white, transparent ones take eight times the memory, every picture is decoded twice
(once for the filters), and a thread waits while its host is busy.

It is imported here and nowhere else (seconds, wandb, albumentations), inside the function. The opener and its stand-in
for `SuppressStdoutStderr`, which would take the whole process's stdout and stderr away for each picture, are global:
one shard at a time in a process.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import threading
import traceback
import urllib.request
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from email.message import Message
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

from ops.addresses import normal_url
from ops.attempts import Attempt
from ops.errors import UsageError
from ops.fetch import Fetched, Fetcher, FetchSettings
from ops.filters import FilterSettings, judge_header, judge_pixels
from ops.pictures import PictureSettings, decode, dhash, read_header
from ops.reasons import SUCCESS, Reason, Rejected
from ops.recipes import sha256
from ops.sidecar import Row, Spool

_one_at_a_time = threading.Lock()

_TEXTS: tuple[tuple[str, Reason], ...] = (
    (r"HTTP Error 408", Reason.HTTP_408),
    (r"HTTP Error 425", Reason.HTTP_425),
    (r"HTTP Error 429", Reason.HTTP_429),
    (r"Redirection to url .* is not allowed", Reason.REDIRECT_FORBIDDEN),
    (r"HTTP Error 30\d.*infinite loop", Reason.REDIRECT_LIMIT),
    (r"HTTP Error 4", Reason.HTTP_4XX),
    (r"HTTP Error 5", Reason.HTTP_5XX),
    (r"HTTP Error |BadStatusLine|got more than \d+ bytes", Reason.HTTP_STATUS),
    (r"X-Robots-Tag", Reason.OPT_OUT),
    (r"hash mismatch", Reason.HASH_MISMATCH),
    (r"timed out", Reason.TIMEOUT),
    (r"IncompleteRead", Reason.TRUNCATED),
    (r"Name or service not known|No address associated|nodename nor servname", Reason.DNS_NO_SUCH_HOST),
    (r"name resolution|getaddrinfo failed", Reason.DNS_FAILURE),
    (r"CERTIFICATE_VERIFY_FAILED|SSL|EOF occurred in violation", Reason.TLS),
    (r"unknown url type: (?!'?None)\w+|<urlopen error unknown url type", Reason.URL_SCHEME),
    (r"unknown url type|no host given|control characters|codec can't encode|nonnumeric port", Reason.URL_INVALID),
    (r"Connection re|Remote end closed|unreachable|No route to host|Errno", Reason.CONNECT),
    (r"image too small", Reason.TOO_SMALL),
    (r"image area too large", Reason.PIXELS_TOO_MANY),
    (r"aspect ratio too large", Reason.ASPECT),
    (r"Image decoding error|OpenCV|imdecode|!buf\.empty", Reason.DECODE),
)
"""What img2dataset's `error_message` holds -> the reason. The first that matches counts."""


def reason_of(error_message: str | None) -> Rejected:
    """The reason for the text of an error of img2dataset's (exceptions of urllib, http.client, cv2, …).

    >>> str(reason_of("HTTP Error 503: Service Unavailable").reason), reason_of("HTTP Error 404: x").http_status
    ('http_5xx', 404)
    >>> str(reason_of("<urlopen error [Errno 111] Connection refused>").reason)
    'connect'
    """
    text = error_message or ""
    if ours := _OURS.fullmatch(text):
        reason, status, detail = ours.groups()
        return Rejected(Reason(reason), detail, int(status) if status else None)
    status = re.match(r"HTTP Error (\d{3})", text)
    for pattern, reason in _TEXTS:
        if re.search(pattern, text):
            return Rejected(reason, "", int(status[1]) if status else None)
    return Rejected(Reason.INTERNAL, "an error of img2dataset's that has no reason")


_OURS = re.compile(r"armchair: (\w+) (\d*) (.*)")


def _text(rejected: Rejected) -> str:
    """A reason of ours as an error text, the only thing that img2dataset hands through."""
    return f"armchair: {rejected.reason} {rejected.http_status or ''} {rejected.detail}"


def check_installed() -> None:
    """Raises UsageError before any work where img2dataset is missing."""
    if find_spec("img2dataset") is None:
        raise UsageError("img2dataset is not installed.", "pip install img2dataset==1.47.0, or leave out --engine.")


def fetch_rows(
    urls: Sequence[str],
    fetch: FetchSettings,
    picture: PictureSettings,
    filters: FilterSettings,
    spool: Spool,
    scratch: Path,
    attempt: Attempt,
    *,
    not_after_s: float,
) -> list[Row]:
    """One row for each URL, in order, its picture spooled where it is a success.

    `attempt` is told the rows that are done and the tracebacks of pairs that failed inside our own code. Raises OSError
    if the spool can't be written.
    """
    targets = [normal_url(url) for url in urls]
    rows = {i: Row().reject(target) for i, target in enumerate(targets) if isinstance(target, Rejected)}
    # The fragment, which no server sees, tells opener and writer which row a request belongs to.
    asked = [f"{target.url}#{i}" for i, target in enumerate(targets) if not isinstance(target, Rejected)]
    if asked:
        with _one_at_a_time, Fetcher(fetch) as fetcher:
            shard = _Shard(fetcher, not_after_s, filters, picture, spool, rows, attempt)
            _download(shard, asked, picture, fetch, scratch / "img2dataset")
        if shard.failure:
            raise shard.failure
    lost = Rejected(Reason.INTERNAL, "img2dataset lost it between its resizer and its writer")
    return [rows.get(i) or Row().reject(lost) for i in range(len(urls))]


def _download(shard: _Shard, urls: list[str], picture: PictureSettings, fetch: FetchSettings, folder: Path) -> None:
    """img2dataset's part: one call of its Downloader."""
    import pyarrow as pa

    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # or its import asks a server for the newest version
    with warnings.catch_warnings(action="ignore"):  # it stays with imghdr, which Python 3.13 removed
        downloader: Any = importlib.import_module("img2dataset.downloader")
        resizer: Any = importlib.import_module("img2dataset.resizer")
    folder.mkdir()
    feather = folder / "0.feather"
    table = pa.table({"url": urls})
    with pa.OSFile(str(feather), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    shard.resize = resizer.Resizer(
        image_size=picture.short_side_px,
        resize_mode="keep_ratio",
        resize_only_if_bigger=True,
        encode_quality=picture.jpeg_quality,
        encode_format="jpg",
    )
    work = downloader.Downloader(
        sample_writer_class=lambda *arguments: shard,
        resizer=shard,
        thread_count=min(fetch.threads, len(urls)),
        save_caption=False,
        extract_exif=False,
        output_folder=str(folder),
        column_list=["url"],
        timeout=fetch.deadline_s,
        number_sample_per_shard=len(urls),
        oom_shard_count=5,
        compute_hash=None,
        verify_hash_type=None,
        encode_format="jpg",
        retries=0,  # the Fetcher's, which wait and leave a 404 alone
        user_agent_token=None,
        disallowed_header_directives=None,  # the Fetcher's
    )
    # In a thread: a Ctrl-C that met its loop would wait for ever for the thread that feeds its pool. So it meets us,
    # the fetcher is closed, what is left ends as `timeout`, and the loop comes to its end.
    with _installed(shard, resizer), ThreadPoolExecutor(1, "img2dataset") as thread:
        running = thread.submit(work.download_shard, (0, str(feather)))
        try:
            running.result()
        finally:
            shard.fetcher.close()


@contextmanager
def _installed(shard: _Shard, resizer: Any) -> Iterator[None]:
    """`urlopen` goes through us, and a resize leaves the process's stdout and stderr alone."""
    suppress = resizer.SuppressStdoutStderr
    resizer.SuppressStdoutStderr = contextlib.nullcontext
    urllib.request.install_opener(shard)  # type: ignore[arg-type]
    try:
        yield
    finally:
        urllib.request.install_opener(None)  # type: ignore[arg-type]
        resizer.SuppressStdoutStderr = suppress


class _Shard:
    """Opener, resizer and sample writer of one run of img2dataset's Downloader.

    `open` is called in its threads; `__call__` (the resizer) and `write` one after the other in its loop.
    """

    def __init__(
        self,
        fetcher: Fetcher,
        not_after_s: float,
        filters: FilterSettings,
        picture: PictureSettings,
        spool: Spool,
        rows: dict[int, Row],
        attempt: Attempt,
    ) -> None:
        self.fetcher = fetcher
        self.resize: Any = None
        self.failure: OSError | None = None
        self._not_after_s = not_after_s
        self._filters = filters
        self._picture = picture
        self._spool = spool
        self._rows = rows
        self._attempt = attempt
        self._fetched: dict[int, Fetched] = {}
        self._judged = Row()

    # --- the opener -------------------------------------------------------------------------------------------------
    def open(self, request: Any, data: object = None, timeout: object = None) -> _Response:
        """What `urlopen` calls. Raises _Refused with a reason in its text."""
        answer = self.fetcher.fetch(request.full_url, not_after=self._not_after_s)
        if isinstance(answer, Rejected):
            raise _Refused(_text(answer))
        self._fetched[int(request.fragment or "")] = answer
        return _Response(answer)

    # --- the resizer ------------------------------------------------------------------------------------------------
    def __call__(self, stream: BytesIO, boxes: object = None) -> tuple[bytes | None, Any, Any, Any, Any, str | None]:
        """(JPEG, width, height, original width, original height, error), as img2dataset's Resizer."""
        self._judged = row = Row()
        try:  # a bug of ours that one picture meets must not cost its shard
            rejected = self._judge(stream.getvalue(), row)
            if rejected:
                return None, None, None, None, None, _text(rejected)
            jpeg, width, height, _, _, error = self.resize(stream)
            if jpeg is None:
                return None, None, None, None, None, error
            row.dhash = dhash(_pixels(jpeg))
            return jpeg, width, height, row.original_width, row.original_height, None
        except Exception:
            self._attempt.internal.append(traceback.format_exc())
            rejected = Rejected(Reason.INTERNAL, "the traceback is in the shard's attempt record")
            return None, None, None, None, None, _text(rejected)

    def _judge(self, data: bytes, row: Row) -> Rejected | None:
        """Fills the row; what our filters and our decoder say of a picture before img2dataset's decodes it."""
        row.bytes_in, row.sha256 = len(data), sha256(data)
        header = read_header(data)
        if isinstance(header, Rejected):
            return header
        row.original_width, row.original_height = header.width, header.height
        row.exif_orientation = header.orientation
        if rejected := judge_header(header, self._filters):
            return rejected
        pixels = decode(data, header, self._picture.short_side_px)
        return pixels if isinstance(pixels, Rejected) else judge_pixels(pixels, self._filters)

    # --- the sample writer ------------------------------------------------------------------------------------------
    def write(self, jpeg: bytes | None, key: str, caption: object, meta: dict[str, Any]) -> None:
        """What img2dataset calls once for each row, if it loses none."""
        i = int(meta["url"].rpartition("#")[2])
        row = Row() if meta["status"] == "failed_to_download" else self._judged
        if fetched := self._fetched.pop(i, None):
            fetched.release()
            row.http_status, row.final_url = fetched.http_status, fetched.final_url
            row.content_type = fetched.content_type
        self._attempt.rows_done += 1
        if jpeg is None:
            self._rows[i] = row.reject(reason_of(meta["error_message"]))
            return
        row.status, row.width, row.height = SUCCESS, meta["width"], meta["height"]
        try:
            row.spooled_at, row.jpg_size = self._spool.append(jpeg), len(jpeg)
        except OSError as error:  # img2dataset would print it and go on
            self.failure = error
            raise
        self._rows[i] = row

    def close(self) -> None:
        """Nothing is open."""


class _Refused(Exception):
    """Carries a reason through img2dataset, which keeps the text alone."""


class _Response:
    """The part of urllib's response that img2dataset uses."""

    def __init__(self, fetched: Fetched) -> None:
        self.headers = Message()
        self._data = fetched.data

    def __enter__(self) -> _Response:
        return self

    def __exit__(self, *error: object) -> None: ...

    def read(self) -> bytes:
        return self._data


def _pixels(jpeg: bytes) -> Any:
    header = read_header(jpeg)
    assert not isinstance(header, Rejected)
    return decode(jpeg, header, min(header.width, header.height))
