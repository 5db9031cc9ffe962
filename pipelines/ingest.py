"""Flows of ingestion: plan the lists and collect what is missing; ask again for what can have changed."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import Any, Literal

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from infra.cluster import Cluster
from infra.store import open_store
from ops.errors import UsageError
from ops.fetch import FetchSettings
from ops.filters import FilterSettings
from ops.ingest import OutageSettings, pending_tasks, rerun_tasks
from ops.ingest import ingest as ingest_shards
from ops.pictures import PictureSettings
from ops.plan import Columns, Extension, PlanSettings, extend_plan
from ops.recipes import RECIPE, read_json
from pipelines.artifacts import Board
from pipelines.progress import Progress
from pipelines.stages import begin_pairs
from pipelines.waves import end_state, on_ray, run_in_waves


@flow(name="ingest", persist_result=False)
def ingest(
    lists: list[str],
    into: str,
    columns: Columns = Columns(),
    plan: PlanSettings = PlanSettings(),
    filters: FilterSettings = FilterSettings(),
    fetch: FetchSettings = FetchSettings(),
    picture: PictureSettings = PictureSettings(),
    outage: OutageSettings = OutageSettings(),
    cluster: Cluster = Cluster(),
    accept_partial: bool = False,
) -> dict[str, Any]:
    """Extends the plan by the lists that are new, then does every shard that is planned and not committed."""
    with Board("ingest", into) as board:
        begin_pairs(open_store(into), plan, filters, picture)
        extension: Extension = _plan(into, lists, plan, filters, columns)
        for label in extension.changed:
            print(f"ingest      {label}: its bytes changed since it was planned; skipped", file=sys.stderr)
        for label in extension.passed_over:
            print(f"ingest      {label}: no list by its name; passed over", file=sys.stderr)
        planned = extension.instalments
        tasks = pending_tasks(into, planned, fetch, picture, filters, outage, accept_partial=accept_partial)
        rows = sum(task.work_order.rows for task in tasks)
        if tasks and not fetch.contact and not fetch.allow_private:  # not for one's own servers
            hint = "--set fetch.contact=you@example.org"
            print(f"ingest      webmasters can't reach you: {hint} puts it into each request", file=sys.stderr)
        with on_ray(cluster, board, into) if tasks else nullcontext():
            tally = run_in_waves("ingest", into, tasks, lambda tick: ingest_shards(into, tasks, tick=tick), board, rows)
        lists_left = {"changed": extension.changed, "passed_over": extension.passed_over}
        told: dict[str, Any] = end_state("ingest", into, tally, board, extension.changed, lists=lists_left)
    return told


# Prefect names a deployment FLOW/NAME. What is asked again belongs to the flow whose nightly run it mends, so that both
# (and pipelines/dedup.py) are deployments of `ingest` and stand on one page of the UI.
@flow(name="ingest", flow_run_name="rerun {pairs}", persist_result=False)
def rerun(
    pairs: str,
    again: Literal["transient", "rejected"] = "transient",
    shards: list[int] | None = None,
    fetch: FetchSettings = FetchSettings(),
    outage: OutageSettings = OutageSettings(),
    cluster: Cluster = Cluster(),
) -> dict[str, Any]:
    """Asks again for the rejected rows of committed shards; each shard that changes gets its next generation."""
    with Board("rerun", pairs) as board:
        recipe = read_json(open_store(pairs), RECIPE)["identity"]
        picture, filters = PictureSettings(**recipe["picture"]), FilterSettings(**recipe["filters"])
        tasks = rerun_tasks(pairs, fetch, picture, filters, outage, again=again, shards=shards)
        with on_ray(cluster, board, pairs) if tasks else nullcontext():
            tally = run_in_waves("rerun", pairs, tasks, lambda tick: ingest_shards(pairs, tasks, tick=tick), board)
        told: dict[str, Any] = end_state("rerun", pairs, tally, board)
    return told


@task(name="plan", persist_result=False, cache_policy=NO_CACHE)
def _plan(into: str, lists: list[str], settings: PlanSettings, filters: FilterSettings, columns: Columns) -> Extension:
    with Progress("plan") as progress:
        return extend_plan(open_store(into), lists, settings, filters, columns, progress.tell)


def parse_shards(text: str) -> list[int]:
    """Shards as people write them. Raises UsageError.

    >>> parse_shards("3,7-9")
    [3, 7, 8, 9]
    """
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not (first.strip().isdigit() and (last or first).strip().isdigit()):
            raise UsageError(f"--shards {text}: {part!r} is no shard or range of shards.", "Example: --shards 3,7-9")
        found.extend(range(int(first), int(last or first) + 1))
    return found
