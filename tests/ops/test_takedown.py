from __future__ import annotations

import io
import shutil
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.store import LocalStore, Store, open_store
from ops.drops import list_drops, read_drops
from ops.errors import UsageError
from ops.reader import codes_reader, pictures_reader
from ops.shards import Receipt, publish, read_receipts, write_table
from ops.snapshot import take_snapshot
from ops.takedown import drop
from tests.ops.conftest import Learned, MakePairs
from tests.small_runs import write_pair_shard


def url(number: int) -> str:
    return f"http://example.org/{number}"


def uid(number: int) -> str:
    return f"{number:032x}"


def listed(tmp_path: Path, *lines: str) -> str:
    path = tmp_path / "gone.txt"
    path.write_text("\n".join(lines))
    return str(path)


@pytest.fixture
def run(learned: Learned, tmp_path: Path) -> Path:
    for stage in ("pairs", "tokens"):
        shutil.copytree(getattr(learned, stage), tmp_path / "run" / stage)
    return tmp_path / "run"


def seen(run: Path) -> tuple[set[str], set[str]]:
    """The uids that a reader of the pictures and one of the codes give."""
    pairs, tokens = open_store(str(run / "pairs")), open_store(str(run / "tokens"))
    pictures = pictures_reader(pairs, take_snapshot(pairs, "pictures", {}), 0)
    snapshot = take_snapshot(tokens, "codes", {})
    codes = codes_reader(tokens, snapshot, 0, str(snapshot.tokenizer))
    of_pictures = [*pictures.rows(0, pictures.rows_per_epoch), *pictures.held_out()]
    return {row.uid for row in of_pictures}, {
        row.uid for row in [*codes.rows(0, codes.rows_per_epoch), *codes.held_out()]
    }


def test_a_url_goes_down_in_pictures_and_codes_and_what_is_not_there_is_named(run: Path, tmp_path: Path) -> None:
    before = seen(run)
    told = drop([str(run)], listed(tmp_path, url(1), "", url(4), "http://example.org/none", url(1)), None)
    assert told["asked"] == 3
    assert told["found"] == {"pairs": 2, "kept": 1}, "the fifth row of a shard was never kept"
    assert told["not_found"] == ["http://example.org/none"]
    assert set(told["added"].values()) == {5}
    assert seen(run) == tuple(uids - {uid(1)} for uids in before)


def test_the_same_call_again_adds_nothing_and_finishes_one_that_was_killed(run: Path, tmp_path: Path) -> None:
    file = listed(tmp_path, url(1), url(2))
    drop([str(run / "pairs")], file, None)  # as far as a kill between the two stages would have come
    assert list_drops(LocalStore(run / "tokens")) == []
    told = drop([str(run / "pairs"), str(run / "tokens")], file, None)
    assert list(told["added"].values()) == [0, 4]
    assert list(drop([str(run)], file, None)["added"].values()) == [0, 0]
    assert list_drops(LocalStore(run / "tokens")) == list_drops(LocalStore(run / "pairs"))


def test_without_a_file_codes_follow_their_pairs(run: Path, tmp_path: Path) -> None:
    drop([str(run / "pairs")], listed(tmp_path, url(1)), None)
    assert uid(1) in seen(run)[1]
    drop([str(run)], None, None)
    assert uid(1) not in seen(run)[1]


def test_a_uid_goes_down_alone_and_in_codes_that_lie_alone(run: Path, tmp_path: Path) -> None:
    told = drop([str(run / "tokens")], None, listed(tmp_path, uid(1).upper(), uid(999)))
    assert (told["found"]["pairs"], told["not_found"]) == (1, [uid(999)])
    assert uid(1) not in seen(run)[1]


def test_a_url_stays_down_when_a_later_list_brings_it_with_another_caption(
    make_pairs: MakePairs, tmp_path: Path
) -> None:
    pairs = make_pairs(shards=1, rows=10)
    assert drop([str(pairs)], listed(tmp_path, url(21)), None)["not_found"] == [url(21)]
    write_pair_shard(pairs, 1, list(range(20, 30)))
    store = open_store(str(pairs))
    reader = pictures_reader(store, take_snapshot(store, "pictures", {}), 0)
    assert uid(21) not in {row.uid for row in [*reader.rows(0, reader.rows_per_epoch), *reader.held_out()]}


def test_a_url_is_found_where_redirects_led_and_parquet_names_it_too(make_pairs: MakePairs, tmp_path: Path) -> None:
    pairs = make_pairs(shards=1, rows=10)
    _redirect(open_store(str(pairs)), 0, 3, "http://cdn.example.org/x.jpg", tmp_path)
    pq.write_table(pa.table({"url": ["http://cdn.example.org/x.jpg", None]}), tmp_path / "gone.parquet")
    told = drop([str(pairs)], str(tmp_path / "gone.parquet"), None)
    assert (told["found"], told["not_found"]) == ({"pairs": 1, "kept": 1}, [])
    store = open_store(str(pairs))
    assert [value.hex() for value in read_drops(store).uids.tolist()] == [uid(3)]
    reader = pictures_reader(store, take_snapshot(store, "pictures", {}), 0)
    assert uid(3) not in {row.uid for row in reader.rows(0, reader.rows_per_epoch)}


def _redirect(store: Store, shard: int, row: int, final_url: str, scratch: Path) -> None:
    """A next generation of the shard in which a row says that it came from elsewhere."""
    receipt = read_receipts(store)[shard]
    table = pq.read_table(io.BytesIO(store.read(receipt.files["parquet"].key)))
    urls = [final_url if at == row else None for at in range(table.num_rows)]
    place = table.column_names.index("final_url")
    groups = write_table(scratch / "parquet", table.set_column(place, "final_url", pa.array(urls, pa.string())))
    (scratch / "tar").write_bytes(store.read(receipt.files["tar"].key))
    made_from = {"work_order": receipt.made_from["work_order"]}
    new = Receipt("pairs", shard, 1, made_from, receipt.rows, receipt.kept, receipt.rejected, row_groups=groups)
    assert publish(store, new, {name: scratch / name for name in ("tar", "parquet")})


def test_lines_may_come_from_a_pipe(make_pairs: MakePairs, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = make_pairs(shards=1, rows=10)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(f"\ufeff{url(1)}\r\n".encode())))
    assert drop([str(pairs)], "-", None)["found"] == {"pairs": 1, "kept": 1}


@pytest.mark.parametrize(
    ("file", "data", "told"),
    [
        ("uids", b"http://example.org/1\n", "is no uid.*--urls"),
        ("uids", b"\n \n", "names no uid"),
        ("urls", b"\xff\xfe\x00", "no UTF-8 text"),
        ("urls", b"PAR1 and no Parquet", "no Parquet file with a column 'url'"),
    ],
)
def test_a_file_that_says_nothing_is_refused(
    file: str, data: bytes, told: str, make_pairs: MakePairs, tmp_path: Path
) -> None:
    pairs = make_pairs(shards=1, rows=10)
    (tmp_path / "gone").write_bytes(data)
    named = {"urls": None, "uids": None, file: str(tmp_path / "gone")}
    with pytest.raises(UsageError, match=told):
        drop([str(pairs)], named["urls"], named["uids"])
    assert list_drops(open_store(str(pairs))) == []
