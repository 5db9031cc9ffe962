"""A small PAIRS stage, written with the code that ingestion commits with, for tests of what comes after ingestion."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from infra.store import open_store
from ops.pictures import PictureSettings, encode_jpeg
from ops.recipes import start_stage
from ops.shards import Receipt, publish, sidecar_schema, write_table, write_tar

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220), "yellow": (240, 220, 40)}
SHAPES = ("square", "bar", "pole", "frame")

MakePairs = Callable[..., Path]


def drawn(number: int, side: int) -> tuple[str, np.ndarray]:
    """Caption and pixels of a coloured shape on white, a little different for each number."""
    rng = np.random.default_rng(number)
    colour, shape = list(COLOURS)[number % 4], SHAPES[number // 4 % 4]
    pixels = np.full((side, side, 3), 255, np.uint8)
    a, b = side // 4 + int(rng.integers(0, 3)), side - side // 4 + int(rng.integers(-2, 1))
    rows, columns = {"bar": ((a, b), (0, side)), "pole": ((0, side), (a, b))}.get(shape, ((a, b), (a, b)))
    pixels[slice(*rows), slice(*columns)] = COLOURS[colour]
    if shape == "frame":
        pixels[a + 2 : b - 2, a + 2 : b - 2] = 255
    return f"a {colour} {shape}", pixels


def write_pair_shard(
    location: Path, shard: int, numbers: list[int], side: int = 32, generation: int = 0, weight: float = 1.0
) -> Receipt:
    """Commits a pair shard of drawn pictures. Every fifth row is a rejected one, every eighth kept one is held out."""
    store = open_store(str(location))
    start_stage(store, "pairs", {"picture": asdict(PictureSettings(short_side_px=side))}, {}, "")
    rows, members, statuses = [], [], []
    for row, number in enumerate(numbers):
        caption, pixels = drawn(number, side)
        key, uid = f"{shard:05d}{row:04d}", f"{number:032x}"
        statuses.append("timeout" if row % 5 == 4 else "success")
        rows.append({"key": key, "uid": uid, "url": f"http://example.org/{number}", "caption": caption})
        if statuses[-1] == "success":
            jpeg = encode_jpeg(pixels, 90)
            members += [(f"{key}.jpg", jpeg), (f"{key}.json", json.dumps({"uid": uid}).encode())]
            members.append((f"{key}.txt", caption.encode()))
    scratch = location.parent / f"scratch-{shard}-{generation}"
    scratch.mkdir()
    offsets = write_tar(scratch / "tar", members)
    sizes = {name: len(data) for name, data in members}
    for row, (record, status) in enumerate(zip(rows, statuses, strict=True)):
        name = f"{record['key']}.jpg"
        record |= {
            "status": status,
            "split": "held_out" if row % 8 == 7 else "train",
            "weight": weight,
            "tar_offset": offsets.get(name),
            "jpg_size": sizes.get(name),
            "colour": record["caption"].split()[1],
        }
    schema = sidecar_schema().append(pa.field("colour", pa.string()))
    groups = write_table(scratch / "parquet", pa.Table.from_pylist(rows, schema=schema))
    kept = statuses.count("success")
    receipt = Receipt(
        "pairs",
        shard,
        generation,
        {"work_order": f"{shard:064x}"},
        rows=len(rows),
        kept=kept,
        rejected={"timeout": len(rows) - kept},
        row_groups=groups,
    )
    committed = publish(store, receipt, {"tar": scratch / "tar", "parquet": scratch / "parquet"})
    assert committed is not None
    return committed


@pytest.fixture
def make_pairs(tmp_path: Path) -> MakePairs:
    """make_pairs(shards=2, rows=40, weight=1.0) -> the path of a PAIRS stage."""

    def make(shards: int = 2, rows: int = 40, *, side: int = 32, weight: float = 1.0, name: str = "pairs") -> Path:
        location = tmp_path / name / "pairs"
        for shard in range(shards):
            numbers = list(range(shard * rows, (shard + 1) * rows))
            write_pair_shard(location, shard, numbers, side, weight=weight)
        return location

    return make
