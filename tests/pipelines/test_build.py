"""The whole way on a small list of one's own, through the command line, with real Ray, Prefect and a web server."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from infra.store import open_store
from models.sampling import SampleSettings
from ops.demo_scores import gallery
from ops.demo_summary import GATES, score_demo
from ops.demo_web import serve
from ops.openmoji import DemoPicture, describe, list_rows, names, render_files, split, write_list
from ops.shards import read_receipts
from ops.trained import latest_checkpoint
from pipelines.settings import resolve
from pipelines.stages import Run
from tests.buckets import BUCKET, Bucket

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(900)]

REPO = Path(__file__).parents[2]
ROLES = ("cook", "farmer", "firefighter")
SETTINGS = ["--preset", "tiny", "--set", 'fetch.allow_private=["127.0.0.0/8"]']


@dataclass
class Built:
    """A finished run, what made it, and how to go on with it."""

    into: Path
    listed: Path
    drawings: Path
    pictures: list[DemoPicture]
    environment: dict[str, str]
    port: int
    """Of the web server that the list names."""

    def armchair(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pipelines", *arguments]
        return subprocess.run(command, cwd=REPO, env=self.environment, capture_output=True, text=True, timeout=600)

    def json(self, *arguments: str) -> Any:
        ended = self.armchair(*arguments, "--json")
        assert ended.returncode == 0, ended.stderr
        return json.loads(ended.stdout)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """About a hundred drawings: three roles in all genders and tones, and single things."""
    tmp = tmp_path_factory.mktemp("build")
    drawings = tmp / "drawings"
    all_names = names()
    described = describe(all_names)
    people = [d for d in described if d.role in ROLES]
    things = [d for d in described if d.subset == "core" and not d.role][:56]
    index = render_files(drawings, [d.code for d in people + things])
    pictures = split(people + things, {code: row["drawing"] for code, row in index.items()})
    with serve(drawings) as web:
        environment = {**os.environ, "PREFECT_HOME": str(tmp / "prefect")}
        run = Built(tmp / "run", tmp / "list.tsv", drawings, pictures, environment, web.server.server_port)
        rows = list_rows(pictures, f"{web.url}/pictures")
        rows += [
            {**rows[0], "url": f"{web.url}/hostile/{kind}/1", "caption": f"{kind} one"} for kind in ("missing", "bomb")
        ]
        write_list(run.listed, rows)
        ended = run.armchair("build", str(run.listed), "--into", str(run.into), *SETTINGS)
    assert ended.returncode == 0, ended.stderr
    return run


READ_BACK = """
import json
from prefect.client.orchestration import get_client
with get_client(sync_client=True) as client:
    told = {}
    for run in client.read_flow_runs():
        asked = {"artifacts": {"flow_run_id": {"any_": [str(run.id)]}}}
        artifacts = client._client.post("/artifacts/filter", json=asked).json()
        kinds = sorted(row["type"] for row in artifacts if row["key"])
        told[client.read_flow(run.flow_id).name] = [run.state.name, kinds]
