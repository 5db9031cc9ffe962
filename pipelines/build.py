"""The whole way as one flow. Read it as the table of contents of the project."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from prefect import flow, task

from infra.cluster import Cluster, Place
from infra.metrics import Cost, timed
from ops.plan import Columns
from ops.report import write_run_report
from ops.tokenize import Encoders
from pipelines.artifacts import Board
from pipelines.ingest import ingest
from pipelines.progress import Progress
from pipelines.settings import Settings, resolve
from pipelines.show import duration
from pipelines.stages import Run, record_settings
from pipelines.tokenize import tokenize
from pipelines.train import train_tokenizer, train_transformer
from pipelines.waves import on_ray, raise_if_unfinished

STAGES = ("ingest", "train tokenizer", "tokenize", "train transformer", "report")


@flow(name="build", persist_result=False)
def build(
    lists: list[str],
    into: str,
    settings: Settings | str,
    columns: Columns = Columns(),
    cluster: Cluster = Cluster(),
    place: Place = Place(),
) -> dict[str, Any]:
    """List → pairs → tokenizer → tokens → transformer → report. Each stage does only what is missing.

    `settings` may be the name of a preset. `place` is for both trainings, and says whether the encoders have GPUs.
    Raises Incomplete after a stage that left shards undone, BadSetting and UsageError for a preset that is none.
    """
    run, s = Run(into), resolve(settings) if isinstance(settings, str) else settings
    record_settings(run, s)
    seconds: dict[str, Cost] = {}
    with Board("build", into) as board:
        with on_ray(cluster, board, into):
            with _stage("ingest", board), timed("ingest", seconds):
                pairs = ingest(lists, run.pairs, columns, s.plan, s.filters, s.fetch, s.picture, s.outage, cluster)
                raise_if_unfinished(run.pairs, pairs)  # a model is never trained on part of what was asked for
            with _stage("train tokenizer", board), timed("train_tokenizer", seconds):
                tokenizer = train_tokenizer(run.pairs, run.tokenizer, s.dvae, s.tokenizer_training, cluster, place)
            with _stage("tokenize", board), timed("tokenize", seconds):
                tokens = tokenize(run.pairs, run.tokenizer, run.tokens, s.tokens, cluster, Encoders(gpu=place.gpu))
                raise_if_unfinished(run.tokens, tokens)
            with _stage("train transformer", board), timed("train_transformer", seconds):
                model = train_transformer(
                    run.tokens, run.model, s.transformer, s.transformer_training, s.sampling, cluster, place
                )
        with _stage("report", board), Progress("report"):
            report = task(name="report", persist_result=False)(write_run_report)(into)
        board.markdown("report", report_of(into, report, seconds))
    stages = {"pairs": pairs, "tokenizer": tokenizer, "tokens": tokens, "model": model}
    return {**stages, "report": report, "seconds": seconds}


@contextmanager
def _stage(name: str, board: Board) -> Iterator[None]:
    """Says which stage of how many it is."""
    done = STAGES.index(name)
    line = f"stage {done + 1} of {len(STAGES)}: {name}"
    print(f"{'build':<12}{line}", file=sys.stderr, flush=True)
    board.progress(done / len(STAGES), line)
    yield
    board.progress((done + 1) / len(STAGES), f"{name} done")


def report_of(into: str, report: str, seconds: dict[str, Cost]) -> str:
    """A page of Markdown about one build: what each stage cost, and where its report lies."""
    lines = [f"# build of `{into}`", "", "| stage | wall | CPU |", "|---|---:|---:|"]
    lines += [f"| {name} | {duration(cost['wall'])} | {duration(cost['cpu'])} |" for name, cost in seconds.items()]
    lines += ["", "## What next", "", f"- open `{report}`", f'- `armchair generate {into}/model "a prompt"`']
    return "\n".join(lines)
