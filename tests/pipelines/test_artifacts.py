"""What Prefect is told: the end state of each flow and its artifacts, read back through the API of a real server."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from infra.store import open_store
from ops.demo_web import serve
from ops.errors import Incomplete, UsageError
from ops.fetch import FetchSettings
from ops.ingest import OutageSettings
from ops.plan import Columns, PlanSettings
from ops.status import status
from ops.waves import ShardOutcome, Tick, drive, on_ray
from pipelines.artifacts import TABLE_ROWS, artifact_key
from pipelines.settings import resolve
from tests.ops.conftest import Learned
from tests.ops.test_waves import STRAGGLED, Chore, wait_for_the_others
from tests.pairs import FETCH, FILTERS, PICTURE, generated
from tests.small_runs import DVAE, TOKENIZER_TRAINING

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(600)]

PLAN = PlanSettings(pairs_per_shard=4)
SETTINGS = resolve("tiny", ['fetch.allow_private=["127.0.0.0/8"]', "fetch.retries=0"])


@pytest.fixture(scope="module", autouse=True)
def prefect_server(ray_cluster: None) -> Iterator[None]:
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield


def flow_runs(location: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """Of all flow runs that name the place: flow -> (state, {what: artifact}); of several runs the last."""
    from prefect.client.orchestration import get_client

    found = {}
    with get_client(sync_client=True) as client:
        for run in sorted(client.read_flow_runs(), key=lambda run: run.created or 0):
            if location not in json.dumps(run.parameters, default=str) or run.state is None:
                continue
            flow = client.read_flow(run.flow_id).name
            response = client._client.post(
                "/artifacts/filter", json={"artifacts": {"flow_run_id": {"any_": [str(run.id)]}}}
            )
            artifacts = {re.split(f"^{flow}-", row["key"])[-1]: row for row in response.json() if row["key"]}
            found[flow] = run.state.name, artifacts
    return found


def write_list(path: Path, pairs: list[tuple[str, str]]) -> list[str]:
    path.write_text("".join(f"{url}\t{caption}\n" for url, caption in [("url", "caption"), *pairs]))
    return [str(path)]


def kinds(artifacts: dict[str, Any]) -> dict[str, str]:
    return {what.split("-")[0]: row["type"] for what, row in artifacts.items()}


def test_what_came_of_an_ingest_and_of_a_tokenizing_is_shown(tmp_path: Path, learned: Learned) -> None:
    from pipelines.ingest import ingest
    from pipelines.tokenize import tokenize

    into, tokens = str(tmp_path / "pairs"), str(tmp_path / "tokens")
    with serve(tmp_path) as web:
        ingest(write_list(tmp_path / "list.tsv", generated(web.url, range(10))), into, Columns(), PLAN, fetch=FETCH)
    state, artifacts = flow_runs(into)["ingest"]
    common = {"progress": "progress", "report": "markdown", "receipts": "markdown"}
    assert (state, kinds(artifacts)) == ("Completed", {**common, "pictures": "markdown"})
    shown = {what.split("-")[0]: row["data"] for what, row in artifacts.items()}
    assert float(shown["progress"]) == 100.0
    assert "10 judged, 10 kept (100.0 %)" in shown["report"]
    assert "data:image/jpeg;base64," in shown["pictures"]
    tokenize(str(learned.pairs), str(learned.tokenizer), tokens)
    state, artifacts = flow_runs(tokens)["tokenize"]
    assert (state, kinds(artifacts)) == ("Completed", common)


def test_how_far_bfloat16_was_to_be_trusted_is_in_the_report() -> None:
    from pipelines.waves import Tally, report_of

    tally = Tally(3)
    for shard, agreement in enumerate((0.9998, 0.9996, None)):
        tally.add(ShardOutcome(shard, 0, "committed", 10, 10, agreement=agreement))
    assert tally.as_json()["bfloat16"] == {"agreement": 0.9997, "lowest": 0.9996, "shards": 2, "shards_in_float32": 0}
    report = report_of("tokenize", "tokens", tally, "Completed", ())
    assert "**bfloat16** gave 99.970% of a sample's codes as float32 did (lowest shard 99.960%)" in report
    assert "warning" not in report
    tally.add(ShardOutcome(3, 0, "committed", 10, 10, agreement=0.97))
    report = report_of("tokenize", "tokens", tally, "Completed", ())
    assert "**warning** 1 of 3 shards were encoded in float32, slower: less than 99.9% of their" in report
    nothing = Tally(1)
    nothing.add(ShardOutcome(0, 0, "committed", 10, 10))
    assert "bfloat16" not in report_of("tokenize", "tokens", nothing, "Completed", ())
    assert "bfloat16" not in nothing.as_json()


def test_who_asks_the_web_without_a_contact_is_told_so_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pipelines.ingest import ingest

    lists = write_list(tmp_path / "list.tsv", [("ftp://a.example/1.jpg", "a cat"), ("ftp://a.example/2.jpg", "a dog")])
    for contact, times in (("", 1), ("you@example.org", 0)):
        plan = replace(PLAN, pairs_per_shard=1)
        ingest(lists, str(tmp_path / f"pairs{times}"), Columns(), plan, fetch=FetchSettings(contact=contact))
        assert capsys.readouterr().err.count("--set fetch.contact=you@example.org") == times


def test_a_training_shows_its_last_evaluation_and_its_last_sheet(learned: Learned) -> None:
    """On a finished stage, which starts no Ray Train; the whole way is in test_build."""
    from pipelines.train import train_tokenizer

    train_tokenizer(str(learned.pairs), str(learned.tokenizer), DVAE, TOKENIZER_TRAINING)
    state, artifacts = flow_runs(str(learned.tokenizer))["train-tokenizer"]
    assert state == "Completed"
    assert kinds(artifacts) == {
        "progress": "progress",
        "report": "markdown",
        "sheet": "markdown",
        "curves": "markdown",
    }
    shown = {what.split("-")[0]: row["data"] for what, row in artifacts.items()}
    assert "psnr_db" in shown["report"]
    assert "data:image/png;base64," in shown["sheet"]
    assert "data:image/svg+xml;base64," in shown["curves"]
    assert "# tokenizer: step 20 of 20" in shown["curves"]


def test_shards_that_are_left_are_told_in_a_table_and_the_rest_counts(tmp_path: Path) -> None:
    from pipelines.build import build
    from pipelines.ingest import ingest, rerun

    into = str(tmp_path / "run" / "pairs")
    fetch = replace(FETCH, retries=0)
    with serve(tmp_path) as web:
        good = [(f"{web.url}/generated/{n}.jpg", f"number {n}") for n in range(6)]
        lists = write_list(
            tmp_path / "list.tsv", [*good, *((f"http://127.0.0.1:9/{n}.jpg", "no one") for n in range(2))]
        )
        one = PlanSettings(pairs_per_shard=1)
        told = ingest(lists, into, Columns(), one, FILTERS, fetch, PICTURE)
        assert told["shards"]["deferred"] == 2
        state, artifacts = flow_runs(into)["ingest"]
        assert state == "CompletedWithFailures"
        table = next(row for what, row in artifacts.items() if what.startswith("unfinished"))
        rows = json.loads(table["data"])
        assert len(rows) == 2
        assert list(rows[0]) == ["shard", "generation", "state", "attempt", "class", "message", "next"]
        assert (rows[0]["attempt"], rows[0]["class"]) == (1, "transient")
        assert rows[0]["message"] == "1 of 1 rows failed for reasons that may pass: connect 1"
        assert "run the same command again" in rows[0]["next"]

        with pytest.raises(Incomplete):
            ingest(lists, into, Columns(), one, FILTERS, fetch, PICTURE)  # only these two, and all of them are left
        state, artifacts = flow_runs(into)["ingest"]
        assert state == "Failed"
        table = next(row for what, row in artifacts.items() if what.startswith("unfinished"))
        assert [row["attempt"] for row in json.loads(table["data"])] == [2, 2], "over all runs"
        assert [left["attempts"] for left in status(open_store(into))["unfinished"]] == [2, 2]
        tiny = replace(SETTINGS, plan=one, filters=FILTERS, fetch=fetch, picture=PICTURE)
        with pytest.raises(Incomplete):
            build(lists, str(tmp_path / "run"), tiny, Columns())
        runs = flow_runs(str(tmp_path / "run"))
        assert runs["build"][0] == "Failed"
        assert "not committed" in next(row["data"] for row in runs["build"][1].values() if row["type"] == "markdown")

        ingest(lists, into, Columns(), one, FILTERS, fetch, PICTURE, OutageSettings(max_deferrals=0))
        assert flow_runs(into)["ingest"][0] == "Completed"
        rerun(into, fetch=fetch)
        state, artifacts = flow_runs(into)["ingest"]  # of which a rerun is a run
        assert state == "Completed"
        assert any(row["key"].startswith("rerun-report-") for row in artifacts.values())


def test_waves_end_while_a_straggler_of_the_first_is_open(
    tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wave is a record, not a barrier: the straggler ends in the last of them."""
    from prefect import flow, get_client

    import pipelines.waves
    from pipelines.artifacts import Board

    monkeypatch.setattr(pipelines.waves, "wave_size", lambda cpus: 8)
    chores = [Chore(i, str(tmp_path)) for i in range(STRAGGLED + 1)]
    store, ended = open_store(str(tmp_path)), []

    def work(tick: Tick) -> Iterator[ShardOutcome]:
        for outcome in drive(chores, on_ray(wait_for_the_others, "chore"), store, "pairs", 4, tick):
            ended.append(outcome.shard)
            yield outcome

    @flow(name="straggler", persist_result=False)
    def straggler() -> list[str]:
        with Board("ingest", str(tmp_path)) as board:
            pipelines.waves.run_in_waves("ingest", str(tmp_path), chores, work, board)
        with get_client(sync_client=True) as client:
            return sorted(run.name for run in client.read_task_runs() if run.name.startswith("wave-"))

    waves = straggler()
    assert len(ended) == STRAGGLED + 1
    assert ended[-1] == 0
    assert waves[-4:] == ["wave-00000-00007", "wave-00008-00015", "wave-00016-00023", "wave-00024-00030"]


