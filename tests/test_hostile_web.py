"""The hostile web as a promise: each answer gives exactly its reason or exactly its picture, in time, in little memory,
and without one connection to an address that is not public."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.store import LocalStore
from ops.pictures import decode_stored
from ops.plan import Columns, PlanSettings, extend_plan
from ops.reasons import SUCCESS
from ops.shards import read_receipts, tar_members
from tests.hostile_web import FORBIDDEN, Kind, answer, canned, demo_web, kinds, psnr, seen, serve_kinds
from tests.pairs import FILTERS, rows

DEADLINE_S = 8.0


def listed(table: dict[str, Kind], url: str, port: int, trap_port: int) -> list[tuple[str | None, bytes | None, str]]:
    """(url, caption, status wanted): every kind, and what is wrong before anything is asked."""
    pairs: list[tuple[str | None, bytes | None, str]] = [
        (f"{url}/{path}", b"a generated picture, number %d" % number, kind.want)
        for number, (path, kind) in enumerate(table.items())
        if path != "robots.txt"
    ]
    good = b"a picture that was drawn for a test"
    for name, host in FORBIDDEN.items():
        pairs.append((f"http://{host}:{trap_port}/{name}", good, "address_forbidden"))
    for caption, want in (
        (None, "caption_missing"), (b"", "caption_missing"), (b" \n", "caption_missing"),
        (b"caf\xe9 in Paris by night", "caption_encoding"), (b"a\0 picture of a NUL", "caption_encoding"),
        (b"a picture \x1b[31m in red", "caption_encoding"), (b"many words " * 10_000, "caption_long"),
        (b"x", "caption_short"),
    ):  # fmt: skip
        pairs.append((f"{url}/jpeg?{len(pairs)}", caption, want))
    for wrong, want in (
        (None, "url_invalid"), ("", "url_invalid"), ("jpeg", "url_invalid"), ("http://", "url_invalid"),
        ("http://me:pw@127.0.0.1/", "url_invalid"), ("http://127.0.0.1:99999/", "url_invalid"),
        ("http://a b.example/", "url_invalid"), ("http://[::1/", "url_invalid"),
        (f"{url}/{'x' * 9000}", "url_invalid"), ("file:///etc/hostname", "url_scheme"),
        ("data:image/png;base64,iVBO", "url_scheme"), ("ftp://127.0.0.2/x.jpg", "url_scheme"),
        ("http://none.example/x.jpg", "dns_no_such_host"), ("http://again.example/x.jpg", "dns_failure"),
        (f"http://rebinding.example:{port}/drawn-9", SUCCESS), (f"http://rebinding.example:{port}/drawn-10", SUCCESS),
        (f"http://Bücher.example:{port}/drawn-11", SUCCESS), (f"  {url}/drawn-12\n", SUCCESS),
        (f"{url}/drawn ü.jpg", SUCCESS), (f"{url}/drawn%20%C3%BC.jpg#part", SUCCESS),
        ("http://127.0.0.1:9/nobody-listens", "connect"),
    ):  # fmt: skip
        pairs.append((wrong, good, want))
    return pairs


def stored(store: LocalStore) -> dict[str, np.ndarray]:
    """key -> pixels, out of the tars."""
    found = {}
    for receipt in read_receipts(store).values():
        data = (store.root / receipt.files["tar"].key).read_bytes()
        for name, at, size in tar_members(store.root / receipt.files["tar"].key):
            if name.endswith(".jpg"):
                found[name.removesuffix(".jpg")] = decode_stored(data[at : at + size])
    return found


@pytest.mark.slow
def test_the_hostile_web_gives_each_pair_its_reason_or_its_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ExitStack() as servers:
        trap = servers.enter_context(canned(address=("127.0.0.2", 0)))
        traps = [trap, *(servers.enter_context(canned(address=(host, trap.port))) for host in ("127.0.0.1", "::1"))]
        table = kinds(trap.port)
        drawn = demo_web.jpeg(8)
        for path in ("drawn-9", "drawn-10", "drawn-11", "drawn-12", "drawn%20%C3%BC.jpg"):
            table[path] = Kind(answer(drawn), SUCCESS, seen(drawn))
        server = servers.enter_context(canned(serve_kinds(table)))
        pairs = listed(table, server.url, server.port, trap.port)
        write = {"url": [url for url, _, _ in pairs], "caption": pa.array([c for _, c, _ in pairs], pa.binary())}
        pq.write_table(pa.table(write), tmp_path / "list.parquet")
        store = LocalStore(tmp_path / "pairs")
        extend_plan(store, [str(tmp_path / "list.parquet")], PlanSettings(unique_urls=False), FILTERS, Columns())
        settings: dict[str, Any] = {
            "allow_private": ["127.0.0.1/32"], "deadline_s": DEADLINE_S, "retries": 1, "backoff_s": 0.05, "threads": 64,
            "connections_per_host": 64, "dead_after": 0,
        }  # fmt: skip
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        done = subprocess.run(
            [sys.executable, "-m", "tests.hostile_web", store.location, json.dumps(settings)],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert [trap.accepted for trap in traps] == [0, 0, 0], "a connection to a forbidden address"
        assert server.paths["/robots.txt"] == len({"127.0.0.1", "rebinding.example", "xn--bcher-kva.example"})
        assert "/closed/by-robots" not in server.paths
    told = json.loads(done.stdout)
    assert told["states"] == ["committed"]
    found = rows(store)
    assert len(found) == len(pairs) >= 170
    want = {url or "": status for url, _, status in pairs}
    wrong, compared = [], 0
    pixels = stored(store)
    for row in found:
        status = want[row["url"] or ""]
        kind = table.get(row["final_url"].removeprefix(server.url).lstrip("/")) if row["final_url"] else None
        if row["status"] != status:
            wrong.append(f"{row['url']}: {row['status']} ({row['detail']}), not {status}")
        elif status == SUCCESS and kind and kind.picture is not None:
            kept, compared = pixels[row["key"]], compared + 1
            if kept.shape != kind.picture.shape or psnr(kept, kind.picture) < 30:
                wrong.append(f"{row['url']}: another picture, {kept.shape}")
        assert "Error" not in (row["detail"] or ""), "fixed texts only"
    assert not wrong, "\n".join(wrong)
    assert compared >= 50
    print(len(found), "rows,", compared, "pictures,", told)
    assert told["grown_mb"] < 300
    assert told["seconds"] < 2 * DEADLINE_S
