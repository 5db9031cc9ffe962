"""Servers for tests in buckets: SeaweedFS (a real S3 server, a process of ours), moto, and a proxy that misbehaves."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import pytest
from botocore.exceptions import BotoCoreError, ClientError

BUCKET = "armchair"
KEY_ID, SECRET = "armchair", "a secret of tests"
READER = "reader"
"""The key id of somebody who may read only (SeaweedFS)."""


@dataclass(frozen=True)
class Bucket:
    """A bucket of a server on loopback, and the environment in which boto3 finds it."""

    endpoint: str

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": KEY_ID,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        }

    def use(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Makes it the one that this process talks to."""
        for name, value in self.environment.items():
            monkeypatch.setenv(name, value)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now, all different."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextmanager
def seaweedfs(directory: Path) -> Iterator[Bucket]:
    """A SeaweedFS server with its data and its log below `directory`, and a bucket in it."""
    (directory / "data").mkdir(parents=True)
    # No admin: an admin's put would make a bucket that is not there.
    rights = {KEY_ID: ["Read", "Write", "List", "Tagging"], READER: ["Read", "List"]}
    identities = [
        {"name": name, "credentials": [{"accessKey": name, "secretKey": SECRET}], "actions": actions}
        for name, actions in rights.items()
    ]
    (directory / "identities.json").write_text(json.dumps({"identities": identities}))
    names = ("s3", "master", "volume", "filer", "admin", "webdav")
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    grpc = dict(zip(names[:5], free_ports(5), strict=True))
    command = [str(Path(sys.executable).with_name("weed")), "mini", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    command += [f"-dir={directory / 'data'}", f"-s3.config={directory / 'identities.json'}"]
    command += [f"-{name}.port={port}" for name, port in ports.items()]
    command += [f"-{name}.port.grpc={port}" for name, port in grpc.items()]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false", f"-bucket={BUCKET}"]
    yield from _serving(command, directory / "log.txt", ports["s3"])


@contextmanager
def moto(directory: Path) -> Iterator[Bucket]:
    """moto's server, with its log below `directory`, and a bucket in it."""
    directory.mkdir(parents=True)
    [port] = free_ports(1)
    command = [str(Path(sys.executable).with_name("moto_server")), "-H", "127.0.0.1", "-p", str(port)]
    yield from _serving(command, directory / "log.txt", port)


def _serving(command: list[str], log: Path, port: int) -> Iterator[Bucket]:
    bucket = Bucket(f"http://127.0.0.1:{port}")
    with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=out, cwd=log.parent) as server:
        try:
            for _ in range(600):
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0 and _made(bucket):
                        break
                if server.poll() is not None:
                    break
                time.sleep(0.1)
            else:
                server.kill()
            assert server.poll() is None, f"{command[0]} did not start:\n{log.read_text()[-3000:]}"
            yield bucket
        finally:
            server.kill()


def _made(bucket: Bucket) -> bool:
    client = boto3.client(
        "s3",
        endpoint_url=bucket.endpoint,
        aws_access_key_id=KEY_ID,
        aws_secret_access_key=SECRET,
        region_name="us-east-1",
    )
    try:
        if BUCKET not in [found["Name"] for found in client.list_buckets()["Buckets"]]:
            client.create_bucket(Bucket=BUCKET)
        client.put_object(Bucket=BUCKET, Key="ready", Body=b"")  # SeaweedFS takes buckets before it takes objects
        client.delete_object(Bucket=BUCKET, Key="ready")
    except (BotoCoreError, ClientError):
        return False
    finally:
        client.close()
    return True


@dataclass
class Seen:
    """A request on its way through the proxy. A rule may change it."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


Answer = tuple[int, dict[str, str], bytes]
Rule = Callable[[Seen, Callable[[], Answer]], Answer | None]
"""Gets the request and what passes it on; gives the answer, or None to hang up without one."""


def passed_on(request: Seen, forward: Callable[[], Answer]) -> Answer | None:
    return forward()


class Proxy:
    """Stands before a bucket's server and does to each request what `rule` says. `requests` keeps what it saw."""

    def __init__(self, bucket: Bucket) -> None:
        self.rule: Rule = passed_on
        self.requests: list[tuple[str, str]] = []
        host = bucket.endpoint.removeprefix("http://")
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _serve(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                seen = Seen(self.command, self.path, dict(self.headers.items()), body)
                proxy.requests.append((seen.method, seen.path))

                def forward() -> Answer:
                    headers = {name: value for name, value in seen.headers.items() if name.lower() != "expect"}
                    with closing(http.client.HTTPConnection(host, timeout=60)) as connection:
                        connection.request(seen.method, seen.path, seen.body, headers)
                        with connection.getresponse() as response:
                            return response.status, dict(response.getheaders()), response.read()

                answer = proxy.rule(seen, forward)
                if answer is None:
                    self.close_connection = True
                    return
                status, headers, data = answer
                self.send_response_only(status)
                length = headers.pop("Content-Length", str(len(data)))
                for name, value in headers.items():
                    if name.lower() not in ("transfer-encoding", "connection"):
                        self.send_header(name, value)
                self.send_header("Content-Length", length)
                self.end_headers()
                self.wfile.write(data if seen.method != "HEAD" else b"")
                if len(data) < int(length) and seen.method != "HEAD":
                    self.close_connection = True  # a body that is cut off

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _serve

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.bucket = Bucket(f"http://127.0.0.1:{self._server.server_port}")

    def __enter__(self) -> Proxy:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
