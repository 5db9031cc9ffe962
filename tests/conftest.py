"""Shared by all tests: one Ray and one home of Prefect for the session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from infra.cluster import Cluster, connect, quiet_environment

quiet_environment()


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local Ray of two CPUs, started at the first test that asks for it."""
    with connect(Cluster(address=None, cpus=2)):
        yield
