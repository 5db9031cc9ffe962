"""img2dataset's Downloader and Resizer in our shard: its pictures, our reasons, and what it loses is not counted."""

from __future__ import annotations

import errno
import importlib
import os
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from infra.store import LocalStore
from ops.demo_web import HOSTILE, DemoWeb, serve
from ops.errors import RecipeChanged
from ops.filters import FilterSettings
from ops.img2dataset_engine import reason_of
from ops.ingest import ingest_shard, start_pairs
from ops.pictures import PictureSettings
from ops.plan import PlanSettings
from ops.shards import read_receipts
from ops.sidecar import Spool
from tests.pairs import FETCH, PICTURE, Pairs, assert_conserved, generated, pending, plan, reruns, rows, statuses

THEIRS = replace(PICTURE, engine="img2dataset")


@pytest.fixture
def web(tmp_path: Path) -> Iterator[DemoWeb]:
    with serve(tmp_path) as web:
        yield web


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "theirs")


@pytest.fixture(scope="module", autouse=True)
def img2dataset() -> None:
    """Imported before the tests: its seconds are nobody's deadline."""
    import warnings

    with warnings.catch_warnings(action="ignore"):
        importlib.import_module("img2dataset.downloader")


def ingest(store: LocalStore, tmp_path: Path, pairs: Pairs, picture: PictureSettings = THEIRS, **changed: Any) -> str:
    """Plans and does one shard; how it ended."""
    plan(store, tmp_path / "list.tsv", pairs)
    (task,) = pending(store, picture=picture, **changed)
    return ingest_shard(task).state


def picture(store: LocalStore, row: dict[str, Any]) -> np.ndarray:
    (receipt,) = read_receipts(store).values()
    jpeg = store.read_range(receipt.files["tar"].key, row["tar_offset"], row["jpg_size"])
    return cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)


def test_both_engines_give_each_kind_of_answer_the_same_reason_and_the_same_geometry(
    store: LocalStore, tmp_path: Path, web: DemoWeb
) -> None:
    kinds = [kind for kind in HOSTILE if kind not in ("heals_later", "slow", "silent")]  # the next does for all three
    pairs = [*generated(web.url, range(12)), *((f"{web.url}/hostile/{kind}/1", f"a {kind} answer") for kind in kinds)]
    pairs += [(url, f"caption of {url}") for url in ("file:///etc/hostname", "data:image/png;base64,AA", "ftp://x/1")]
    ours = LocalStore(tmp_path / "ours")
    fetch = replace(FETCH, deadline_s=6)
    assert ingest(ours, tmp_path, pairs, PICTURE, fetch=fetch) == "committed"
    assert ingest(store, tmp_path, pairs, fetch=fetch) == "committed"
    assert_conserved(store, pairs)
    assert statuses(store) == statuses(ours)
    assert {statuses(store)[url] for url in ("file:///etc/hostname", "data:image/png;base64,AA", "ftp://x/1")} == {
        "url_scheme"
    }
    for mine, their in zip(rows(ours), rows(store), strict=True):
        for name in ("final_url", "http_status", "content_type", "bytes_in", "sha256", "original_width", "detail"):
            assert mine[name] == their[name], (mine["url"], name)
        kind = mine["url"].split("/")[4] if "/hostile/" in mine["url"] else ""
        if kind == "sideways":
            assert (mine["width"], mine["height"]) == (their["height"], their["width"]), "theirs is not turned upright"
            assert their["exif_orientation"] == 6
        elif mine["status"] == "success":
            assert (mine["width"], mine["height"]) == (their["width"], their["height"])
            error = np.mean((picture(ours, mine).astype(float) - picture(store, their)) ** 2)
            assert (10 * np.log10(255**2 / error) > 30) == (kind != "sixteen_bit"), kind  # which they make white


def test_what_img2dataset_loses_after_it_was_a_success_is_internal_and_a_rerun_gets_it(
    store: LocalStore, tmp_path: Path, web: DemoWeb, monkeypatch: pytest.MonkeyPatch
) -> None:
    downloader: Any = importlib.import_module("img2dataset.downloader")
    compute_key = downloader.compute_key

    def failing(key: int, *rest: Any) -> Any:
        if key in (2, 7):
            raise ValueError("a bug of theirs, which they print")
        return compute_key(key, *rest)

    pairs = generated(web.url, range(12))
    with monkeypatch.context() as broken:
        broken.setattr(downloader, "compute_key", failing)
        assert ingest(store, tmp_path, pairs) == "committed"
    assert_conserved(store, pairs)
    assert sorted(statuses(store).values()) == ["internal"] * 2 + ["success"] * 10
    (task,) = reruns(store, picture=THEIRS)
    assert ingest_shard(task).state == "committed"
    assert_conserved(store, pairs)
    assert set(statuses(store).values()) == {"success"}
    assert sorted(web.counts().values()) == [1] * 10 + [2] * 2


