from __future__ import annotations

import os
from pathlib import Path

import pytest

from infra.store import open_store
from ops.errors import RecipeChanged, UsageError
from ops.filters import FilterSettings
from ops.pictures import PictureSettings
from ops.plan import Columns, PlanSettings, extend_plan
from pipelines.settings import resolve
from pipelines.stages import Run, _is_report_old, begin_pairs, missing_stages


def _list(folder: Path) -> str:
    path = folder / "list.tsv"
    path.write_text("url\tcaption\nhttp://127.0.0.1:9/1.jpg\ta cat on a mat\n")
    return str(path)


def test_models_that_do_not_fit_each_other_are_refused_before_anything_is_fetched(tmp_path: Path) -> None:
    settings = resolve("tiny", ["dvae.vocabulary=64"])
    with pytest.raises(UsageError, match=r"--set transformer\.image_vocabulary=64"):
        missing_stages([_list(tmp_path)], Run(str(tmp_path / "run")), settings)
    assert not (tmp_path / "run").exists()


def test_a_list_that_is_not_there_is_told_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises((UsageError, FileNotFoundError), match=r"typo\.tsv"):
        missing_stages([str(tmp_path / "typo.tsv")], Run(str(tmp_path / "run")), resolve("tiny"))


def test_other_settings_are_taken_while_nothing_is_planned_and_refused_after(tmp_path: Path) -> None:
    """As after a first list that could not be read."""
    store = open_store(str(tmp_path / "pairs"))
    begin_pairs(store, PlanSettings(), FilterSettings(), PictureSettings())
    plan = PlanSettings(pairs_per_shard=7)
    begin_pairs(store, plan, FilterSettings(), PictureSettings())
    extend_plan(store, [_list(tmp_path)], plan, FilterSettings(), Columns())
    begin_pairs(store, plan, FilterSettings(), PictureSettings())
    with pytest.raises(RecipeChanged, match=r"plan\.pairs_per_shard: was 7, now 8"):
        begin_pairs(store, PlanSettings(pairs_per_shard=8), FilterSettings(), PictureSettings())


def test_a_report_from_before_the_last_checkpoint_is_old(tmp_path: Path) -> None:
    run = Run(str(tmp_path))
    open_store(run.model).put("steps/0000010/receipt.json", b"{}")
    assert _is_report_old(run)
    (tmp_path / "report.html").write_text("<html>")
    assert not _is_report_old(run)
    os.utime(tmp_path / "report.html", (1, 1))
    assert _is_report_old(run)
