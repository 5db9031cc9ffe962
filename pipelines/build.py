"""The whole way as one flow. Read it as the table of contents of the project."""

from __future__ import annotations

from typing import Any

from prefect import flow, task

from infra.cluster import Cluster
from infra.metrics import Cost, timed
from ops.jobs import Place
from ops.plan import Columns
from ops.report import write_run_report
from pipelines.ingest import ingest
from pipelines.settings import Settings
from pipelines.stages import Run, record_settings
from pipelines.tokenize import tokenize
from pipelines.train import train_tokenizer, train_transformer
from pipelines.waves import on_ray, raise_if_unfinished


@flow(name="build", persist_result=False)
def build(
    lists: list[str],
    into: str,
    settings: Settings,
    columns: Columns = Columns(),
    cluster: Cluster = Cluster(),
    place: Place = Place(),
) -> dict[str, Any]:
    """List → pairs → tokenizer → tokens → transformer → report. Each stage does only what is missing.

    `place` is for both trainings. Raises Incomplete after a stage that left shards undone.
    """
    run, s = Run(into), settings
    record_settings(run, s)
    seconds: dict[str, Cost] = {}
    with on_ray(cluster):
        with timed("ingest", seconds):
            pairs = ingest(lists, run.pairs, columns, s.plan, s.filters, s.fetch, s.picture, s.outage, cluster)
            raise_if_unfinished(run.pairs, pairs)  # a model is never trained on part of what was asked for
        with timed("train_tokenizer", seconds):
            tokenizer = train_tokenizer(run.pairs, run.tokenizer, s.dvae, s.tokenizer_training, cluster, place)
        with timed("tokenize", seconds):
            tokens = tokenize(run.pairs, run.tokenizer, run.tokens, s.tokens, cluster)
            raise_if_unfinished(run.tokens, tokens)
        with timed("train_transformer", seconds):
            model = train_transformer(
                run.tokens, run.model, s.transformer, s.transformer_training, s.sampling, cluster, place
            )
    report = task(name="report", persist_result=False)(write_run_report)(into)
    stages = {"pairs": pairs, "tokenizer": tokenizer, "tokens": tokens, "model": model}
    return {**stages, "report": report, "seconds": seconds}