def test_a_disk_that_fails_once_fails_the_attempt_and_the_next_one_completes(
    store: LocalStore, tmp_path: Path, web: DemoWeb, monkeypatch: pytest.MonkeyPatch
) -> None:
    """img2dataset prints it, goes on, and calls the sample a success."""
    append, calls = Spool.append, 0

    def failing(spool: Spool, data: bytes) -> int:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return append(spool, data)

    pairs = generated(web.url, range(8))
    with monkeypatch.context() as broken:
        broken.setattr(Spool, "append", failing)
        with pytest.raises(OSError, match="Input/output error"):
            ingest(store, tmp_path, pairs)
    assert read_receipts(store) == {}
    (task,) = pending(store, picture=THEIRS)
    assert ingest_shard(task).state == "committed"
    assert_conserved(store, pairs)


def test_a_shard_with_nothing_to_ask_for_commits(store: LocalStore, tmp_path: Path) -> None:
    assert ingest(store, tmp_path, [("http://x/1.jpg", ""), ("http://x/2.jpg", "")]) == "committed"


def test_an_outage_is_deferred(store: LocalStore, tmp_path: Path, web: DemoWeb) -> None:
    web.outage = True
    assert ingest(store, tmp_path, generated(web.url, range(6))) == "deferred"


def test_the_same_bytes_give_the_same_shard_with_1_and_16_threads(tmp_path: Path, web: DemoWeb) -> None:
    delays = np.random.default_rng(0).integers(0, 30, 24)
    pairs = [pair for i in range(24) for pair in generated(web.url, range(i, i + 1), delay_ms=int(delays[i]))]
    files = []
    for threads in (1, 16):
        store = LocalStore(tmp_path / f"{threads}")
        ingest(store, tmp_path, pairs, fetch=replace(FETCH, threads=threads, connections_per_host=16))
        (receipt,) = read_receipts(store).values()
        files.append(receipt.files)
    assert files[0] == files[1]


def test_the_process_keeps_its_stdout_and_its_urlopen(
    store: LocalStore, tmp_path: Path, web: DemoWeb, capfd: pytest.CaptureFixture[str]
) -> None:
    """img2dataset's SuppressStdoutStderr sends 97 % of other threads' lines nowhere."""
    written, stop = 0, threading.Event()

    def write() -> None:
        nonlocal written
        while not stop.wait(0.001):
            os.write(1, b"a line\n")
            written += 1

    thread = threading.Thread(target=write)
    thread.start()
    assert ingest(store, tmp_path, generated(web.url, range(40))) == "committed"
    stop.set()
    thread.join()
    assert capfd.readouterr().out.count("a line") == written > 20
    with urllib.request.urlopen(f"{web.url}/_counts") as answer:
        assert answer.status == 200
    with pytest.raises(UnicodeEncodeError):
        urllib.request.urlopen("http://127.0.0.1:9/\u00e4")


def test_the_engine_is_part_of_what_pairs_are(store: LocalStore) -> None:
    start_pairs(store, PlanSettings(), FilterSettings(), THEIRS)
    with pytest.raises(RecipeChanged, match=r"picture\.engine: was 'img2dataset', now 'armchair'"):
        start_pairs(store, PlanSettings(), FilterSettings(), PICTURE)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("HTTP Error 404: Not Found", "http_4xx"),
        ("HTTP Error 429: Too Many Requests", "http_429"),
        ("HTTP Error 503: Service Unavailable", "http_5xx"),
        (
            "HTTP Error 302: The HTTP server returned a redirect error that would lead to an infinite loop.\nThe last",
            "redirect_limit",
        ),
        ("HTTP Error 302: Found - Redirection to url 'file:///etc/hostname' is not allowed", "redirect_forbidden"),
        ("Use of image disallowed by X-Robots-Tag directive", "opt_out"),
        ("hash mismatch", "hash_mismatch"),
        ("timed out", "timeout"),
        ("<urlopen error timed out>", "timeout"),
        ("The read operation timed out", "timeout"),
        ("IncompleteRead(4096 bytes read, 4096 more expected)", "truncated"),
        ("<urlopen error [Errno -2] Name or service not known>", "dns_no_such_host"),
        ("<urlopen error [Errno -3] Temporary failure in name resolution>", "dns_failure"),
        ("<urlopen error [SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: self-signed>", "tls"),
        ("<urlopen error [Errno 111] Connection refused>", "connect"),
        ("[Errno 104] Connection reset by peer", "connect"),
        ("Remote end closed connection without response", "connect"),
        ("<urlopen error unknown url type: gopher>", "url_scheme"),
        ("unknown url type: 'None'", "url_invalid"),
        ("URL can't contain control characters. '/a b.jpg' (found at least ' ')", "url_invalid"),
        ("'ascii' codec can't encode character '\\xe4' in position 10: ordinal not in range(128)", "url_invalid"),
        ("Image decoding error", "decode"),
        ("OpenCV(4.14.0) /io/opencv/modules/imgcodecs/src/loadsave.cpp:1043: error: (-215) !buf.empty()", "decode"),
        ("image too small", "too_small"),
        ("aspect ratio too large", "aspect"),
        ("image area too large", "pixels_too_many"),
        ("something new", "internal"),
        (None, "internal"),
    ],
)
def test_the_texts_of_its_errors_have_reasons(text: str | None, reason: str) -> None:
    assert reason_of(text).reason == reason