print(json.dumps(told))
"""


def test_prefect_shows_each_flow_completed_with_its_artifacts(built: Built) -> None:
    command = [sys.executable, "-c", READ_BACK]
    ended = subprocess.run(command, cwd=REPO, env=built.environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    training, sharded = ["markdown", "markdown", "markdown", "progress"], ["markdown", "markdown", "progress"]
    assert json.loads(ended.stdout) == {
        "build": ["Completed", ["markdown", "markdown", "progress"]],  # report, Ray dashboard
        "ingest": ["Completed", ["markdown", *sharded]],  # report, receipts, pictures
        "train-tokenizer": ["Completed", training],  # report, curves, sheet
        "tokenize": ["Completed", sharded],
        "train-transformer": ["Completed", training],
    }


def test_every_pair_is_accounted_for(built: Built) -> None:
    told = built.json("status", str(built.into / "pairs"))["pairs"]
    assert told["planned"] == len(built.pictures) + 2
    assert told["kept"] == len(built.pictures)
    assert told["rejected"] == {"http_4xx": 1, "pixels_too_many": 1}
    for stage in ("pairs", "tokens"):
        assert built.json("verify", str(built.into / stage), "--deep")["ok"]


def test_a_second_call_on_a_finished_run_says_so_before_ray_or_prefect_start(built: Built) -> None:
    environment = {**built.environment, "RAY_ADDRESS": "127.0.0.1:1", "PREFECT_API_URL": "http://127.0.0.1:1/api"}
    started = time.monotonic()
    again = replace(built, environment=environment)
    ended = again.armchair("build", str(built.listed), "--into", str(built.into), *SETTINGS)
    assert ended.returncode == 0, ended.stderr
    assert "is finished" in ended.stdout
    assert time.monotonic() - started < 20, "it takes 2 to 3 s on a quiet machine; Prefect and Ray alone take 20"


def test_the_runs_own_settings_are_a_preset_that_repeats_it(built: Built) -> None:
    preset = str(built.into / "settings.toml")
    assert resolve(preset) == resolve("tiny", [SETTINGS[3]])
    ended = built.armchair("build", str(built.listed), "--into", str(built.into), "--preset", preset)
    assert "is finished" in ended.stdout, ended.stderr


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ("picture.short_side_px=48", "picture.short_side_px: was 32, now 48"),
        ("dvae.beta=0.7", "dvae.beta: was 0.5, now 0.7"),
        ("transformer_training.steps=50", "transformer_training.steps: was 40, now 50"),
    ],
)
def test_a_changed_setting_is_refused_with_was_and_now(built: Built, changed: str, told: str) -> None:
    ended = built.armchair("build", str(built.listed), "--into", str(built.into), *SETTINGS, "--set", changed)
    assert ended.returncode == 2, ended.stdout
    assert told in ended.stderr


def test_prompts_become_pictures(built: Built, tmp_path: Path) -> None:
    model, sheet = str(built.into / "model"), tmp_path / "cook.png"
    told = built.json("generate", model, "cook, dark skin tone", "-n", "3", "--into", str(sheet))
    assert sheet.read_bytes().startswith(b"\x89PNG")
    again = built.json("generate", model, "cook, dark skin tone", "-n", "3", "--into", str(tmp_path / "again.png"))
    assert (tmp_path / "again.png").read_bytes() == sheet.read_bytes(), "the same seed draws the same pictures"
    assert told["model"] == again["model"]


def test_the_report_is_one_file_without_outside_references(built: Built) -> None:
    page = (built.into / "report.html").read_text()
    assert "http_4xx" in page
    assert 'src="http' not in page
    assert "<link" not in page


def test_the_demos_scores_are_read_off_a_finished_run(built: Built) -> None:
    real = gallery(built.pictures, built.drawings)
    run = Run(str(built.into))
    scored = score_demo(run.pairs, run.tokens, run.model, real, SampleSettings(), seed=0)
    assert scored.samples["tone"]["true"] > 0.8, "the pictures themselves show their tones"
    assert scored.transformer["compositions"] == sum(p.held == "composition" for p in built.pictures)
    seconds = {"training_cpu": 1.0, "sampling_cpu_a_picture": scored.sampling_cpu_a_picture}
    summary = {
        "tokenizer": scored.tokenizer,
        "transformer": scored.transformer,
        "samples": scored.samples,
        "retrieval": scored.retrieval,
    }
    assert all(isinstance(gate.holds({**summary, "seconds": seconds}), bool) for gate in GATES)
    assert not GATES[0].holds({"tokenizer": {"psnr_db": float("nan")}})
    assert scored.sheet.startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def in_bucket(built: Built, seaweedfs_server: Bucket) -> Iterator[tuple[Built, str]]:
    """The same build with every path in a bucket, the list's too; how to go on with it, and where it lies."""
    armchair = replace(built, environment={**built.environment, **seaweedfs_server.environment})
    place = f"s3://{BUCKET}/{secrets.token_hex(4)}"
    with pytest.MonkeyPatch.context() as here:
        seaweedfs_server.use(here)
        open_store(f"{place}/lists").put("list.tsv", built.listed)
        with serve(built.drawings, built.port):
            ended = armchair.armchair("build", f"{place}/lists", "--into", f"{place}/run", *SETTINGS)
        assert ended.returncode == 0, ended.stderr
        yield armchair, f"{place}/run"


def test_a_build_in_a_bucket_makes_what_a_build_on_disk_makes(built: Built, in_bucket: tuple[Built, str]) -> None:
    armchair, run = in_bucket
    for stage in ("pairs", "tokens"):
        here = read_receipts(open_store(str(built.into / stage)))
        there = read_receipts(open_store(f"{run}/{stage}"))
        assert there == here, "the receipts name all digests"
        assert armchair.json("verify", f"{run}/{stage}", "--deep")["ok"]
    for stage in ("tokenizer", "model"):
        here, there = (latest_checkpoint(open_store(f"{place}/{stage}")) for place in (built.into, run))
        assert here is not None
        assert there is not None
        assert (there.step, there.digest) == (here.step, here.digest)


