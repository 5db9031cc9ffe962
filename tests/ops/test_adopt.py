"""Adopting a folder of the real img2dataset: what is sound is not fetched again, and no pair is lost or doubled."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from infra.cluster import REPO
from infra.store import LocalStore, Store, open_store
from ops.adopt import Adoption, look_at_folder, plan_adoption
from ops.demo_web import DemoWeb
from ops.errors import BadList, StorageError, UsageError
from ops.filters import FilterSettings
from ops.ingest import ingest_shard
from ops.plan import Columns, PlanSettings, extend_plan, read_instalments, read_work_order
from ops.reasons import SUCCESS
from ops.shards import read_receipts
from tests.img2dataset_folder import (
    NO_PARQUET,
    NO_TAR,
    OUTAGE,
    PER_SHARD,
    SHORT,
    TORN_STATS,
    TRUNCATED,
    Folder,
    copy_of,
)
from tests.pairs import FILTERS, PICTURE, assert_conserved, pending, rows, statuses

PLAN = PlanSettings(pairs_per_shard=40)
THEIRS = replace(PICTURE, engine="img2dataset")


@pytest.fixture
def folder(img2dataset_folder: Folder) -> Folder:
    return img2dataset_folder


@pytest.fixture
def web(folder: Folder) -> DemoWeb:
    return folder.web


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "pairs")


def adopt(store: Store, path: str, lists: list[str], filters: FilterSettings = FILTERS) -> Adoption:
    """What `armchair adopt` does, without Prefect and Ray."""
    adoption = plan_adoption(store, look_at_folder(path), lists, PLAN, filters, Columns())
    for task in pending(store, only_adopted=True, filters=filters, picture=THEIRS):
        assert ingest_shard(task).state == "committed"
    return adoption


def waiting(store: Store) -> list[str]:
    """URLs that the next ingest asks for."""
    tables = [read_work_order(store, task.work_order) for task in pending(store)]
    pairs = [row for table in tables for row in table.select(["url", "status"]).to_pylist()]
    return sorted(row["url"] for row in pairs if row["status"] is None)


def test_exactly_the_pairs_that_are_not_there_are_planned_and_then_fetched(
    store: LocalStore, folder: Folder, web: DemoWeb
) -> None:
    asked = web.counts()
    adoption = adopt(store, str(folder.path), [str(folder.list)])
    assert web.counts() == asked, "adopting asks nobody"
    missing = sorted({url for url, _ in folder.pairs} - folder.sound)
    assert (adoption.adopted, adoption.missing, adoption.already) == (len(folder.sound), len(missing), 0)
    assert statuses(store) == dict.fromkeys(folder.sound, SUCCESS)
    assert waiting(store) == missing

    there = folder.pictures()
    for row in rows(store):
        assert _picture(store, row) == there[row["url"]], "copied byte for byte"
        assert (row["width"], row["height"]) == (148, 128)
        assert (row["original_width"], row["original_height"]) == (240, 208)
        assert row["note"].startswith("note ")
        assert row["adopted_from"].startswith(str(folder.path))

    again = adopt(store, str(folder.path), [str(folder.list)])
    assert (again.adopted, again.missing, again.already) == (0, 0, len(folder.pairs)), "a second time there is nothing"
    assert len(read_instalments(store)) == 2
    assert extend_plan(store, [str(folder.list)], PLAN, FILTERS, Columns()).instalment is None, "the list is covered"

    assert {ingest_shard(task).state for task in pending(store)} == {"committed"}
    for url, _ in folder.pairs:
        path = url.removeprefix(web.url)
        more = web.counts()[path] - asked.get(path, 0)
        assert more == (url not in folder.sound), f"{url} was asked for {more} times"
    assert_conserved(store, folder.pairs)
    found = statuses(store)
    assert [url for url, status in found.items() if status != SUCCESS] == [f"{web.url}/hostile/missing/1"]


def _picture(store: LocalStore, row: dict[str, Any]) -> bytes:
    receipt = read_receipts(store)[int(row["key"][:5])]
    return store.read_range(receipt.files["tar"].key, row["tar_offset"], row["jpg_size"])


def test_without_the_list_it_is_told_which_pairs_no_file_knows(store: LocalStore, folder: Folder) -> None:
    found = look_at_folder(str(folder.path))
    assert {int(one.shard): one.unknown for one in found if one.unknown} == {SHORT: 3, NO_PARQUET: 1}
    told = {int(one.shard): " ".join(one.problems) for one in found}
    assert told[0] == ""
    assert "5 pictures that its parquet calls a success are not there" in told[TRUNCATED]
    assert "its tar is gone" in told[NO_TAR]
    assert "its statistics can't be read" in told[TORN_STATS]
    assert "3 pairs are in none of its files" in told[SHORT]
    assert "all of its 12 pairs failed" in told[OUTAGE]
    assert "its parquet is gone" in told[NO_PARQUET]
    adoption = adopt(store, str(folder.path), [])
    assert adoption.adopted == len(folder.sound)
    assert adoption.missing == len(folder.pairs) - len(folder.sound) - 3 - 1
    # With the list they are known, and nothing that was planned is planned again.
    later = adopt(store, str(folder.path), [str(folder.list)])
    assert (later.adopted, later.missing) == (0, 4)
    planned = [uid for part in read_instalments(store) for order in part.work_orders
               for uid in read_work_order(store, order)["uid"].to_pylist()]  # fmt: skip
    assert len(planned) == len(set(planned)) == len(folder.pairs)


def test_a_picture_that_was_altered_is_fetched_and_not_adopted(
    store: LocalStore, folder: Folder, tmp_path: Path
) -> None:
    """Another caption in KEY.txt; a JPEG that ends in the middle of its data; a picture of another size."""
    mine = copy_of(folder, tmp_path / "theirs")
    (sound,) = [one for one in look_at_folder(str(mine.path)) if int(one.shard) == 0]
    first, second, third = sound.rows[:3]
    tar = mine.path / "00000.tar"
    data = bytearray(tar.read_bytes())
    caption = first["caption"].encode()
    data[data.rindex(caption, 0, second["adopted_at"])] ^= 1  # the last one before the next picture is KEY.txt
    at, size = second["adopted_at"], second["adopted_bytes"]
    data[at + size // 2 : at + size // 2 + 2] = b"\xff\xd9"
    pixels = np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)
    small = cv2.imencode(".jpg", pixels)[1].tobytes()
    data[third["adopted_at"] : third["adopted_at"] + third["adopted_bytes"]] = small.ljust(
        third["adopted_bytes"], b"\0"
    )
    tar.write_bytes(data)
    adopt(store, str(mine.path), [str(mine.list)])
    altered = {row["url"] for row in (first, second, third)}
    assert statuses(store) == dict.fromkeys(mine.sound - altered, SUCCESS)
    assert altered < set(waiting(store))


def test_filters_judge_adopted_pictures_by_their_original_size(store: LocalStore, folder: Folder) -> None:
    adoption = adopt(store, str(folder.path), [], FilterSettings(min_side_px=209))  # they came with 240 x 208
    assert adoption.adopted == len(folder.sound)
    assert set(statuses(store).values()) == {"too_small"}


def test_a_folder_that_went_away_fails_the_adoption_and_is_fetched_by_an_ingest(
    store: LocalStore, folder: Folder, web: DemoWeb, tmp_path: Path
) -> None:
    mine = copy_of(folder, tmp_path / "theirs")
    plan_adoption(store, look_at_folder(str(mine.path)), [str(mine.list)], PLAN, FILTERS, Columns())
    (mine.path / "00000.tar").unlink()
    lost = {url for url, _ in mine.pairs[:PER_SHARD]}
    asked = web.counts()
    with pytest.raises(StorageError, match=r"not there any more.*armchair ingest"):
        list(map(ingest_shard, pending(store, only_adopted=True)))
    assert web.counts() == asked
    for task in pending(store):
        ingest_shard(task)
    assert_conserved(store, mine.pairs)
    for url in mine.sound:
        path = url.removeprefix(web.url)
        assert web.counts()[path] - asked[path] == (url in lost)


def test_columns_of_any_other_list_lead_to_no_file(store: LocalStore, folder: Folder, tmp_path: Path) -> None:
    """A list from the web could name our files."""
    adopt(store, str(folder.path), [])
    (stolen,) = (store.root / "adopted").glob("sound-*.parquet")
    other = LocalStore(tmp_path / "other")
    listed = tmp_path / "list.parquet"
    listed.write_bytes(stolen.read_bytes())
    extend_plan(other, [str(listed)], PLAN, FILTERS, Columns())
    assert {task.adopted for task in pending(other)} == {"no"}


def test_a_folder_in_a_bucket_is_adopted_into_a_bucket(bucket: str, folder: Folder) -> None:
    theirs = open_store(f"{bucket}/theirs")
    for path in sorted(folder.path.iterdir()):
        if path.is_file():
            theirs.put(path.name, path)
    store = open_store(f"{bucket}/pairs")
    adopt(store, f"{bucket}/theirs", [str(folder.list)])
    assert statuses(store) == dict.fromkeys(folder.sound, SUCCESS)


def test_what_is_no_folder_of_img2dataset_is_refused(store: LocalStore, folder: Folder, tmp_path: Path) -> None:
    (tmp_path / "0001.jpg").write_bytes(b"")
    with pytest.raises(UsageError, match=r"holds no shard of img2dataset's.*--output_format webdataset"):
        look_at_folder(str(tmp_path))
    with pytest.raises(BadList, match="no such file"):
        plan_adoption(store, look_at_folder(str(folder.path)), ["none.tsv"], PLAN, FILTERS, Columns())
    assert read_instalments(store) == [], "a bad list leaves no plan behind"


@pytest.mark.slow
def test_a_kill_before_or_after_each_write_of_an_adoption_loses_nothing(folder: Folder, tmp_path: Path) -> None:
    """Lists, indexes of URLs, work orders, instalments, tar, sidecar, receipt: each fsync, link, replace and mkdir."""
    small = tmp_path / "theirs"
    small.mkdir()
    for path in folder.path.glob(f"{TRUNCATED:05d}*"):
        shutil.copy(path, small)
    pairs = folder.pairs[TRUNCATED * PER_SHARD :][:PER_SHARD]
    sound = {url for url, _ in pairs} & folder.sound
    listed = tmp_path / "list.tsv"
    listed.write_text("".join(f"{url}\t{caption}\n" for url, caption in [("url", "caption"), *pairs]))
    program = [sys.executable, "-m", "tests.ops.kill_each_adoption"]
    done = subprocess.run(
        [*program, str(small), str(listed), str(tmp_path / "kills")],
        capture_output=True,
        cwd=REPO,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    kills = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kills) > 30
    undisturbed = kills.pop(0)
    assert undisturbed == {"kept": sorted(sound), "waiting": sorted({url for url, _ in pairs} - sound)}
    for kill in kills:
        assert kill.pop("killed_by") == signal.SIGKILL
        assert kill == undisturbed
