"""Training a stage, from its settings to its last checkpoint: the checks before, the launch on Ray Train, the progress.

The same call on a finished stage returns at once; on a stopped or killed one it goes on from the latest checkpoint.
May not live here: the loop (ops/training_loop.py), what is learned (ops/learning.py).
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from infra.cluster import Place
from infra.metrics import training_gauges
from infra.store import Store, absolute, open_store
from models.dvae import DvaeSettings
from ops.drops import warn_of_drops
from ops.errors import ArmchairError, Diverged, StorageError, UsageError
from ops.jobs import Job, Worker
from ops.learning import check_fit, make_bpe
from ops.recipes import start_stage
from ops.run_record import HEARTBEAT_S, Heartbeat, ask_to_stop, claim_run, end_run, read_run
from ops.snapshot import SNAPSHOT, Kind, read_snapshot, source_fingerprint, take_snapshot
from ops.trained import Checkpoint, freeze_tokenizer, latest_checkpoint, read_metrics, tokenizer_digest
from ops.training_loop import run_loop

NOT_IDENTITY = ("checkpoint_every", "keep_checkpoints", "log_every", "evaluate_pictures", "prompts")
"""Training settings that do not change the weights: they may differ when a run goes on."""
SOURCES = {"tokenizer": "pairs", "transformer": "tokens"}
KINDS: dict[str, Kind] = {"tokenizer": "pictures", "transformer": "codes"}
RESTARTS = 2
"""How often workers that died (killed, out of memory, node gone) are started again without a new checkpoint between."""
SILENCE_S = 8.0
"""A line of progress comes at least this often, whatever is being done."""
Say = Callable[[str], None]
COLLECTIVE_TIMEOUT_S = 1800
"""The other ranks wait this long for one that has more to do at the moment, or is gone."""
RESIZE_S = 30.0
"""How often an elastic run looks whether machines came."""


@dataclass(frozen=True)
class Trained:
    """Where a run stands: its last step, the digest of its model, and its last evaluation."""

    location: str
    step: int
    digest: str
    evaluation: dict[str, Any]
    was_done: bool


def train(job: Job, place: Place, say: Say = lambda line: None) -> Trained:
    """Trains on the connected Ray until `steps`, from the latest checkpoint on; at once if that is reached already.

    `say` gets a line of progress every few seconds. Raises what `prepare` raises, RunAlive, and Diverged. A stopped
    or killed run goes on when the same job is given again.
    """
    into = open_store(job.into)
    check_place(job, place)
    prepare(job, say)
    deaths, latest = 0, latest_checkpoint(into)
    if latest is not None and latest.step >= job.training.steps:
        return _where_it_stands(into, latest, was_done=True)
    while True:
        try:
            # Each start of workers is a run: those that were given up may be frozen only, and must find a later number.
            with _run(job) as run:
                _fit(job, place, run, say)
            break
        except _WorkersDied as died:
            before, latest = latest, latest_checkpoint(into)
            deaths = deaths + 1 if latest == before else 1
            if deaths > RESTARTS:
                raise died.error from None
            step = latest.step if latest else 0
            say(f"{job.kind:<12}a worker died ({died}); starting again from step {step}, the last checkpoint")
    latest = latest_checkpoint(into)
    if latest is None or latest.step < job.training.steps:
        raise StorageError(f"{job.into}: the run ended before its last checkpoint.", "Run the same command again.")
    trained = _where_it_stands(into, latest, was_done=False)
    say(f"{job.kind:<12}{latest.step}/{job.training.steps} steps   done")
    return trained


def check_place(job: Job, place: Place) -> None:
    """Raises UsageError for a place that this job can't be trained at."""
    if place.accumulate > 1 and isinstance(job.model, DvaeSettings) and job.model.usage:
        raise UsageError(
            f"dvae.usage is {job.model.usage}: it is a statistic of a whole batch, which --accumulate splits.",
            "Leave --accumulate out and take more --workers, or --set dvae.usage=0",
        )
    for name in ("workers", "threads", "accumulate"):
        if (count := getattr(place, name)) is not None and count < 1:
            raise UsageError(f"--{name} is {count}.", "Give 1 or more.")
    if place.most_workers is not None and place.most_workers < place.workers:
        raise UsageError(
            f"--most-workers {place.most_workers} is less than --workers {place.workers}.",
            "An elastic run has between --workers and --most-workers of them.",
        )


def train_here(job: Job, threads: int | None = None, stop_after: int | None = None) -> Trained:
    """`train` without Ray, in this process, as one worker. `stop_after` ends it after that many updates of this call,
    as a stop from outside would: what is past the last checkpoint is done again by the next call."""
    into = open_store(job.into)
    prepare(job)
    with _run(job) as run:
        run_loop(job, Worker(threads=threads), run, stop_after)
    latest = latest_checkpoint(into)
    if latest is None:
        raise StorageError(f"{job.into}: the run ended before its first checkpoint.", "Run the same command again.")
    return _where_it_stands(into, latest, was_done=False)


