"""The driver of every sharded stage: one bounded window of shards on Ray, and an outcome for each, whatever happens.

Shards are Ray tasks (`on_ray`), or go to workers that stay and keep something dear, a model on its GPU (`Actors`). One
that is lost to infrastructure (a killed worker, a node gone, memory) is submitted again at most twice, each
death recorded in attempts/; one that raises becomes an outcome `failed`. Nothing is remembered here: what is committed
stands in receipts, so every run is a resume. May not live here: what is done to a shard (ops/ingest.py).
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Literal, Protocol, TypeVar

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
    agreement: float | None = None
    """Share of a sample's codes that bfloat16 gave as float32 did (ops/encoder.py); None where there was no choice."""


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
        return remote.options(name=_name(verb, task), num_cpus=cpus, max_retries=0, **options).remote(task)

    return submit


def _name(verb: str, task: ShardTask) -> str:
    return f"{verb} {task.shard:05d} g{task.generation}"


_is_actor = False


class _Worker(Generic[Task]):
    """What an actor is: a process that does one shard after another, and keeps what its work keeps."""

    def __init__(self, work: Callable[[Task], ShardOutcome]) -> None:
        global _is_actor
        _is_actor = True
        self.work = work

    def is_ready(self) -> bool:
        """Answers once the process is there."""
        return True

    def do(self, task: Task) -> ShardOutcome:
        """Does one shard."""
        return self.work(task)


START_FAILURES = 3
"""So many actors in a row that die before they are ready end the run: the machine is ill, not a shard."""
STOP_S = 10.0
"""How long the actors of a run that was stopped may take to record that their shards were interrupted."""


class Actors(Generic[Task]):
    """`count` Ray actors for `drive`, as a `with` block. Each does one shard at a time, so that its death costs one.

    On the dashboard they are called `tokenize-0`, `tokenize-1`, …, their shards as those of `on_ray`. One that dies is
    replaced by the next number. An actor is given nothing before it is there: a shard never waits for a node that is
    gone while others are idle. `work` must be a function that a process can import, or a `partial` of one; it should
    call `raise_if_cancelled` now and then. `options` go to Ray (`num_cpus=2, num_gpus=1`).
    """

    def __init__(self, work: Callable[[Task], ShardOutcome], verb: str, count: int, **options: Any) -> None:
        self._work, self._verb, self._count, self._options = work, verb, count, options
        self._namespace = f"{verb}-{secrets.token_hex(6)}"  # of our own: another run may have a tokenize-0 too
        self._made = self._start_failures = 0
        self._idle: list[Any] = []
        self._busy: dict[Any, Any] = {}
        self._starting: dict[Any, Any] = {}

    def __enter__(self) -> Actors[Task]:
        for _ in range(self._count):
            self._start()
        return self

    def __exit__(self, *error: object) -> None:
        import ray

        if self._busy:
            ray.wait(list(self._busy), num_returns=len(self._busy), timeout=STOP_S)
        for actor in [*self._idle, *self._busy.values(), *self._starting.values()]:
            ray.kill(actor)

    def _start(self) -> None:
        import ray

        name = f"{self._verb}-{self._made}"
        self._made += 1
        options = {"name": name, "namespace": self._namespace, "max_restarts": 0, **self._options}
        actor = ray.remote(_Worker).options(**options).remote(self._work)
        self._starting[actor.is_ready.options(name=f"{name} starts").remote()] = actor

    def has_room(self) -> bool:
        """Whether an actor is there and idle. Replaces those that died. Raises RayError if none can start."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        pending = [*self._busy, *self._starting]
        ended = ray.wait(pending, num_returns=len(pending), timeout=0)[0] if pending else []
        for ref in ended:
            is_start = ref in self._starting
            actor = self._starting.pop(ref) if is_start else self._busy.pop(ref)
            try:
                ray.get(ref)
            except RayTaskError:
                pass  # the work raised; the actor lives
            except RayError:
                self._start_failures += is_start
                if self._start_failures >= START_FAILURES:
                    raise
                ray.kill(actor)  # if it is only out of reach, it must not hold its place for ever
                self._start()
                continue
            self._start_failures = 0
            self._idle.append(actor)
        return bool(self._idle)

    def starting(self) -> list[Any]:
        """References that are ready when an actor is there, or has died before."""
        return list(self._starting)

    def __call__(self, task: Task) -> Any:
        """Gives a shard to an idle actor; there must be one."""
        actor = self._idle.pop()
        ref = actor.do.options(name=_name(self._verb, task)).remote(task)
        self._busy[ref] = actor
        return ref


def raise_if_cancelled() -> None:
    """Raises KeyboardInterrupt in an actor whose shard the driver gave up: Ray interrupts tasks, but no actors."""
    if _is_actor:
        import ray

        if ray.get_runtime_context().is_canceled():
            raise KeyboardInterrupt


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
    submit: Callable[[Task], Any] | Actors[Task],
    store: Store,
    stage: str,
    window: int | None = None,
    tick: Tick = lambda in_flight: None,
    tick_s: float = TICK_S,
) -> Iterator[ShardOutcome]:
    """Submits tasks and yields one outcome each, in the order of their ends; at most `window` (None: twice the
    cluster's CPUs, so that a worker never waits for the driver) are in flight, and of `Actors` never more than are
    there. `store` is where attempts are recorded. `tick` is called while shards take longer than `tick_s`.

    A consumer that stops early cancels what is in flight.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError

    window = window or 2 * cluster_cpus()
    actors = submit if isinstance(submit, Actors) else None
    waiting, is_read = iter(tasks), False
    lost: deque[Task] = deque()
    in_flight: dict[Any, Task] = {}
    deaths: dict[int, int] = {}

    def fill() -> None:
        nonlocal is_read
        while len(in_flight) < window and (actors is None or actors.has_room()):
            task = lost.popleft() if lost else next(waiting, None)
            if task is None:
                is_read = True
                return
            in_flight[submit(task)] = task

    try:
        fill()
        while in_flight or lost or not is_read:
            coming = actors.starting() if actors and (lost or not is_read) else []
            ready, _ = ray.wait([*in_flight, *coming], num_returns=1, timeout=tick_s)
            if not ready:
                tick(list(in_flight.values()))
                continue
            if ready[0] not in in_flight:
                fill()
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
                    lost.append(task)
                    fill()
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
