"""The report of a run: complete for a whole run, honest for half a run or a damaged one."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from infra.store import LocalStore, join, open_store
from ops import report
from ops.demo_web import serve
from ops.errors import UsageError
from ops.ingest import ingest_shard
from ops.jobs import Job
from ops.report_page import render
from ops.report_stages import charts_of
from ops.run_record import claim_run
from ops.status import status
from ops.trained import write_checkpoint
from ops.training import prepare
from tests.ops.page_parts import Page, dot
from tests.pairs import generated, pending, plan
from tests.small_runs import TRANSFORMER_TRAINING, transformer_job, write_pair_shard


def train_rows(first: int, last: int) -> list[dict]:
    rows = [
        {"kind": "train", "step": s, "loss": 8.0 / s, "nats_per_dim": 8.0 / s, "gradient_norm": 1.0, "usage": None}
        for s in range(first, last + 1, 10)
    ]
    image = {"right": 3.0 / last, "shuffled": 4.0 / last, "none": 3.5 / last}
    measured = {"psnr_db": float(last), "image_nats_per_code": image, "information_gain_nats_per_code": 1.0 / last}
    return [*rows, {"kind": "evaluation", "step": last, "on": "held_out", "pictures": 7, **measured}]


def trained(run: Path, name: str, steps: list[int]) -> None:
    store, before = LocalStore(run / name), 0
    for step in steps:
        weights = run / "weights"
        weights.write_bytes(f"{name} {step}".encode())
        write_checkpoint(
            store, step, step, {"model.safetensors": weights}, train_rows(before + 10, step), dot(step % 256), 3
        )
        before = step


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run as the stages leave it: real pairs with real rejections, checkpoints, pictures, a summary."""
    run = tmp_path_factory.mktemp("run")
    pairs = LocalStore(run / "pairs")
    with serve(run) as web:
        bad = [(f"{web.url}/hostile/{kind}/1", f"a caption of {kind}") for kind in ("missing", "html", "broken")]
        plan(pairs, run / "list.tsv", [*generated(web.url, range(12)), *bad], pairs_per_shard=8)
        for task in pending(pairs):
            assert ingest_shard(task).state == "committed"
    trained(run, "tokenizer", [50, 100])
    trained(run, "model", list(range(20, 260, 20)))
    pictures = LocalStore(run / "pictures")
    pictures.put("sheet.png", dot(9))
    pictures.put("sheet.json", json.dumps({"prompts": ["a cat <b>", "a cat <b>", "a dog"], "seed": 3}).encode())
    (run / "settings.toml").write_text('[dvae]\nimage_size = 32  # "pixels" <&>\n')
    summary = {
        "title": "a small run",
        "seed": 3,
        "device": "two cores",
        "licence": "drawn by <us>",
        "samples": {"concept_at_5": {"held_out": 0.91, "shifted_captions": 0.05}},
        "seconds": {"ingest": {"wall": 60.0, "cpu": 30.0}, "model": {"wall": 120.0, "cpu": 150.0}},
    }
    (run / "summary.json").write_text(json.dumps(summary))
    return run


def written(run: Path) -> str:
    assert report.write_run_report(str(run)) == f"{run}/report.html"
    return (run / "report.html").read_text(encoding="utf-8")


# --- a run ---


def sections(location: Path) -> dict[str, report.Section]:
    return {section.title: section for section in report.report_of_run(str(location)).sections}


def commands(location: Path) -> list[str]:
    return [step.command for step in report.report_of_run(str(location)).steps if step.command]


def test_the_report_of_a_run_shows_every_part(run):
    assert list(sections(run)) == ["Pictures from prompts", "Pairs", "Tokenizer", "Transformer", "Scores", "Settings"]
    page = Page(written(run))
    for expected in (
        "a small run",
        "Seed 3 · two cores · 3.0 min wall time · 3.0 min CPU time",
        "a cat <b> · a dog. seed 3",
        "concept at 5 · held out",
        "0.91",
        'image_size = 32  # "pixels" <&>',
        "drawn by <us>",
        "after 240 updates",
        "the host has a fault",
        "a caption of broken",
        "HTTP 503",
    ):
        assert expected in page.text, expected


def test_the_funnel_is_what_status_counts(run):
    told = status(LocalStore(run / "pairs"))["pairs"]
    funnel = sections(run)["Pairs"].funnel
    assert (funnel.planned, funnel.kept, funnel.judged) == (told["planned"], told["kept"], 15)
    assert {cause.name: cause.count for cause in funnel.causes} == told["rejected"]
    assert told["rejected"] == {"http_4xx": 1, "not_an_image": 1, "http_5xx": 1}
    assert {cause.name: cause.kind for cause in funnel.causes}["http_5xx"] == "transient"
    assert len(funnel.kept_examples) == 10
    assert {cause.name: [e.caption for e in cause.examples] for cause in funnel.causes}["http_4xx"] == [
        "a caption of missing"
    ]
    assert (funnel.hosts[0].name, funnel.hosts[0].failed) == ("127.0.0.1", 3)