@contextmanager
def _run(job: Job) -> Iterator[int]:
    """A run of this process: claimed, with signs of life, and its end in its record. Raises RunAlive."""
    into = open_store(job.into)
    run = claim_run(into)
    state = "stopped"
    try:
        with Heartbeat(into, run, "driver"):
            yield run
        latest = latest_checkpoint(into)
        state = "done" if latest is not None and latest.step >= job.training.steps else "stopped"
    except ArmchairError as error:
        state = "diverged" if isinstance(error, Diverged) else "failed"
        raise
    except Exception:
        state = "failed"
        raise
    finally:
        end_run(into, run, state)


def identity(job: Job) -> dict[str, Any]:
    """What decides the weights, for the stage's recipe, under the names of the settings' sections."""
    training = {name: value for name, value in asdict(job.training).items() if name not in NOT_IDENTITY}
    if job.training.schedule == "plateau":  # which looks at the means between checkpoints
        training["checkpoint_every"] = job.training.checkpoint_every
    model = "dvae" if job.kind == "tokenizer" else "transformer"
    return {model: asdict(job.model), f"{job.kind}_training": training}


def prepare(job: Job, say: Say = lambda line: None) -> None:
    """Checks the source, writes recipe.json, pins the snapshot, and makes what is made once (frozen tokenizer, BPE).

    Raises UsageError for a source that is none or selects nothing, RecipeChanged if the stage was made otherwise.
    """
    with _telling(say, f"{job.kind:<12}looks at the shards of {job.source}, and pins them"):
        _start(job)
    if job.kind == "transformer":
        into = open_store(job.into)
        if line := warn_of_drops(open_store(job.source)):
            say(f"{job.kind:<12}{line}")
        with _telling(say, f"{job.kind:<12}learns the tokens of the captions"):
            freeze_tokenizer(job.source, into)
            make_bpe(job, into, read_snapshot(into))


def _start(job: Job) -> None:
    into, source = open_store(job.into), open_store(job.source)
    inputs = {"source": source_fingerprint(source, SOURCES[job.kind])}
    if job.kind == "transformer":
        inputs["tokenizer"] = tokenizer_digest(job.source)
        check_fit(job)
    taken = take_snapshot(source, KINDS[job.kind], job.training.where) if into.stat(SNAPSHOT) is None else None
    ways_out = "Use another --into, or the old values."
    start_stage(into, job.kind, identity(job), inputs, ways_out)
    if taken is not None:
        into.put(SNAPSHOT, taken.to_json())


