"""Flow runs whose driver is dead: a process that was killed can't say so, and its run would be `Running` for ever.

Each run tells in labels which process drives it, and again every minute, by which its server knows when it was last
alive. The next run on that server ends those whose driver is gone as `Crashed`: a driver of this machine that is no
process any more, or one of another machine that has been silent for long. May not live here: what a run does.
"""

from __future__ import annotations

import sys
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterState, FlowRunFilterStateType
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.states import Crashed

from ops.run_record import is_gone, this_process

SIGN_S = 60.0
"""A driver gives a sign of life that often."""
SILENT_S = 15 * SIGN_S
"""A driver of another machine is dead after that; its server may have been away for some of it."""
HOST, PID, STARTED = "armchair.host", "armchair.pid", "armchair.started"


def give_sign(client: SyncPrefectClient, run: UUID) -> None:
    """Says who drives the run; that the server noted it is the sign of life."""
    host, pid, started = this_process()
    client.update_flow_run_labels(run, {HOST: host, PID: pid, STARTED: started or ""})


def bury_dead_runs(client: SyncPrefectClient, own: UUID, stage: str) -> None:
    """Ends the runs of dead drivers as `Crashed`, each told in a line of `stage`; `own` has just given a sign.

    A run that doesn't say who drives it is left alone, and so is one that may live.
    """
    unended = FlowRunFilterStateType(any_=[StateType.RUNNING, StateType.CANCELLING])
    now = client.read_flow_run(own).updated  # by the clock that all signs have in common
    for run in client.read_flow_runs(flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=unended))):
        silent_s = (now - run.updated).total_seconds() if now and run.updated else 0.0
        if run.id == own or HOST not in run.labels or not _is_dead(run, silent_s):
            continue
        who = f"process {run.labels[PID]} on {run.labels[HOST]}"
        client.set_flow_run_state(run.id, Crashed(message=f"{who} is gone. What it committed stays; run it again."))
        print(f"{stage:<11} Prefect's run {run.name} was left by {who}: it is Crashed now", file=sys.stderr, flush=True)


def _is_dead(run: FlowRun, silent_s: float) -> bool:
    host, pid, started = str(run.labels[HOST]), int(run.labels[PID]), str(run.labels[STARTED])
    return is_gone(host, pid, started) or (host != this_process()[0] and silent_s > SILENT_S)
