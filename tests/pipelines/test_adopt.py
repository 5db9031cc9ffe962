"""A damaged folder of img2dataset becomes PAIRS by the command line, and its engine goes on with what is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from infra.cluster import REPO
from infra.store import LocalStore
from tests.img2dataset_folder import Folder
from tests.pairs import assert_conserved, statuses

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(900)]

SETTINGS = ["--set", "picture.short_side_px=128", "--set", "plan.pairs_per_shard=40", "--cpus", "2"]


def test_adopt_then_ingest_with_img2datasets_engine_gives_every_pair_once(
    img2dataset_folder: Folder, tmp_path: Path
) -> None:
    folder, pairs = img2dataset_folder, tmp_path / "pairs"
    environment = {**os.environ, "PREFECT_HOME": str(tmp_path / "prefect")}

    def armchair(*arguments: str) -> Any:
        command = [sys.executable, "-m", "pipelines", *arguments, "--json"]
        ended = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        return json.loads(ended.stdout)

    def new_requests() -> set[str]:
        return {url for url, _ in folder.pairs if folder.web.counts()[url.removeprefix(folder.web.url)] > asked[url]}

    asked = {url: folder.web.counts()[url.removeprefix(folder.web.url)] for url, _ in folder.pairs}
    engine = ["--set", "picture.engine=img2dataset"]
    told = armchair("adopt", str(folder.path), str(folder.list), "--into", str(pairs), *SETTINGS, *engine)
    missing = {url for url, _ in folder.pairs} - folder.sound
    assert (told["adoption"]["adopted"], told["adoption"]["missing"]) == (len(folder.sound), len(missing))
    assert told["pairs"]["kept"] == len(folder.sound)
    assert {int(problem["shard"]) for problem in told["adoption"]["problems"]} == {1, 2, 3, 4, 5, 6}
    assert new_requests() == set()

    private = ["--set", 'fetch.allow_private=["127.0.0.0/8"]']
    told = armchair("ingest", str(folder.list), "--into", str(pairs), "--engine", "img2dataset", *SETTINGS, *private)
    assert told["pairs"]["rows"] == len(missing)
    assert new_requests() == missing
    assert armchair("verify", str(pairs), "--deep")["ok"]
    store = LocalStore(pairs)
    assert_conserved(store, folder.pairs)
    assert sum(status == "success" for status in statuses(store).values()) == len(folder.pairs) - 1