@contextmanager
def _telling(say: Say, what: str) -> Iterator[None]:
    """Says `what` and for how long it has been going on, if the `with` block takes its time."""
    ended, began_s = threading.Event(), time.monotonic()

    def tell() -> None:
        while not ended.wait(SILENCE_S / 2):
            say(f"{what}   {time.monotonic() - began_s:.0f} s")

    thread = threading.Thread(target=tell, name="telling", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


# On Ray ---------------------------------------------------------------------------------------------------------------


def _on_ray(config: dict[str, Any]) -> None:
    """What each Ray Train worker runs: the loop touches Ray in these lines only."""
    import ray.train

    context = ray.train.get_context()
    place: Place = config["place"]
    # Ray gives a worker of one CPU one thread; what this machine has is shared among its workers instead.
    worker = Worker(
        rank=context.get_world_rank(),
        world=context.get_world_size(),
        device="cuda" if place.gpu else "cpu",
        threads=place.threads or max(1, (os.cpu_count() or 1) // context.get_local_world_size()),
        sharded=place.sharded,
        accumulate=place.accumulate,
        recompute=place.recompute,
        compile=place.compile,
        report=ray.train.report,
        tell=training_gauges(config["job"].kind, config["job"].into),
    )
    run_loop(config["job"], worker, config["run"])


class _WorkersDied(Exception):
    def __init__(self, error: BaseException) -> None:
        super().__init__(", ".join(sorted({type(failure).__name__ for failure in _worker_failures(error)})))
        self.error = error


def _fit(job: Job, place: Place, run: int, say: Say) -> None:
    """Runs `_on_ray` on Ray Train in a thread, and tells progress from here. What is left by an exception (Ctrl-C, a
    flow that is cancelled) asks the run to stop and waits for it. Raises _WorkersDied, or what a worker raised."""
    into = open_store(job.into)
    failures: list[BaseException] = []
    thread = threading.Thread(target=_fit_once, args=(job, place, run, failures), name="ray-train", daemon=True)
    thread.start()
    told = Told(job, say)
    try:
        while thread.is_alive():
            thread.join(HEARTBEAT_S)
            record = read_run(into)
            if thread.is_alive() and record is not None and record["run"] == run:
                told.look(record)
    finally:
        if thread.is_alive():
            ask_to_stop(into, run)
            thread.join(5 * HEARTBEAT_S)
    if failures:
        raise _WorkersDied(failures[0]) if _workers_died(failures[0], place) else _cause(failures[0])


class Told:
    """What was told of a run: a line every few seconds, on its steps, or on what else it is doing and for how long."""

    def __init__(self, job: Job, say: Say) -> None:
        self._job, self._say = job, say
        self._began_s = self._spoke_s = time.monotonic()
        self._step, self._doing = None, "starts its workers"
        latest = latest_checkpoint(open_store(job.into))
        self._made_with = latest.made_with if latest else {}

    def look(self, record: Mapping[str, Any]) -> None:
        """Says what is new in the run record."""
        now_s = time.monotonic()
        if "made_with" in record and self._made_with:
            self._tell_of_other_bytes(record["made_with"])
        if record.get("doing", self._doing) != self._doing:
            self._doing, self._began_s = record["doing"], now_s
        if now_s - self._spoke_s < SILENCE_S - HEARTBEAT_S:
            return
        if record.get("step") not in (None, self._step):  # workers that start again have no step yet
            self._step = record["step"]
            line = progress_line(self._job.kind, record)
        else:
            at = f"step {self._step}: " if self._step is not None else ""
            line = f"{self._job.kind:<12}{at}{self._doing}   {now_s - self._began_s:.0f} s"
        self._spoke_s = now_s
        self._say(line)

    def _tell_of_other_bytes(self, now: Mapping[str, Any]) -> None:
        was, self._made_with = self._made_with, {}
        changed = [f"{name} was {was[name]}, now {now.get(name)}" for name in was if was[name] != now.get(name)]
        if changed:
            told = f"goes on, and the weights may differ in their last bits: {'; '.join(changed)}"
            self._say(f"{self._job.kind:<12}{told}")


def _fit_once(job: Job, place: Place, run: int, failures: list[BaseException]) -> None:
    try:
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        workers = (place.workers, place.most_workers) if place.most_workers else place.workers
        scaling = ScalingConfig(
            num_workers=workers,
            use_gpu=place.gpu,
            resources_per_worker={"CPU": 1} | ({"GPU": 1} if place.gpu else {}),
            elastic_resize_monitor_interval_s=RESIZE_S,
        )
        # The gauges of a training are few: its workers keep what `infra.cluster` turns off for tasks of many names.
        runtime_env = {"env_vars": {"RAY_enable_metrics_collection": "1"}}
        backend = TorchConfig(backend="nccl" if place.gpu else "gloo", timeout_s=COLLECTIVE_TIMEOUT_S)
        with tempfile.TemporaryDirectory(prefix="ray-train-") as directory:
            TorchTrainer(
                _on_ray,
                train_loop_config={"job": _absolute(job), "place": place, "run": run},
                scaling_config=scaling,
                torch_config=backend,
                run_config=RunConfig(name=f"{job.kind}-{run}", storage_path=directory, worker_runtime_env=runtime_env),
            ).fit()
    except BaseException as error:  # carried to the thread that waits
        failures.append(error)


def _absolute(job: Job) -> Job:
    """The job with absolute paths: a Ray worker has another working directory."""
    return replace(job, source=absolute(job.source), into=absolute(job.into))


def _worker_failures(error: BaseException) -> list[BaseException]:
    from ray.train import WorkerGroupError

    return list(error.worker_failures.values()) if isinstance(error, WorkerGroupError) else []


def _workers_died(error: BaseException, place: Place) -> bool:
    """Whether infrastructure ended the run. A rank that loses a peer in a sum over ranks sees a RuntimeError of torch;
    one that has no peer, or too little memory, has met an error of its own."""

    import torch

    def is_loss(failure: BaseException) -> bool:
        is_own = (place.most_workers or place.workers) == 1 or isinstance(failure, torch.OutOfMemoryError)
        lost_peer = isinstance(failure, RuntimeError) and not is_own
        return type(failure).__module__.startswith("ray.") or lost_peer

    failures = _worker_failures(error)
    return bool(failures) and all(map(is_loss, failures))


def _cause(error: BaseException) -> BaseException:
    """The exception that people are told out of Ray Train's wrapping, or the whole of it with its tracebacks."""
    ours = (ArmchairError, OSError)  # what a disk or a bucket says is for people too
    return next((failure for failure in _worker_failures(error) if isinstance(failure, ours)), error)


def progress_line(stage: str, record: Mapping[str, Any]) -> str:
    """One line for people.

    >>> progress_line("tokenizer", {"step": 300, "steps": 650, "loss": 2.5, "steps_per_s": 12.0, "seconds_left": 29.2})
    'tokenizer   300/650 steps   46 %   loss 2.500   12 steps/s   0:29 left'
    """
    step, steps, left_s = record["step"], record["steps"], round(record["seconds_left"])
    hours, minutes, seconds = left_s // 3600, left_s // 60 % 60, left_s % 60
    left = f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
    parts = (
        f"{stage:<12}{step}/{steps} steps",
        f"{100 * step // steps} %",
        f"loss {record['loss']:.3f}",
        f"{record['steps_per_s']:.3g} steps/s",
        f"{left} left",
    )
    return "   ".join(parts)


def _where_it_stands(into: Store, checkpoint: Checkpoint, *, was_done: bool) -> Trained:
    evaluations = [row for row in read_metrics(into) if row["kind"] == "evaluation"]
    last = evaluations[-1] if evaluations else {}
    return Trained(into.location, checkpoint.step, checkpoint.digest, last, was_done)
