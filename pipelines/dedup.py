"""The flow that finds pictures which are there more than once; it writes a drop list and touches no shard."""

from __future__ import annotations

from typing import Any

from prefect import flow

from infra.cluster import Cluster
from ops.picture_duplicates import deduplicate
from pipelines.artifacts import Board
from pipelines.progress import Progress
from pipelines.show import show_dedup
from pipelines.waves import on_ray


@flow(name="ingest", flow_run_name="dedup {pairs}", persist_result=False)  # ingest/dedup: see pipelines/ingest.py
def dedup(pairs: str, cluster: Cluster = Cluster()) -> dict[str, Any]:
    """Looks for copies among all kept pairs of PAIRS, by bytes and by picture; again after growth: only new ones go."""
    with (
        Board("dedup", pairs) as board,
        on_ray(cluster, board),
        Progress("dedup", always=True, show=board.progress) as progress,
    ):
        told = deduplicate(pairs, progress.tell)
        board.markdown("report", f"# dedup\n\n`{pairs}`\n\n{show_dedup(pairs, told)}")
    return told
