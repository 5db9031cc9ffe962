"""Flows of learning: the tokenizer from pictures, the transformer from captions and codes."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from prefect import flow

from infra.cluster import Cluster, Place, is_job, job_server
from infra.store import open_store
from models.dvae import DvaeSettings
from models.sampling import SampleSettings
from models.transformer import TransformerSettings
from ops.chart_picture import charts_svg
from ops.charts import number
from ops.errors import ArmchairError
from ops.jobs import Job, TokenizerTrainSettings, TransformerTrainSettings
from ops.report_stages import MORE, charts_of
from ops.run_record import read_run
from ops.train_job import train_as_job
from ops.trained import latest_checkpoint, read_metrics
from ops.training import Trained, check_place, prepare, train
from pipelines.artifacts import Board, carried
from pipelines.waves import on_ray


@flow(name="train-tokenizer", persist_result=False)
def train_tokenizer(
    pairs: str,
    into: str,
    dvae: DvaeSettings = DvaeSettings(),
    training: TokenizerTrainSettings = TokenizerTrainSettings(),
    cluster: Cluster = Cluster(),
    place: Place = Place(),
) -> dict[str, Any]:
    """Trains the discrete VAE on the pictures of PAIRS, from its latest checkpoint on."""
    return _train(Job("tokenizer", pairs, into, dvae, training), cluster, place)


@flow(name="train-transformer", persist_result=False)
def train_transformer(
    tokens: str,
    into: str,
    transformer: TransformerSettings = TransformerSettings(),
    training: TransformerTrainSettings = TransformerTrainSettings(),
    sampling: SampleSettings = SampleSettings(),
    cluster: Cluster = Cluster(),
    place: Place = Place(),
) -> dict[str, Any]:
    """Trains the transformer on the captions and codes of TOKENS, from its latest checkpoint on.

    `sampling` is for the sheets on the way and decides nothing else.
    """
    return _train(Job("transformer", tokens, into, transformer, training, sampling), cluster, place)


def _train(job: Job, cluster: Cluster, place: Place) -> dict[str, Any]:
    """In this process on a Ray that is joined or its own; on a cluster that takes jobs, as one that is followed."""
    store = open_store(job.into)
    check_place(job, place)  # what can be refused is refused before Ray starts
    prepare(job)
    with Board(f"train-{job.kind}", job.into) as board:
        shown = _Shown(job, board)

        def say(line: str) -> None:
            print(line, file=sys.stderr, flush=True)
            record = read_run(store)
            if record is not None and "step" in record:
                board.progress(record["step"] / record["steps"], line.removeprefix(job.kind).strip())
            shown.look()

        server = job_server(cluster.address) if cluster.address and not is_job() else None
        if server is not None:
            board.link("ray-dashboard", f"{server}/#/jobs", "Ray dashboard: the job, its log and its actors")
            trained = train_as_job(job, place, server, say)
        else:
            with on_ray(cluster, board, job.source, job.into):
                trained = train(job, place, say)
        shown.look()
        board.progress(1.0, f"step {trained.step}")
        board.markdown("report", report_of(job, trained))
        return asdict(trained)


class _Shown:
    """What the latest checkpoint knows, on the board as soon as it is there: the curves so far, and its sheet."""

    def __init__(self, job: Job, board: Board) -> None:
        self._job, self._board, self._store = job, board, open_store(job.into)
        self._step: int | None = None

    def look(self) -> None:
        """Shows a checkpoint that was not shown yet. What can't be read now is shown later, or not."""
        with suppress(OSError, ArmchairError):
            latest = latest_checkpoint(self._store)
            if latest is None or latest.step == self._step:
                return
            self._board.markdown("curves", curves_of(self._job, latest.step, read_metrics(self._store)))
            sheet = f"sheets/{latest.step:07d}.png"
            if self._store.stat(sheet) is not None:
                text = f"What the model makes at step {latest.step}"
                self._board.picture("sheet", self._store.read(sheet), text)
            self._step = latest.step


def curves_of(job: Job, step: int, rows: Sequence[Mapping[str, Any]]) -> str:
    """A page of Markdown: the loss and what a report begins with, up to a checkpoint, and where each curve stands."""
    found = charts_of(rows)
    charts = [found[name] for name in ["loss", *(name for name in found if name not in MORE)] if name in found]
    lines = [f"# {job.kind}: step {step} of {job.training.steps}", "", carried(charts_svg(charts), "curves"), ""]
    lines += ["| at the last checkpoint | | |", "|---|---|---:|"]
    for chart in charts:
        lines += [f"| {chart.title} | {name} | {number(points[-1][1])} |" for name, points in chart.curves.items()]
    return "\n".join(lines)


def report_of(job: Job, trained: Trained) -> str:
    """A page of Markdown about one training: where it ended, what the last evaluation says, and what to do next."""
    lines = [f"# train {job.kind}: step {trained.step} of {job.training.steps}", f"`{job.into}`", ""]
    lines += [f"- **model** `{trained.digest[:16]}`", f"- **from** `{job.source}`"]
    if trained.was_done:
        lines += ["- it was finished already"]
    numbers = [(name, value) for name, value in trained.evaluation.items() if isinstance(value, (int, float))]
    if numbers:
        lines += ["", "| last evaluation | |", "|---|---:|", *(f"| {name} | {value:.4g} |" for name, value in numbers)]
    follows = {
        "tokenizer": f"armchair tokenize {job.source} --tokenizer {job.into} --into TOKENS",
        "transformer": f'armchair generate {job.into} "a prompt"',
    }
    return "\n".join([*lines, "", "## What next", "", f"- `{follows[job.kind]}`"])