def test_commands_work_in_a_bucket_as_on_disk(built: Built, in_bucket: tuple[Built, str]) -> None:
    armchair, run = in_bucket
    ended = armchair.armchair("build", run.replace("/run", "/lists/list.tsv"), "--into", run, *SETTINGS)
    assert "is finished" in ended.stdout, ended.stderr
    ended = armchair.armchair("build", run.replace("/run", "/lists"), "--into", run, "--preset", f"{run}/settings.toml")
    assert "is finished" in ended.stdout, ended.stderr
    assert armchair.json("status", f"{run}/pairs")["pairs"] == built.json("status", str(built.into / "pairs"))["pairs"]
    assert armchair.json("sweep", f"{run}/pairs", "--grace-hours", "-1")["removed"] == []
    told = armchair.json("generate", f"{run}/model", "cook, dark skin tone", "-n", "2")
    assert told["sheets"] == [f"{run}/pictures/cook-dark-skin-tone.png"]
    assert open_store(run).read("pictures/cook-dark-skin-tone.png").startswith(b"\x89PNG")
    url = built.listed.read_text().splitlines()[1].partition("\t")[0]
    assert armchair.json("why", url, "--in", run, "--into", f"{run}/why")["more"] == 0
    assert open_store(f"{run}/why").read("sheet.png").startswith(b"\x89PNG")
    assert armchair.json("report", run)["report"] == f"{run}/report.html"
    assert b"http_4xx" in open_store(run).read("report.html")


def test_a_flipped_byte_in_a_bucket_is_damage_that_is_named(in_bucket: tuple[Built, str]) -> None:
    armchair, run = in_bucket
    store = open_store(f"{run}/pairs")
    for ref in read_receipts(store)[0].files.values():
        whole = store.read(ref.key)
        store.put(ref.key, whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:], if_absent=False)
        ended = armchair.armchair("verify", f"{run}/pairs", "--deep")
        assert ended.returncode == 3
        assert f"{ref.key} is damaged" in ended.stdout
        store.put(ref.key, whole, if_absent=False)


@pytest.mark.parametrize(
    ("changed", "place", "told"),
    [
        ({}, "s3://no-such-bucket/run", "there is no bucket 'no-such-bucket'"),
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, f"s3://{BUCKET}/run", "the credentials are not accepted"),
    ],
)
def test_a_bucket_that_refuses_us_ends_with_exit_code_3_and_one_line(
    in_bucket: tuple[Built, str], changed: dict[str, str], place: str, told: str
) -> None:
    armchair, _ = in_bucket
    somebody = replace(armchair, environment={**armchair.environment, **changed})
    for command in (["status", place], ["generate", place, "a cat"], ["build", str(armchair.listed), "--into", place]):
        ended = somebody.armchair(*command)
        assert ended.returncode == 3, ended.stderr
        assert told in ended.stderr
        assert "Check the path" not in ended.stderr
        assert "Traceback" not in ended.stderr


def test_shards_that_are_put_off_end_the_build_before_anything_is_trained(built: Built, tmp_path: Path) -> None:
    """A model that was trained on part of the pairs would count as finished for ever."""
    listed, into = tmp_path / "list.tsv", tmp_path / "run"
    with serve(built.drawings) as web:
        urls = [f"{web.url}/generated/{n}.jpg" for n in range(4)] + [f"http://127.0.0.1:9/{n}.jpg" for n in range(2)]
        write_list(listed, [{"url": url, "caption": f"number {n}"} for n, url in enumerate(urls)])
        a_row_a_shard = ["--set", "plan.pairs_per_shard=1", "--set", "fetch.retries=0"]
        ended = built.armchair("build", str(listed), "--into", str(into), *SETTINGS, *a_row_a_shard)
    assert ended.returncode == 5, ended.stderr
    assert "2 shards are not committed" in ended.stderr
    assert built.json("status", str(into / "pairs"))["shards"]["committed"] == 4
    assert not (into / "tokenizer").exists()


def test_a_longer_list_extends_the_pairs_and_the_tokens(built: Built) -> None:
    """The trained stages keep their snapshot; last, because it grows the run."""
    with serve(built.drawings) as web:
        longer = built.listed.with_name("more.tsv")
        rows = [{"url": f"{web.url}/generated/{n}.jpg", "caption": f"drawing number {n}"} for n in range(30)]
        write_list(longer, rows)
        lists = [str(built.listed), str(longer)]
        told = built.json("build", *lists, "--into", str(built.into), *SETTINGS)
    assert told["pairs"]["pairs"]["kept"] == 30
    assert told["tokenizer"]["was_done"]
    assert told["model"]["was_done"]
    pairs = built.json("status", str(built.into / "pairs"))["pairs"]
    assert pairs["kept"] == len(built.pictures) + 30
    assert built.json("verify", str(built.into / "tokens"), "--deep")["pairs"] == pairs["kept"]
