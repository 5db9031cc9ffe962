"""Shared by all tests: one Ray, one home of Prefect and one server a kind of bucket for the session."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest

from infra.cluster import Cluster, connect, quiet_environment
from ops.demo_web import serve
from tests.buckets import BUCKET, Bucket, moto, seaweedfs
from tests.img2dataset_folder import Folder, make_folder
from tests.ops.conftest import learned as learned

quiet_environment()


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local Ray of two CPUs, started at the first test that asks for it."""
    with connect(Cluster(address=None, cpus=2)):
        yield


@pytest.fixture(scope="session")
def seaweedfs_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    """A bucket of a real S3 server, started at the first test that asks for it."""
    with seaweedfs(tmp_path_factory.mktemp("seaweedfs") / "server") as bucket:
        yield bucket


@pytest.fixture(scope="session")
def moto_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bucket]:
    """A bucket of moto's server, started at the first test that asks for it."""
    with moto(tmp_path_factory.mktemp("moto") / "server") as bucket:
        yield bucket


@pytest.fixture(scope="session")
def img2dataset_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Folder]:
    """What a run of the real img2dataset left, with damage. Read only, but for the counts of its web."""
    root = tmp_path_factory.mktemp("img2dataset")
    with serve(root) as web:
        yield make_folder(root, web)


@pytest.fixture
def bucket(seaweedfs_server: Bucket, monkeypatch: pytest.MonkeyPatch) -> str:
    """A new place in SeaweedFS's bucket, which this process talks to."""
    seaweedfs_server.use(monkeypatch)
    return f"s3://{BUCKET}/{secrets.token_hex(4)}/root"


@pytest.fixture(params=["local", "moto", "seaweedfs"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A new place of each kind."""
    if request.param == "local":
        return str(request.getfixturevalue("tmp_path") / "new" / "root")
    server: Bucket = request.getfixturevalue(f"{request.param}_server")
    server.use(monkeypatch)
    return f"s3://{BUCKET}/{secrets.token_hex(4)}/root"