def test_pairs_of_shards_that_are_not_committed_are_planned_and_not_judged(tmp_path):
    pairs = LocalStore(tmp_path / "pairs")
    with serve(tmp_path) as web:
        plan(pairs, tmp_path / "list.tsv", generated(web.url, range(10)), pairs_per_shard=6)
        assert ingest_shard(pending(pairs)[0]).state == "committed"
    funnel = sections(tmp_path)["Pairs"].funnel
    assert (funnel.planned, funnel.judged) == (10, funnel.kept)
    assert funnel.kept < 10
    assert commands(tmp_path) == [f"armchair ingest {tmp_path}/list.tsv --into {tmp_path}/pairs"]


def test_the_strip_holds_at_most_eight_sheets_with_the_first_and_the_last(run):
    captions = [sheet.caption for sheet in sections(run)["Transformer"].strip]
    assert len(captions) == 8
    assert (captions[0], captions[-1]) == ("after 20 updates", "after 240 updates")
    assert [sheet.picture for sheet in sections(run)["Tokenizer"].strip] == [dot(50), dot(100)]


def test_a_second_report_replaces_the_first(run):
    first = written(run)
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"title": "another title"}))
    second = written(run)
    (run / "summary.json").write_text(json.dumps(summary))
    assert "another title" in second
    assert written(run) == first


def test_a_place_without_a_run_is_refused_in_words(tmp_path, learned):
    with pytest.raises(UsageError, match="holds no run"):
        report.write_run_report(str(tmp_path))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UsageError, match="is a stage"):
        report.write_run_report(str(learned.model))


def test_metrics_become_one_chart_a_number_with_training_and_evaluation_together():
    rows = [
        {"kind": "evaluation", "step": 0, "on": "held_out", "pictures": 3, "loss": 9.0},
        {"kind": "train", "step": 10, "loss": 5.0, "own_number": 1.0, "usage": None},
        {
            "kind": "evaluation", "step": 10, "on": "held_out", "pictures": 3, "loss": 6.0,
            "image_nats_per_code": {"right": 1.0, "none": 2.0},
        },
    ]  # fmt: skip
    charts = {chart.title: chart.curves for chart in charts_of(rows).values()}
    assert list(charts) == ["Picture, nats a code", "Objective", "own number"]
    assert list(charts["Objective"].items()) == [("training", [(10, 5.0)]), ("held-out", [(0, 9.0), (10, 6.0)])]
    assert charts["Picture, nats a code"] == {"held-out, right": [(10, 1.0)], "held-out, none": [(10, 2.0)]}


# --- how far a run is, and what to do next ---


@pytest.fixture
def copy(learned, tmp_path):
    """A run of tiny models that may be changed."""
    shutil.copytree(learned.pairs.parent, tmp_path / "run", ignore=shutil.ignore_patterns("scratch-*"))
    return tmp_path / "run"


def states(location: Path) -> dict[str, str]:
    return {stage.name: stage.state for stage in report.report_of_run(str(location)).stages}


def test_a_finished_run_of_real_models_has_no_problems_and_is_to_be_drawn_with(copy):
    data = report.report_of_run(str(copy))
    assert [line for section in data.sections for line in section.problems] == []
    assert set(states(copy).values()) == {"done"}
    assert [section.title for section in data.sections][-2:] == ["Settings", "Lineage"]
    assert f'armchair generate {copy}/model "a prompt" -n 9' in commands(copy)
    assert f"armchair rerun {copy}/pairs" in commands(copy)
    codes = sections(copy)["Codes"]
    assert codes.facts[3].value == f"{64 * 2 * 16:,}"  # pictures, crops, positions
    assert codes.tiles
    changed = {one.name: (one.value, one.default) for one in sections(copy)["Settings"].changed["dvae"]}
    assert changed["vocabulary"] == ("32", "8192")
    lineage = {what: (digest, made) for what, digest, made in sections(copy)["Lineage"].tables[0].rows}
    assert lineage["codes"][1] == "this tokenizer"


