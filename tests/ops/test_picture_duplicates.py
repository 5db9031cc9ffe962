from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import ops.picture_duplicates as search
from infra.store import open_store
from ops.drops import add_drops, drop_rows, list_drops, read_drops, whole
from ops.errors import DamagedArtifact, UsageError
from ops.picture_duplicates import BANDS, DISTANCE, LINK, deduplicate, find, near_pairs, read_standing, resolve, scatter
from ops.pictures import encode_jpeg
from ops.shards import read_receipts
from tests.bench.dedup import WAYS, copies_of, emoji, photographs, png, uid_of, write_pairs
from tests.ops.conftest import Learned

Pictures = list[tuple[str, np.ndarray[Any, Any]]]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Pictures:
    """Forty drawings, among them three in six skin tones, and four photographs."""
    cache, hands = tmp_path_factory.mktemp("emoji"), ("1F44B", "1F3CA", "1F385")
    tones = [hand + tone for hand in hands for tone in ("", *(f"-1F3F{tone}" for tone in "BCDEF"))]
    others = [f"1F{number:03X}" for number in range(0x404, 0x404 + 22)]
    return [*emoji(cache, only=[*tones, *others]), *photographs(None, 4)]


@pytest.mark.usefixtures("ray_cluster")
def test_copies_go_and_different_pictures_and_tones_stay(pictures: Pictures, tmp_path: Path) -> None:
    bodies = [(name, png(picture)) for name, picture in pictures]
    ways = {name: WAYS["quality 50"](picture) for name, picture in pictures}
    write_pairs(tmp_path, bodies + [(f"copy-{name}", body) for name, body in ways.items()], rows=31)
    told = deduplicate(str(tmp_path))
    expected = {uid_of(f"copy-{name}"): uid_of(name) for name, _ in pictures}
    assert copies_of(tmp_path) == expected
    assert (told["pairs"], told["duplicates"], told["kept"]) == (2 * len(pictures), len(pictures), len(pictures))
    before = list_drops(open_store(str(tmp_path)))
    assert deduplicate(str(tmp_path))["duplicates"] == 0
    assert list_drops(open_store(str(tmp_path))) == before


@pytest.mark.usefixtures("ray_cluster")
def test_growth_drops_only_what_came_and_what_stayed_stays(pictures: Pictures, tmp_path: Path) -> None:
    store, some = open_store(str(tmp_path)), pictures[-4:]
    twice = [("a", some[0][1]), ("b", some[0][1]), ("c", some[1][1]), ("d", some[2][1]), ("e", some[3][1])]
    write_pairs(tmp_path, [(name, encode_jpeg(picture, 90)) for name, picture in twice], first_shard=1)
    deduplicate(str(tmp_path))
    assert copies_of(tmp_path) == {uid_of("b"): uid_of("a")}, "equal bytes"
    add_drops(store, drop_rows([(bytes.fromhex(uid_of("c")), None)], "takedown"))
    add_drops(store, drop_rows([(bytes.fromhex(uid_of("d")), None)], "filter"))
    # What a rerun brings may stand before them.
    write_pairs(tmp_path, [(f"new-{name}", encode_jpeg(picture, 50)) for name, picture in twice], first_shard=0)
    deduplicate(str(tmp_path))
    rows = {gone: stays for gone, stays in copies_of(tmp_path).items() if stays}
    assert rows[uid_of("b")] == rows[uid_of("new-a")] == rows[uid_of("new-b")] == uid_of("a"), "it stayed before"
    assert rows[uid_of("new-c")] == uid_of("c"), "a copy goes with what was taken down"
    assert rows[uid_of("e")] == uid_of("new-e"), "nobody had decided between these"
    assert uid_of("new-d") not in rows, "what was filtered out takes nothing along"
    assert len(rows) == 5
    down = {whole(uid).hex() for uid in read_drops(store).uids.tolist()}
    assert uid_of("new-d") not in down


def found_without_ray(location: Path, buckets: int, shards_a_task: int) -> tuple[list[bytes], list[bytes]]:
    """(gone, stay) by another cut of the work."""
    store = open_store(str(location))
    receipts, standing = list(read_receipts(store).values()), read_standing(store)
    chunks = [receipts[at : at + shards_a_task] for at in range(0, len(receipts), shards_a_task)]
    parts = [scatter(str(location), chunk, standing, buckets) for chunk in chunks]
    tars = {receipt.shard: receipt.files["tar"].key for receipt in receipts}
    links = [find(str(location), tars, *(part[bucket] for part in parts)) for bucket in range(buckets)]
    gone, stay = resolve(np.concatenate(links))
    return gone.tolist(), stay.tolist()


