"""The sort outside memory gives what a sort in memory gives, whatever the pieces."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ops import uid_sort
from ops.errors import BadList
from ops.uid_sort import UidSort, uid_bytes

UIDS = st.integers(0, 5).flatmap(
    lambda high: st.sampled_from([bytes([high * 50]) + bytes(15), bytes([high * 50, *range(15)])])
)


def table(uids: list[bytes], **columns: pa.Array) -> pa.Table:
    return pa.table({"uid": pa.array(uids, pa.binary(16)), **columns})


@settings(deadline=None, max_examples=60)  # the first example pays for imports
@given(st.lists(UIDS, max_size=40), st.integers(1, 9), st.integers(1, 9), st.integers(0, 5))
def test_rows_come_back_by_uid_and_equal_ones_in_the_order_they_came(
    tmp_path_factory: pytest.TempPathFactory, uids: list[bytes], piece: int, run_rows: int, buckets: int
) -> None:
    with pytest.MonkeyPatch.context() as patch, UidSort(tmp_path_factory.mktemp("sort"), buckets << 24) as rows:
        patch.setattr(uid_sort, "RUN_ROWS", run_rows)
        for start in range(0, len(uids), piece):
            part = uids[start : start + piece]
            rows.add(table(part, n=pa.array(range(start, start + len(part)))), "a list")
        found = [(row["uid"], row["n"]) for part in rows.sorted() for row in part.to_pylist()]
    assert found == sorted(zip(uids, range(len(uids)), strict=True))


def test_columns_that_came_later_are_null_in_the_runs_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uid_sort, "RUN_ROWS", 1)
    with UidSort(tmp_path, 0) as rows:
        rows.add(table([b"b" * 16], n=pa.array([1])), "first")
        rows.add(table([b"a" * 16], n=pa.array([0.5]), tags=pa.array([["x"]])), "second")
        with pytest.raises(
            BadList, match=r"third: column 'n' holds string here and double in the rows or lists before"
        ):
            rows.add(table([b"c" * 16], n=pa.array(["x"])), "third")
        [found] = rows.sorted()
    assert found["n"].to_pylist() == [0.5, 1.0]
    assert found["tags"].to_pylist() == [["x"], None]
    assert uid_bytes(found) == b"a" * 16 + b"b" * 16