def test_a_training_that_cannot_begin_is_failed_and_says_why(tmp_path: Path) -> None:
    from pipelines.train import train_tokenizer

    with pytest.raises(UsageError):
        train_tokenizer(
            str(tmp_path / "nothing"), str(tmp_path / "tokenizer"), SETTINGS.dvae, SETTINGS.tokenizer_training
        )
    assert flow_runs(str(tmp_path / "nothing"))["train-tokenizer"][0] == "Failed"


def test_a_server_that_is_gone_costs_one_line_of_warning_and_no_shard(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from pipelines.artifacts import Board

    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        board = Board("ingest", str(tmp_path))
        board._run = uuid4()
        with board:
            board.progress(0.5, "half")
            board.markdown("report", "a page")
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert told[0].startswith("ingest      Prefect shows less: ")


def test_a_table_holds_no_more_rows_than_people_read(tmp_path: Path) -> None:
    from pipelines.artifacts import Board

    board = Board("ingest", str(tmp_path))
    board.table("unfinished-shards", [{"shard": n} for n in range(TABLE_ROWS + 50)], "armchair status")
    (artifact,) = board._waiting
    assert len(json.loads(artifact.data)) == TABLE_ROWS
    assert "50 more: armchair status" in str(artifact.description)


@pytest.mark.parametrize("location", ["s3://Bucket/My_run/pairs", "runs/Ä b/pairs", "/tmp/x.y/"])
def test_keys_are_what_prefect_takes(location: str) -> None:
    assert re.fullmatch("[a-z0-9-]+", artifact_key("train-tokenizer", "report", location))
    assert artifact_key("ingest", "report", location) != artifact_key("ingest", "progress", location)