def test_buckets_and_tasks_decide_nothing(pictures: Pictures, tmp_path: Path) -> None:
    some = pictures[:12]
    bodies = [(f"{name}-{way}", make(picture)) for name, picture in some for way, make in WAYS.items()]
    write_pairs(tmp_path, bodies, rows=7)
    cuts = [found_without_ray(tmp_path, buckets, tasks) for buckets, tasks in ((1, 9), (2, 1), (29, 3))]
    assert cuts[0] == cuts[1] == cuts[2]
    assert len(cuts[0][0]) >= 12
    assert not set(cuts[0][0]) & set(cuts[0][1])


def test_a_picture_without_a_hash_is_known_by_its_bytes_alone(pictures: Pictures, tmp_path: Path) -> None:
    picture = png(pictures[0][1])
    write_pairs(tmp_path, [("a", picture), ("b", picture), ("c", WAYS["quality 50"](pictures[0][1]))])
    store = open_store(str(tmp_path))
    receipt = read_receipts(store)[0]
    table = pq.read_table(tmp_path / receipt.files["parquet"].key)
    place = table.column_names.index("dhash")
    pq.write_table(table.set_column(place, "dhash", pa.nulls(3, pa.string())), tmp_path / receipt.files["parquet"].key)
    gone, stay = found_without_ray(tmp_path, 2, 1)
    assert ([whole(uid).hex() for uid in gone], [whole(uid).hex() for uid in stay]) == ([uid_of("b")], [uid_of("a")])


@pytest.mark.parametrize("brute", [10_000, 40])
def test_all_near_hashes_are_found_once_over_all_bands(brute: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "BRUTE", brute)
    rng = np.random.default_rng(0)
    origins = rng.integers(0, 1 << 63, 60, np.uint64)
    flips = [sum(1 << int(bit) for bit in rng.choice(64, rng.integers(0, 9), replace=False)) for _ in range(1200)]
    near = np.unique(np.repeat(origins, 20) ^ np.array(flips, np.uint64))
    expected = {
        (int(a), int(b)) for i, a in enumerate(near) for b in near[i + 1 :] if int(a ^ b).bit_count() <= DISTANCE
    }
    found: list[tuple[int, int]] = []
    for band, (first, bits) in enumerate(BANDS):
        values = near >> np.uint64(first) & np.uint64((1 << bits) - 1)
        for value in np.unique(values):
            group = near[values == value]
            found += [(int(group[i]), int(group[j])) for i, j in zip(*near_pairs(group, band), strict=True)]
    assert len(found) == len(set(found))
    assert set(found) == expected
    assert len(expected) > 1000


def links(*named: tuple[int, int, bool]) -> np.ndarray[Any, Any]:
    made = np.zeros(len(named), LINK)
    for row, (loser, winner, copy) in enumerate(named):
        made[row] = (loser | 2 << 60, winner | 2 << 60, b"%016d" % loser, b"%016d" % winner, copy)
    return made


def resolved(*named: tuple[int, int, bool]) -> dict[int, int]:
    gone, stay = resolve(links(*named))
    return dict(zip(map(int, gone.tolist()), map(int, stay.tolist()), strict=True))


def test_a_chain_of_ever_further_pictures_is_not_followed() -> None:
    assert resolved((2, 1, False), (3, 2, False), (4, 3, False)) == {2: 1, 4: 3}


def test_a_copy_follows_its_picture_to_the_one_that_stays() -> None:
    assert resolved((5, 2, True), (6, 5, True), (2, 1, False), (7, 3, True), (3, 2, False)) == {5: 1, 6: 1, 2: 1, 7: 3}


def test_what_was_taken_down_is_not_listed_again() -> None:
    some = links((2, 1, False), (3, 1, False))
    for end in ("winner", "loser"):
        some[end] = [place & ~np.uint64(3 << 60) if place & np.uint64(0xFFFF) < 3 else place for place in some[end]]
    gone, stay = resolve(some)
    assert (gone.tolist(), stay.tolist()) == ([b"%016d" % 3], [b"%016d" % 1])


def test_no_links_are_no_copies() -> None:
    assert [side.tolist() for side in resolve(np.zeros(0, LINK))] == [[], []]


@pytest.mark.usefixtures("ray_cluster")
def test_a_tar_that_is_gone_is_named(pictures: Pictures, tmp_path: Path) -> None:
    write_pairs(tmp_path, [(way, make(pictures[0][1])) for way, make in WAYS.items()])
    tar = read_receipts(open_store(str(tmp_path)))[0].files["tar"].key
    (tmp_path / tar).unlink()
    with pytest.raises(DamagedArtifact, match=tar):
        deduplicate(str(tmp_path))
    assert list_drops(open_store(str(tmp_path))) == []


def test_codes_are_no_pictures(learned: Learned) -> None:
    with pytest.raises(UsageError, match="holds tokens, not pairs"):
        deduplicate(str(learned.tokens))
