"""What a node does not see is refused in tests/test_three_nodes.py; here is what is let through."""

from __future__ import annotations

from pathlib import Path

import pytest

from ops.shared import _sees, check_shared


@pytest.mark.cluster
def test_one_machine_is_asked_nothing_and_nothing_is_written(ray_cluster: None, tmp_path: Path) -> None:
    check_shared(str(tmp_path), str(tmp_path / "not there"), "s3://bucket/prefix")
    assert not list(tmp_path.iterdir())


def test_a_file_is_seen_by_its_name_in_the_directory(tmp_path: Path) -> None:
    (tmp_path / ".tmp-1").touch()
    assert _sees(str(tmp_path / ".tmp-1"))
    assert not _sees(str(tmp_path / ".tmp-2"))
    assert not _sees(str(tmp_path / "elsewhere" / ".tmp-1"))
