"""Training a stage, from its settings to its last checkpoint: the checks before, the launch on Ray Train, the progress.

The same call on a finished stage returns at once; on a stopped or killed one it goes on from the latest checkpoint.
May not live here: the loop (ops/training_loop.py), what is learned (ops/learning.py).
"""

from __future__ import annotations

import os
import secrets
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from infra.store import Store, absolute, open_store
from ops.errors import ArmchairError, Diverged, StorageError
from ops.jobs import Job, Place, Worker
from ops.learning import check_fit, make_bpe
from ops.recipes import start_stage
from ops.run_record import HEARTBEAT_S, ask_to_stop, claim_run, end_run, read_run
from ops.snapshot import SNAPSHOT, Kind, read_snapshot, source_fingerprint, take_snapshot
from ops.trained import Checkpoint, freeze_tokenizer, latest_checkpoint, read_metrics, tokenizer_digest
from ops.training_loop import run_loop

NOT_IDENTITY = ("checkpoint_every", "keep_checkpoints", "log_every", "evaluate_pictures", "prompts")
"""Training settings that do not change the weights: they may differ when a run goes on."""
KINDS: dict[str, Kind] = {"tokenizer": "pictures", "transformer": "codes"}
RESTARTS = 2
"""How often a run whose workers died (killed, out of memory, node gone) is started again from its checkpoint."""
COLLECTIVE_TIMEOUT_S = 1800
"""The other ranks wait this long while rank 0 evaluates and writes a checkpoint."""


@dataclass(frozen=True)
class Trained:
    """Where a run stands: its last step, the digest of its model, and its last evaluation."""

    location: str
    step: int
    digest: str
    evaluation: dict[str, Any]
    was_done: bool


def train(job: Job, place: Place, say: Callable[[str], None] = lambda line: None) -> Trained:
    """Trains on the connected Ray until `steps`, from the latest checkpoint on; at once if that is reached already.

    `say` gets a line of progress every few seconds. Raises what `prepare` raises, RunAlive, and Diverged. A stopped
    or killed run goes on when the same job is given again.
    """
    into = open_store(job.into)
    prepare(job)
    latest = latest_checkpoint(into)
    if latest is not None and latest.step >= job.training.steps:
        return _where_it_stands(into, latest, was_done=True)
    run = secrets.token_hex(6)
    claim_run(into, run)
    state = "stopped"
    try:
        _fit(job, place, run, say)
        state = "done"
    except ArmchairError as error:
        state = "diverged" if isinstance(error, Diverged) else "failed"
        raise
    except Exception:
        state = "failed"
        raise
    finally:
        end_run(into, run, state)
    latest = latest_checkpoint(into)
    if latest is None or latest.step < job.training.steps:
        raise StorageError(f"{job.into}: the run ended before its last checkpoint.", "Run the same command again.")
    trained = _where_it_stands(into, latest, was_done=False)
    say(f"{job.kind:<12}{latest.step}/{job.training.steps} steps   done")
    return trained


def train_here(job: Job, threads: int | None = None, stop_after: int | None = None) -> Trained:
    """`train` without Ray, in this process, as one worker. `stop_after` ends it after that many updates of this call,
    as a stop from outside would: what is past the last checkpoint is done again by the next call."""
    into = open_store(job.into)
    prepare(job)
    run = secrets.token_hex(6)
    claim_run(into, run)
    state = "stopped"
    try:
        run_loop(job, Worker(threads=threads), run, stop_after)
        state = "stopped" if stop_after else "done"
    finally:
        end_run(into, run, state)
    latest = latest_checkpoint(into)
    if latest is None:
        raise StorageError(f"{job.into}: the run ended before its first checkpoint.", "Run the same command again.")
    return _where_it_stands(into, latest, was_done=False)


def identity(job: Job) -> dict[str, Any]:
    """What decides the weights, for the stage's recipe, under the names of the settings' sections."""
    training = {name: value for name, value in asdict(job.training).items() if name not in NOT_IDENTITY}
    model = "dvae" if job.kind == "tokenizer" else "transformer"
    return {model: asdict(job.model), f"{job.kind}_training": training}


