"""The flow that takes over a folder of img2dataset's: look at it, plan it, commit what is sound in it."""

from __future__ import annotations

from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from infra.cluster import Cluster
from infra.store import open_store
from ops.adopt import look_at_folder, plan_adoption
from ops.fetch import FetchSettings
from ops.filters import FilterSettings
from ops.ingest import OutageSettings, ingest, pending_tasks
from ops.pictures import PictureSettings
from ops.plan import Columns, PlanSettings, read_instalments
from pipelines.artifacts import Board
from pipelines.progress import Progress
from pipelines.stages import begin_pairs
from pipelines.waves import end_state, on_ray, run_in_waves


@flow(name="adopt", persist_result=False)
def adopt(
    folder: str,
    lists: list[str],
    into: str,
    columns: Columns = Columns(),
    plan: PlanSettings = PlanSettings(),
    filters: FilterSettings = FilterSettings(),
    picture: PictureSettings = PictureSettings(),
    cluster: Cluster = Cluster(),
) -> dict[str, Any]:
    """Commits the sound pairs of the folder without a request; the others are planned for the next ingest."""
    with Board("adopt", into) as board:
        facts: dict[str, Any] = _plan(folder, lists, into, columns, plan, filters, picture)
        planned = read_instalments(open_store(into))
        tasks = pending_tasks(into, planned, FetchSettings(), picture, filters, OutageSettings(), only_adopted=True)
        rows = sum(task.work_order.rows for task in tasks)
        with on_ray(cluster, board, into):
            tally = run_in_waves("adopt", into, tasks, lambda tick: ingest(into, tasks, tick=tick), board, rows)
        told: dict[str, Any] = end_state("adopt", into, tally, board, adoption=facts)
    return told


@task(name="plan", persist_result=False, cache_policy=NO_CACHE)
def _plan(
    folder: str,
    lists: list[str],
    into: str,
    columns: Columns,
    settings: PlanSettings,
    filters: FilterSettings,
    picture: PictureSettings,
) -> dict[str, Any]:
    """Returns what was found in the folder, and how much of it was new to PAIRS."""
    with Progress("adopt") as progress:
        found = look_at_folder(folder, progress.tell)
        store = open_store(into)
        begin_pairs(store, settings, filters, picture)
        adoption = plan_adoption(store, found, lists, settings, filters, columns, progress.tell)
    unknown = [one.unknown for one in found]
    return {
        "folder": folder,
        "shards": len(found),
        "adopted": adoption.adopted,
        "missing": adoption.missing,
        "already": adoption.already,
        "unknown": None if None in unknown else sum(number or 0 for number in unknown),
        "with_lists": bool(lists),
        "problems": [{"shard": one.shard, "what": what} for one in found for what in one.problems],
        "failed": dict(sum((one.failed for one in found), type(found[0].failed)())),
    }
