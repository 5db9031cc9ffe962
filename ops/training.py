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
from dataclasses import asdict, field, replace
from dataclasses import dataclass as plain_dataclass
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from infra.store import Store, absolute, open_store
from models.dvae import DvaeSettings
from models.sampling import SampleSettings
from models.schedules import Shape
from models.transformer import TransformerSettings
from ops.errors import ArmchairError, Diverged, StorageError
from ops.learning import check_fit, make_bpe
from ops.recipes import start_stage
from ops.run_record import HEARTBEAT_S, ask_to_stop, claim_run, end_run, read_run
from ops.snapshot import SNAPSHOT, Kind, read_snapshot, source_fingerprint, take_snapshot
from ops.trained import Checkpoint, freeze_tokenizer, latest_checkpoint, read_metrics, tokenizer_digest
from ops.training_loop import Worker, run_loop

Count = Annotated[int, Field(ge=1)]
NotNegative = Annotated[float, Field(ge=0.0)]
Share = Annotated[float, Field(ge=0.0, lt=1.0)]

NOT_IDENTITY = ("checkpoint_every", "keep_checkpoints", "log_every", "evaluate_pictures", "prompts")
"""Training settings that do not change the weights: they may differ when a run goes on."""
KINDS: dict[str, Kind] = {"tokenizer": "pictures", "transformer": "codes"}
RESTARTS = 2
"""How often a run whose workers died (killed, out of memory, node gone) is started again from its checkpoint."""
COLLECTIVE_TIMEOUT_S = 1800
"""The other ranks wait this long while rank 0 evaluates and writes a checkpoint."""


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
class TrainSettings:
    """How a model is trained. The defaults are the paper's transformer (App. B.2)."""

    steps: Count = 430_000
    """Updates."""
    batch: Count = 1_024
    """Positions of an update over all workers; rows thinned by their weight make the batch smaller."""
    learning_rate: Annotated[float, Field(gt=0.0)] = 4.5e-4
    """Peak of the learning rate, after the warm-up."""
    final_learning_rate: NotNegative = 1.4e-5
    """Learning rate that the schedule ends with (the paper halved it five times on plateaus)."""
    schedule: Shape = "half_cosine"
    """How the rate falls: half a cosine; not at all; or "wsd", constant and then linear over the last fifth."""
    warmup_steps: Annotated[int, Field(ge=0)] = 5_000
    """Updates of linear warm-up."""
    decay_share: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Share of the updates, warm-up included, after which the final rate is reached."""
    adam_beta1: Share = 0.9
    """Decay of AdamW's first moment."""
    adam_beta2: Share = 0.96
    """Decay of AdamW's second moment."""
    adam_eps: Annotated[float, Field(gt=0.0)] = 1e-8
    """AdamW's ε."""
    weight_decay: NotNegative = 4.5e-2
    """AdamW's decoupled weight decay, on matrices and kernels only."""
    clip: NotNegative = 4.0
    """Largest norm of the whole gradient; 0: unclipped."""
    ema: Share = 0.99
    """Decay of the averaged weights, which are what is evaluated and published; 0: no average."""
    ema_every: Count = 25
    """Updates from one averaging to the next."""
    ema_warmup: bool = False
    """Decay min(ema, (1 + t)/(10 + t)) at averaging t, for runs that are not much longer than 1/(1 − ema)."""
    checkpoint_every: Count = 5_000
    """Updates between checkpoints, each with an evaluation and a sheet of pictures."""
    keep_checkpoints: Count = 3
    """Checkpoints kept; older ones are removed when a new one is committed. Sheets and metrics stay."""
    log_every: Count = 10
    """Updates that one row of the metrics is the mean of."""
    evaluate_pictures: Annotated[int, Field(ge=0)] = 256
    """Held-out pictures of an evaluation, at most; 0: none."""
    seed: int = 0
    """Seed of the initial weights, the order of rows, crops, noise and dropout."""
    where: dict[str, str | list[str]] = Field(default_factory=dict)
    """Columns of the lists and the value, or values, that a pair must have to be trained on; empty: all pairs."""
    prompts: tuple[str, ...] = ()
    """Prompts drawn at each checkpoint of the transformer. Empty: captions that are in the data, seen and held out."""


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True))
class TokenizerTrainSettings(TrainSettings):
    """How the tokenizer is trained. The defaults are the paper's dVAE (App. A.2)."""

    steps: Count = 3_000_000
    """Updates."""
    batch: Count = 512
    """Positions of an update over all workers; rows thinned by their weight make the batch smaller."""
    learning_rate: Annotated[float, Field(gt=0.0)] = 1e-4
    """Peak of the learning rate, after the warm-up."""
    final_learning_rate: NotNegative = 1.25e-6
    """Learning rate that the schedule ends with."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Updates of linear warm-up."""
    decay_share: Annotated[float, Field(gt=0.0, le=1.0)] = 0.4
    """Share of the updates, warm-up included, after which the final rate is reached (1,200,000 of 3,000,000)."""
    adam_beta2: Share = 0.999
    """Decay of AdamW's second moment."""
    weight_decay: NotNegative = 1e-4
    """AdamW's decoupled weight decay, on matrices and kernels only."""
    clip: NotNegative = 0.0
    """Largest norm of the whole gradient; 0: unclipped."""
    ema: Share = 0.999
    """Decay of the averaged weights, which are what is evaluated and published; 0: no average."""
    ema_every: Count = 1
    """Updates from one averaging to the next."""
    random_crops: bool = True
    """Train on random crops (App. A.2, listing 1); off: the central square, for pictures that fill their frame."""
    flips: bool = True
    """Mirror half of the pictures."""


@plain_dataclass(frozen=True)
class Place:
    """Where a run runs. None of it bears identity: a run may start on a laptop and finish on a cluster."""

    workers: int = 1
    threads: int | None = None
    """Threads of torch in each worker; None: this machine's cores shared among the workers."""
    gpu: bool = False
    """One GPU for each worker."""


@plain_dataclass(frozen=True)
class Job:
    """What to train, from what, into where. `source` is PAIRS (tokenizer) or TOKENS (transformer).

    `sampling` is how the transformer's sheets are drawn at its checkpoints; it decides nothing else.
    """

    kind: Literal["tokenizer", "transformer"]
    source: str
    into: str
    model: DvaeSettings | TransformerSettings
    training: TrainSettings
    sampling: SampleSettings = field(default_factory=SampleSettings)


@plain_dataclass(frozen=True)
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
    """What decides the weights, for the stage's recipe."""
    training = {name: value for name, value in asdict(job.training).items() if name not in NOT_IDENTITY}
    return {"model": asdict(job.model), "training": training}


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
        try:
            while thread.is_alive():
                thread.join(HEARTBEAT_S)
                told = read_run(into)
                if thread.is_alive() and told is not None and "step" in told:
                    say(progress_line(job.kind, told))
        finally:
            if thread.is_alive():
                ask_to_stop(into, run)
                thread.join(2 * HEARTBEAT_S)
        if not failures:
            return
        if not _workers_died(failures[0]):
            raise _cause(failures[0])
        say(f"{job.kind:<12}a worker died; starting again from the last checkpoint")
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


def _workers_died(error: BaseException) -> bool:
    """Whether infrastructure ended the run. Ranks that lose a peer in a sum over ranks see a RuntimeError of torch."""
    failures = _worker_failures(error)
    return bool(failures) and all(
        type(failure).__module__.startswith("ray.") or isinstance(failure, RuntimeError) for failure in failures
    )


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
