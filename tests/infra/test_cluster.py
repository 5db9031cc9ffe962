from __future__ import annotations

import os
from pathlib import Path

import pytest

from infra.cluster import QUIET, REPO, Cluster, connect


def _look() -> tuple[str, dict[str, str | None]]:
    import ops.reasons

    return str(Path(ops.reasons.__file__ or "")), {name: os.environ.get(name) for name in QUIET}


@pytest.mark.cluster
def test_a_worker_imports_our_rooms_and_has_the_quiet_environment(ray_cluster: None) -> None:
    import ray

    where, environment = ray.get(ray.remote(_look).remote())
    assert REPO in Path(where).parents
    assert environment == {name: os.environ[name] for name in QUIET}


@pytest.mark.cluster
def test_connecting_inside_a_connection_shares_it_and_leaves_it_alone(ray_cluster: None) -> None:
    import ray

    with connect(Cluster(address=None, cpus=2)) as dashboard:
        assert dashboard is None
    assert ray.is_initialized()


def test_the_address_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.1.2.3:6379")
    assert Cluster().address == "10.1.2.3:6379"
    monkeypatch.delenv("RAY_ADDRESS")
    assert Cluster().address is None
