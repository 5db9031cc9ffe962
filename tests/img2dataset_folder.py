"""A folder that the real img2dataset made, with the damage that real folders have, and what is known about it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from infra.cluster import REPO
from ops.demo_web import DemoWeb
from tests.img2dataset_run import LOST

PER_SHARD = 12
SOUND, TRUNCATED, NO_TAR, TORN_STATS, SHORT, OUTAGE, NO_PARQUET = range(7)
"""The shards of the folder, by what is wrong with them."""


@dataclass(frozen=True)
class Folder:
    """`list` is what it was made from, `pairs` are its rows in order, `sound` the URLs whose pictures are there. `web`
    still serves all of them."""

    path: Path
    list: Path
    pairs: Sequence[tuple[str, str]]
    sound: frozenset[str]
    web: DemoWeb

    def pictures(self) -> dict[str, bytes]:
        """URL -> the JPEG, of all whole members of its tars."""
        found = {}
        for path in self.path.glob("*.tar"):
            parts: dict[str, bytes] = {}
            try:
                with tarfile.open(path) as tar:
                    for member in tar:
                        data = tar.extractfile(member)
                        assert data is not None
                        parts[member.name] = data.read()
            except tarfile.ReadError:
                pass
            for name, data in parts.items():
                if name.endswith(".json"):
                    found[json.loads(data)["url"]] = parts[name.replace(".json", ".jpg")]
        return found


def make_folder(root: Path, web: DemoWeb) -> Folder:
    """Runs img2dataset on seven shards of twelve pairs, one during an outage, then damages files."""
    path, listed = root / "theirs", root / "list.parquet"
    count = 7 * PER_SHARD
    urls = [f"{web.url}/generated/{seed}.jpg" for seed in range(count)]
    urls[NO_PARQUET * PER_SHARD + 3] = f"{web.url}/hostile/missing/1"
    captions = [f"a generated picture, number {i}" for i in range(count)]
    notes = [f"note {i}" for i in range(count)]
    pq.write_table(pa.table({"url": urls, "caption": captions, "note": notes}), listed)
    command = [sys.executable, "-m", "tests.img2dataset_run", str(listed), str(path)]
    environment = {**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1"}
    with (
        (root / "log").open("wb") as log,
        subprocess.Popen(
            [*command, str(PER_SHARD), str(SHORT), str(OUTAGE)],
            cwd=REPO,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        ) as run,
    ):
        assert run.stdin is not None
        assert run.stdout is not None
        for line in run.stdout:
            if (word := line.strip()) in ("outage", "well"):
                web.outage = word == "outage"
                run.stdin.write("\n")
                run.stdin.flush()
        assert run.wait() == 0, (root / "log").read_text()
    kept = _damage(path)
    rows = [
        *range(PER_SHARD),
        *(TRUNCATED * PER_SHARD + row for row in range(kept)),
        *range(TORN_STATS * PER_SHARD, SHORT * PER_SHARD),
        *(SHORT * PER_SHARD + row for row in range(PER_SHARD) if row not in LOST),
        *(NO_PARQUET * PER_SHARD + row for row in range(PER_SHARD) if row != 3),
    ]
    return Folder(path, listed, list(zip(urls, captions, strict=True)), frozenset(urls[row] for row in rows), web)


def _damage(path: Path) -> int:
    """Returns how many pictures are whole in the truncated tar."""
    stats = json.loads((path / f"{SHORT:05d}_stats.json").read_text())
    assert (stats["count"], stats["successes"]) == (PER_SHARD, PER_SHARD), "it says that it lost none"
    stats = json.loads((path / f"{OUTAGE:05d}_stats.json").read_text())
    assert stats["failed_to_download"] == PER_SHARD, "and that the outage's shard is done"
    truncated = path / f"{TRUNCATED:05d}.tar"
    with tarfile.open(truncated) as tar:
        members = tar.getmembers()
    cut = members[3 * 7]  # the eighth picture
    assert cut.name.endswith(".jpg")
    os.truncate(truncated, cut.offset_data + cut.size // 2)
    (path / f"{NO_TAR:05d}.tar").unlink()
    os.truncate(path / f"{TORN_STATS:05d}_stats.json", 11)
    (path / f"{NO_PARQUET:05d}.parquet").unlink()
    return 7


def copy_of(folder: Folder, to: Path) -> Folder:
    """The same in another place, for tests that change it."""
    return Folder(shutil.copytree(folder.path, to), folder.list, folder.pairs, folder.sound, folder.web)