def test_each_stage_that_is_missing_is_said_so_with_the_command_that_makes_it(copy):
    shutil.rmtree(copy / "model")
    assert states(copy)["Transformer"] == "not begun"
    assert f"armchair train transformer {copy}/tokens --into {copy}/model" in commands(copy)
    shutil.rmtree(copy / "tokens")
    assert states(copy)["Codes"] == "not begun"
    makes = f"armchair tokenize {copy}/pairs --tokenizer {copy}/tokenizer --into {copy}/tokens"
    assert makes in commands(copy)
    shutil.rmtree(copy / "tokenizer")
    (copy / "settings.toml").write_text("")
    tokenizer = f"armchair train tokenizer {copy}/pairs --into {copy}/tokenizer --preset {copy}/settings.toml"
    assert tokenizer in commands(copy)
    assert not [command for command in commands(copy) if "tokenize " in command], "what waits for it is not told yet"
    assert "not begun" in Page(written(copy)).text


def test_pairs_without_codes_are_told(copy):
    write_pair_shard(copy / "pairs", 2, list(range(100, 110)))
    assert states(copy)["Codes"] == "unfinished"
    assert any(
        step.text.startswith("Pair shards without codes, or with old ones: 1.")
        for step in report.report_of_run(str(copy)).steps
    )


def test_a_training_that_has_not_ended_goes_on_with_the_same_command(copy):
    recipe = copy / "model" / "recipe.json"
    recipe.write_text(recipe.read_text().replace('"steps": 20', '"steps": 50'))
    assert states(copy)["Transformer"] == "unfinished"
    assert f"armchair train transformer {copy}/tokens --into {copy}/model" in commands(copy)
    claim_run(LocalStore(copy / "model"))
    assert states(copy)["Transformer"] == "under way"


def test_a_training_before_its_first_checkpoint_is_told(copy):
    shutil.rmtree(copy / "model")
    job: Job = transformer_job(copy / "tokens", copy / "model", replace(TRANSFORMER_TRAINING, steps=7))
    prepare(job)
    assert states(copy)["Transformer"] == "unfinished"
    assert "no checkpoint yet" in sections(copy)["Transformer"].text


@pytest.mark.parametrize(
    ("file", "section"),
    [
        ("pairs/receipts/00000.g0.json", "Pairs"),
        ("pairs/data/*.parquet", "Pairs"),
        ("tokenizer/steps/0000020/receipt.json", "Tokenizer"),
        ("tokenizer/metrics/0000010.jsonl", "Tokenizer"),
        ("tokenizer/recipe.json", "Tokenizer"),
        ("tokenizer/runs/0001/driver.json", "Tokenizer"),
        ("tokenizer/sheets/0000020.png", "Tokenizer"),
        ("tokens/receipts/00001.g0.json", "Codes"),
        ("tokens/data/*.parquet", "Codes"),
        ("tokens/tokenizer/*.safetensors", "Codes"),
        ("model/snapshot.json", "Lineage"),
        ("model/steps/0000020/receipt.json", "Transformer"),
    ],
)
def test_a_damaged_file_makes_a_line_in_its_section(copy, file, section):
    (path, *_) = sorted(copy.glob(file))
    path.write_bytes(b'{"format": 1, "neither": ')
    told = sections(copy)
    assert told[section].problems
    assert len(told) >= 6
    assert "can't be read" in Page(written(copy)).text


def test_a_file_that_is_missing_makes_a_line(copy):
    for path in copy.glob("tokens/data/*.parquet"):
        path.unlink()
    (copy / "summary.json").write_text("[")
    told = sections(copy)
    assert "no file" in told["Codes"].problems[0]
    assert any("summary.json can't be read" in line for line in next(iter(told.values())).problems)


def test_a_run_in_a_bucket_has_its_report_beside_it(copy, bucket):
    place = open_store(bucket)
    for entry in LocalStore(copy).list():
        place.put(entry.key, copy / entry.key)
    assert report.write_run_report(bucket) == join(bucket, "report.html")
    page = place.read("report.html").decode()
    assert f"armchair generate {bucket}/model" in Page(page).text
    assert len(page) == pytest.approx(len(written(copy)), rel=0.02)
    assert "can't be read" not in page


def test_defaults_are_those_of_the_settings():
    from pipelines.settings import Settings

    settings = Settings()
    for section, values in report.default_settings().items():
        assert values.keys() == vars(getattr(settings, section)).keys() - {"__pydantic_initialised__"}


def test_a_long_reading_tells_where_it_is(copy, monkeypatch, capfd):
    monkeypatch.setattr(report, "PROGRESS_S", 0.001)
    report.write_run_report(str(copy))
    assert "report: pairs: shard" in capfd.readouterr().err
    monkeypatch.setattr(report, "PROGRESS_S", 600.0)
    report.write_run_report(str(copy))
    assert capfd.readouterr().err == ""


def test_half_a_run_renders(tmp_path):
    trained(tmp_path, "tokenizer", [50])
    assert "after 50 updates" in Page(render(report.report_of_run(str(tmp_path)))).text
