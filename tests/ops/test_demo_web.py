from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path

import pytest

from ops import demo_web
from ops.reasons import SUCCESS, Reason

REPO = Path(__file__).parents[2]


def get(url: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def test_pictures_of_the_folder_are_served_and_nothing_outside(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "ä b.png").write_bytes(b"picture")
    (tmp_path / "secret").write_bytes(b"secret")
    (folder / "link").symlink_to(tmp_path / "secret")
    with demo_web.serve(folder) as web:
        assert get(f"{web.url}/pictures/sub/%C3%A4%20b.png") == (200, b"picture")
        for path in ("../secret", "%2e%2e/secret", "link", "sub", "none.png", "/etc/hostname"):
            assert get(f"{web.url}/pictures/{path}")[0] == 404


def test_generated_pictures_are_small_distinct_and_always_the_same(tmp_path: Path) -> None:
    with demo_web.serve(tmp_path) as web:
        pictures = [get(f"{web.url}/generated/{seed}.jpg")[1] for seed in range(20)]
        assert len(set(pictures)) == 20
        assert max(map(len, pictures)) < 15_000
        assert get(f"{web.url}/generated/3.jpg?delay_ms=1")[1] == pictures[3] == demo_web.jpeg(3)


def test_a_delay_is_kept(tmp_path: Path) -> None:
    with demo_web.serve(tmp_path) as web:
        start = time.monotonic()
        get(f"{web.url}/generated/1.jpg?delay_ms=300")
        assert time.monotonic() - start >= 0.3


def test_requests_are_counted_exactly_from_many_threads(tmp_path: Path) -> None:
    with demo_web.serve(tmp_path) as web:
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(get, [f"{web.url}/generated/{i % 4}.jpg?delay_ms=0" for i in range(200)]))
        assert web.counts() == {f"/generated/{i}.jpg": 50 for i in range(4)}
        assert json.loads(get(f"{web.url}/_counts")[1]) == web.counts()
        assert web.bytes_out() >= 50 * sum(len(demo_web.jpeg(i)) for i in range(4))


def test_connections_can_be_used_again(tmp_path: Path) -> None:
    with demo_web.serve(tmp_path) as web:
        connection = HTTPConnection(web.url.removeprefix("http://"))
        for path in ("/generated/1.jpg", "/none", "/hostile/missing/1", "/generated/1.jpg"):
            connection.request("GET", path)
            answer = connection.getresponse()
            answer.read()
        assert answer.status == 200
        connection.close()


def test_what_heals_heals_for_each_id_by_itself(tmp_path: Path) -> None:
    with demo_web.serve(tmp_path) as web:
        assert [get(f"{web.url}/hostile/heals/a")[0] for _ in range(3)] == [503, 200, 200]
        assert [get(f"{web.url}/hostile/heals/b")[0] for _ in range(2)] == [503, 200]
        assert [get(f"{web.url}/hostile/heals_later/a")[0] for _ in range(5)] == [503, 503, 503, 200, 200]


def test_an_outage_can_be_switched_on_and_off(tmp_path: Path) -> None:
    with demo_web.serve(tmp_path) as web:
        web.outage = True
        assert get(f"{web.url}/generated/1.jpg")[0] == 503
        web.outage = False
        assert get(f"{web.url}/generated/1.jpg")[0] == 200


def test_hostile_kinds_promise_statuses_of_the_closed_list() -> None:
    assert set(demo_web.HOSTILE.values()) <= {SUCCESS, *map(str, Reason)}


def test_unknown_paths_are_missing(tmp_path: Path) -> None:
    with demo_web.serve(tmp_path) as web:
        for path in ("/", "/hostile/nonsense/1", "/generated/x.jpg", "/_secret"):
            assert get(web.url + path)[0] == 404


def test_the_end_does_not_wait_for_those_who_drip(tmp_path: Path) -> None:
    with demo_web.serve(tmp_path) as web:
        clients = [socket.create_connection(("127.0.0.1", int(web.url.rpartition(":")[2]))) for _ in range(3)]
        for kind, client in zip(("slow", "silent", "endless"), clients, strict=True):
            client.sendall(f"GET /hostile/{kind}/1 HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        start = time.monotonic()
    assert time.monotonic() - start < 2
    for client in clients:
        client.close()


def test_as_a_process_it_prints_its_url_first_and_serves_on_loopback_only(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"picture")
    command = [sys.executable, "-m", "ops.demo_web", str(tmp_path)]
    with subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            url = process.stdout.readline().strip()
            assert url.startswith("http://127.0.0.1:")
            assert get(f"{url}/pictures/a.png") == (200, b"picture")
            assert json.loads(get(f"{url}/_counts")[1]) == {"/pictures/a.png": 1}
            with pytest.raises(OSError, match="refused"):
                socket.create_connection(("127.0.0.2", int(url.rpartition(":")[2])), timeout=2)
        finally:
            process.terminate()
            rest, errors = process.communicate(timeout=10)
    assert (rest, errors) == ("", "")