def prepare(job: Job) -> None:
    """Checks the source, writes recipe.json, pins the snapshot, and makes what is made once (frozen tokenizer, BPE).

    Raises UsageError for a source that is none or selects nothing, RecipeChanged if the stage was made otherwise.
    """
    into, source = open_store(job.into), open_store(job.source)
    inputs = {"source": source_fingerprint(source)}
    if job.kind == "transformer":
        inputs["tokenizer"] = tokenizer_digest(job.source)
        check_fit(job)
    taken = take_snapshot(source, KINDS[job.kind], job.training.where) if into.stat(SNAPSHOT) is None else None
    ways_out = "Use another --into, or the old values."
    start_stage(into, job.kind, identity(job), inputs, ways_out)
    if taken is not None:
        into.put(SNAPSHOT, taken.to_json())
    if job.kind == "transformer":
        freeze_tokenizer(job.source, into)
        make_bpe(job, into, read_snapshot(into))


# On Ray ---------------------------------------------------------------------------------------------------------------


def _on_ray(config: dict[str, Any]) -> None:
    """What each Ray Train worker runs: the loop touches Ray in these lines only."""
    import ray.train

    context = ray.train.get_context()
    place: Place = config["place"]
    # Ray gives a worker of one CPU one thread; what this machine has is shared among its workers instead.
    threads = place.threads or max(1, (os.cpu_count() or 1) // context.get_local_world_size())
    device = "cuda" if place.gpu else "cpu"
    worker = Worker(context.get_world_rank(), context.get_world_size(), device, threads, ray.train.report)
    run_loop(config["job"], worker, config["run"])


def _fit(job: Job, place: Place, run: str, say: Callable[[str], None]) -> None:
    """Runs `_on_ray` on Ray Train in a thread, and tells progress from here. What is left by an exception (Ctrl-C, a
    flow that is cancelled) asks the run to stop and waits for it."""
    into = open_store(job.into)
    for _ in range(1 + RESTARTS):
        failures: list[BaseException] = []
        thread = threading.Thread(target=_fit_once, args=(job, place, run, failures), name="ray-train", daemon=True)
        thread.start()
        last_step = None
        try:
            while thread.is_alive():
                thread.join(HEARTBEAT_S)
                told = read_run(into)
                if thread.is_alive() and told is not None and told.get("step") != last_step:
                    say(progress_line(job.kind, told))
                    last_step = told["step"]
        finally:
            if thread.is_alive():
                ask_to_stop(into, run)
                thread.join(2 * HEARTBEAT_S)
        if not failures:
            return
        if not _workers_died(failures[0], place):
            raise _cause(failures[0])
        why = ", ".join(sorted({type(failure).__name__ for failure in _worker_failures(failures[0])}))
        say(f"{job.kind:<12}a worker died ({why}); starting again from the last checkpoint")
    raise _cause(failures[0])


def _fit_once(job: Job, place: Place, run: str, failures: list[BaseException]) -> None:
    try:
        from ray.train import RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        scaling = ScalingConfig(num_workers=place.workers, use_gpu=place.gpu, resources_per_worker={"CPU": 1})
        backend = TorchConfig(backend="nccl" if place.gpu else "gloo", timeout_s=COLLECTIVE_TIMEOUT_S)
        with tempfile.TemporaryDirectory(prefix="ray-train-") as directory:
            TorchTrainer(
                _on_ray,
                train_loop_config={"job": _absolute(job), "place": place, "run": run},
                scaling_config=scaling,
                torch_config=backend,
                run_config=RunConfig(name=run, storage_path=directory),
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
        is_own = place.workers == 1 or isinstance(failure, torch.OutOfMemoryError)
        lost_peer = isinstance(failure, RuntimeError) and not is_own
        return type(failure).__module__.startswith("ray.") or lost_peer

    failures = _worker_failures(error)
    return bool(failures) and all(map(is_loss, failures))


def _cause(error: BaseException) -> BaseException:
    """Our own exception out of Ray Train's wrapping, or the whole of it with its tracebacks."""
    return next((failure for failure in _worker_failures(error) if isinstance(failure, ArmchairError)), error)


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
