"""The driver of every sharded stage: one bounded window of Ray tasks, and an outcome for each shard, whatever happens.

A shard that is lost to infrastructure (a killed worker, a node gone, memory) is submitted again at most twice, each
death recorded in attempts/; one that raises becomes an outcome `failed`. Nothing is remembered here: what is committed
stands in receipts, so every run is a resume. May not live here: what is done to a shard (ops/ingest.py).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, TypeVar

from infra.store import Store
from ops.attempts import list_attempts, read_attempt, record_death

RESUBMISSIONS = 2
"""How often the driver gives a shard to another worker after its worker died (INGEST.md §6)."""


class ShardTask(Protocol):
    """What the driver must know of a task: it is sent to a worker whole, and it is small."""

    @property
    def shard(self) -> int: ...
    @property
    def generation(self) -> int: ...
    @property
    def run(self) -> str:
        """Id of the command that made the task, to tell its attempts from another's."""


@dataclass(frozen=True)
class ShardOutcome:
    """What became of one shard in this run.

    `committed`: its receipt is written. `already`: it was there, or another run was faster, or a rerun changed nothing.
    `deferred`: too many transient failures, no receipt; the next command tries again. `failed`: `error` (a class) and
    `text` say why, and nothing was committed. `deaths` counts workers lost on the way.
    """

    shard: int
    generation: int
    state: Literal["committed", "already", "deferred", "failed"]
    rows: int = 0
    kept: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    error: str = ""
    text: str = ""
    deaths: int = 0


Task = TypeVar("Task", bound=ShardTask)
Tick = Callable[[Sequence[ShardTask]], None]
"""Is told the tasks in flight whenever no shard has ended for `TICK_S` seconds."""
TICK_S = 10.0


def on_ray(work: Callable[[Task], ShardOutcome], verb: str, cpus: float = 1, **options: Any) -> Callable[[Task], Any]:
    """Wraps a plain function of ops/ for `drive`: a Ray task named `ingest 00012 g0` on the dashboard, never retried
    by Ray itself, so that a death is recorded and not hidden. `options` go to Ray (`num_gpus=1`)."""
    import ray

    remote = ray.remote(work)

    def submit(task: Task) -> Any:
        name = f"{verb} {task.shard:05d} g{task.generation}"
        return remote.options(name=name, num_cpus=cpus, max_retries=0, **options).remote(task)

    return submit


def cluster_cpus() -> int:
    """CPUs of the connected Ray, or of this machine where none is connected."""
    import ray

    return int(ray.cluster_resources().get("CPU", 1)) if ray.is_initialized() else os.cpu_count() or 1


def wave_size(cpus: int) -> int:
    """Shards in one record of progress. A wave is a record, not a barrier (FLOWS.md §2).

    >>> wave_size(2), wave_size(1000)
    (500, 8000)
    """
    return max(500, 8 * cpus)


def drive(
    tasks: Iterable[Task],
    submit: Callable[[Task], Any],
    store: Store,
    stage: str,
    window: int | None = None,
    tick: Tick = lambda in_flight: None,
    tick_s: float = TICK_S,
) -> Iterator[ShardOutcome]:
    """Submits tasks and yields one outcome each, in the order of their ends; at most `window` (None: twice the
    cluster's CPUs, so that a worker never waits for the driver) are in flight. `store` is where attempts are recorded.
    `tick` is called while shards take longer than `tick_s`.

    A consumer that stops early cancels what is in flight.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError

    window = window or 2 * cluster_cpus()
    waiting = iter(tasks)
    in_flight: dict[Any, Task] = {}
    deaths: dict[int, int] = {}

    def fill() -> None:
        while len(in_flight) < window:
            task = next(waiting, None)
            if task is None:
                return
            in_flight[submit(task)] = task

    try:
        fill()
        while in_flight:
            ready, _ = ray.wait(list(in_flight), num_returns=1, timeout=tick_s)
            if not ready:
                tick(list(in_flight.values()))
                continue
            task = in_flight.pop(ready[0])
            died = deaths.get(task.shard, 0)
            try:
                outcome: ShardOutcome = ray.get(ready[0])
            except RayTaskError as error:  # the work itself raised: its attempt record holds the traceback
                cause = error.cause if isinstance(error.cause, BaseException) else error
                outcome = _failed(task, cause)
            except RayError as error:
                record_death(store, stage, task.shard, task.generation, task.run, error)
                died += 1
                deaths[task.shard] = died
                if died <= RESUBMISSIONS:
                    in_flight[submit(task)] = task
                    continue
                outcome = _failed(task, error)
            fill()  # before the consumer takes its time
            yield replace(outcome, deaths=died)
    finally:
        for ref in in_flight:
            with contextlib.suppress(RayError):
                ray.cancel(ref)


def rows_under_way(store: Store, tasks: Sequence[ShardTask]) -> int:
    """Rows that the running attempts of these tasks have done, as of their last signs of life. One listing."""
    wanted = {(task.shard, task.generation): task.run for task in tasks}
    rows = 0
    for name in list_attempts(store):
        run = wanted.get((name.shard, name.generation))
        if run is None:
            continue
        try:
            record = read_attempt(store, name)
        except FileNotFoundError:
            continue  # swept meanwhile
        if record["run"] == run and record["state"] == "running":
            rows += record["rows_done"]
    return rows


def _failed(task: ShardTask, error: BaseException) -> ShardOutcome:
    return ShardOutcome(task.shard, task.generation, "failed", error=type(error).__name__, text=str(error)[:2000])
