"""The training loop, one for both models. It knows no Ray: a `Worker` is a rank, a sum over ranks, and a report.

A batch is the global positions [step·B, (step + 1)·B); each rank takes its contiguous slice, holes are left out. The
objective is a sum over what is valid divided by its count over *all* ranks, and gradients are summed, so one worker and
two follow the same path up to rounding. A resume starts at the latest checkpoint, and the cursor is one number. With
as many workers and threads, on the same kind of processor, it repeats the bytes of a run that was never disturbed.
May not live here: what is learned (ops/learning.py), what a checkpoint holds (ops/trained.py), how a run is launched.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from infra.store import Store, open_store
from models.ema import Ema
from models.optimizer import parameter_groups
from models.schedules import learning_rate
from ops.errors import DamagedArtifact, Diverged
from ops.jobs import Job, TrainSettings, Worker
from ops.learning import LEARN, Learning, Measured
from ops.reader import Prefetch
from ops.run_record import Heartbeat, check_owner
from ops.shards import scratch_directory
from ops.snapshot import read_snapshot
from ops.trained import (
    EMA,
    MODEL,
    STATE,
    Checkpoint,
    forget_after,
    latest_checkpoint,
    load_state,
    load_weights,
    read_checkpoint,
    read_checkpoint_file,
    save_weights,
    write_checkpoint,
)


@dataclass
class _Run:
    """What the parts of the loop share on one rank. `rows` are the metrics since the last checkpoint (rank 0)."""

    job: Job
    worker: Worker
    store: Store
    learning: Learning
    optimizer: torch.optim.Optimizer
    ema: Ema | None
    heart: Heartbeat | None
    check_owner: Callable[[], None]
    last_good: int | None
    cursor: int
    begun_cpu_s: float
    rows: list[dict[str, Any]]

    @property
    def published(self) -> Any:
        """The model that is evaluated, drawn and used: the averaged one where there is one."""
        return self.ema.module if self.ema else self.learning.model


@dataclass(frozen=True)
class _Update:
    """One update, the same on every rank: sums and counts of what was measured over all ranks."""

    loss: float
    totals: dict[str, float]
    counts: dict[str, float]
    gradient_norm: float
    must_stop: bool


def run_loop(job: Job, worker: Worker, run: int, stop_after: int | None = None) -> None:
    """One rank's whole life: load or initialise, then train to the end. Needs `prepare`, and `run` of `claim_run`.

    Raises Diverged at the first step whose loss or gradient is not finite, before it touches the weights; RunAlive if
    another run took the directory over. Returns early if it was asked to stop.
    """
    begun_cpu_s = time.process_time()
    store, settings = open_store(job.into), job.training
    owns = partial(check_owner, store, run)
    if worker.threads is not None:
        torch.set_num_threads(worker.threads)
    with Heartbeat(store, run, "worker") if worker.rank == 0 else contextlib.nullcontext() as heart:
        _doing(heart, "prepares the model")
        learning = LEARN[job.kind](job, store, read_snapshot(store), worker)
        optimizer = torch.optim.AdamW(
            parameter_groups(learning.model, settings.weight_decay),
            lr=settings.learning_rate,
            betas=(settings.adam_beta1, settings.adam_beta2),
            eps=settings.adam_eps,
            fused=True,
        )
        checkpoint = _agreed_checkpoint(store, worker)
        if checkpoint is None:
            learning.initialise()
            _share_weights(learning.model, worker)
        ema = Ema(learning.model, settings.ema, settings.ema_every, settings.ema_warmup) if settings.ema else None
        if checkpoint is not None:
            _restore(store, checkpoint, settings.batch, learning, optimizer, ema)
        first, cursor = (checkpoint.step, checkpoint.cursor) if checkpoint else (None, 0)
        if heart is not None:
            heart.facts = heart.facts | {"from_step": first or 0, "made_with": made_with(worker)}
            forget_after(store, first or 0, owns)
        _steps(
            _Run(job, worker, store, learning, optimizer, ema, heart, owns, first, cursor, begun_cpu_s, []), stop_after
        )
        if heart is not None:
            owns()


def _agreed_checkpoint(store: Store, worker: Worker) -> Checkpoint | None:
    """The latest checkpoint as rank 0 sees it: a frozen run may commit one more between two ranks' looks."""
    latest = latest_checkpoint(store) if worker.rank == 0 else None
    step = int(worker.sum(torch.tensor(latest.step if latest else 0, dtype=torch.int64, device=worker.device)))
    return latest or (read_checkpoint(store, step) if step else None)


def _share_weights(model: torch.nn.Module, worker: Worker) -> None:
    """Rank 0's initial weights on all ranks: on unlike machines those of one seed may differ in their last bits."""
    for parameter in model.parameters() if worker.world > 1 else ():
        worker.sum(parameter.data if worker.rank == 0 else parameter.data.zero_())


def made_with(worker: Worker) -> dict[str, Any]:
    """What decides the last bits of the weights besides the recipe: the order in which numbers are added up."""
    is_gpu = worker.device == "cuda"
    device = torch.cuda.get_device_name() if is_gpu else f"cpu ({torch.backends.cpu.get_cpu_capability()})"
    return {"workers": worker.world, "threads": torch.get_num_threads(), "device": device, "torch": torch.__version__}


def _doing(heart: Heartbeat | None, what: str) -> None:
    if heart is not None:
        heart.facts = heart.facts | {"doing": what}


def _steps(this: _Run, stop_after: int | None) -> None:
    settings, worker = this.job.training, this.worker
    first = this.last_good or 0
    last = settings.steps if stop_after is None else min(settings.steps, first + stop_after)
    share = -(-settings.batch // worker.world)

    def batch(step: int) -> Any:
        begin, end = (min(rank * share, settings.batch) for rank in (worker.rank, worker.rank + 1))
        position = this.cursor + (step - first) * settings.batch
        return this.learning.batch(position + begin, position + end)

    if first == 0 and worker.rank == 0:
        this.rows.append(_evaluate(this, 0))
    _doing(this.heart, "trains")
    interval: list[_Update] = []
    marked_s, marked_wait_s, marked_cpu_s = time.perf_counter(), 0.0, this.begun_cpu_s
    with Prefetch(batch, first, last) as batches:
        for step in range(first, last):
            update = _update(this, batches.take(), step)
            if update.must_stop:
                return
            done = step + 1
            interval.append(update)
            is_checkpoint = done % settings.checkpoint_every == 0 or done == settings.steps
            if done % settings.log_every == 0 or is_checkpoint:
                now_s = time.perf_counter()
                row = _row(interval, done, now_s - marked_s, batches.waited_s - marked_wait_s)
                # The CPU time of this process since the last row, evaluations and checkpoints between them included.
                cpu_s, marked_cpu_s = time.process_time() - marked_cpu_s, time.process_time()
                this.rows.append(row | {"learning_rate": rate(settings, step), "cpu_s": cpu_s})
                if this.heart is not None:
                    this.heart.facts = this.heart.facts | _progress(row, settings.steps)
                if is_checkpoint:
                    if worker.rank == 0:
                        _write(this, done)
                    this.rows.clear()
                    this.last_good = done
                    worker.report({"step": done, "loss": row["loss"], "checkpoint": f"steps/{done:07d}"})
                interval = []
                marked_s, marked_wait_s = time.perf_counter(), batches.waited_s


def _update(this: _Run, batch: Any, step: int) -> _Update:
    """Forward, one sum over the ranks of totals and counts, backward, one sum of gradients, and the step."""
    learning, worker = this.learning, this.worker
    measured: Measured = learning.measure(batch, step)
    names = learning.measures
    parts = [measured.get(name, (torch.zeros((), device=worker.device), 0.0)) for name in names]
    must_stop = float(this.heart is not None and this.heart.must_stop)
    numbers = [total.detach().double() for total, _ in parts] + [
        torch.tensor(number, dtype=torch.float64, device=worker.device)
        for number in (*(count for _, count in parts), must_stop)
    ]
    # One wait for the device a step: the loss is looked at before the weights are touched.
    agreed = worker.sum(torch.stack(numbers)).tolist()
    totals = dict(zip(names, agreed, strict=False))
    counts = dict(zip(names, agreed[len(names) :], strict=False))
    weights = {name: weight for name, weight in learning.objective.items() if weight and counts[name]}
    loss = sum(weight * totals[name] / counts[name] for name, weight in weights.items())
    norm = 0.0
    if agreed[-1] == 0.0 and weights:  # a batch may be all holes: then there is nothing to learn from
        this.optimizer.zero_grad(set_to_none=True)
        if batch is not None:
            sum(weight * measured[name][0] / counts[name] for name, weight in weights.items()).backward()
        parameters = [p for p in learning.model.parameters() if p.requires_grad]
        _sum_gradients(parameters, worker)
        clip = this.job.training.clip or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, clip))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise Diverged(this.job.into, step + 1, this.last_good)
        for group in this.optimizer.param_groups:
            group["lr"] = rate(this.job.training, step)
        this.optimizer.step()
        if this.ema is not None:
            this.ema.update(step)
    return _Update(loss, totals, counts, norm, agreed[-1] > 0.0)


def _sum_gradients(parameters: list[torch.nn.Parameter], worker: Worker) -> None:
    """Gradients summed over ranks, as the loss is. DDP would take their mean, and wants a forward pass on each rank."""
    if worker.world == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = worker.sum(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, summed in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
        gradient.copy_(summed.view_as(gradient))


def rate(settings: TrainSettings, step: int) -> float:
    """The learning rate of update `step` (0-based)."""
    return learning_rate(
        step,
        peak=settings.learning_rate,
        final=settings.final_learning_rate,
        steps=max(1, round(settings.decay_share * settings.steps)),
        warmup_steps=settings.warmup_steps,
        shape=settings.schedule,
    )


def _row(updates: list[_Update], step: int, seconds: float, waited_s: float) -> dict[str, Any]:
    """Metrics of an interval: means over all that was valid in it."""
    means = {}
    for name in updates[0].totals:
        count = sum(update.counts[name] for update in updates)
        means[name] = sum(update.totals[name] for update in updates) / count if count else None
    return {
        "kind": "train",
        "step": step,
        "loss": sum(update.loss for update in updates) / len(updates),
        **means,
        "gradient_norm": sum(update.gradient_norm for update in updates) / len(updates),
        "steps_per_s": len(updates) / max(seconds, 1e-9),
        "waited_share": waited_s / max(seconds, 1e-9),
    }


def _progress(row: dict[str, Any], steps: int) -> dict[str, Any]:
    left_s = (steps - row["step"]) / row["steps_per_s"]
    return {
        "step": row["step"],
        "steps": steps,
        "loss": row["loss"],
        "steps_per_s": row["steps_per_s"],
        "seconds_left": left_s,
    }


def _evaluate(this: _Run, step: int) -> dict[str, Any]:
    _doing(this.heart, "evaluates")
    return {"kind": "evaluation", "step": step, **this.learning.evaluate(this.published, step)}


def _write(this: _Run, step: int) -> None:
    """Evaluates, draws and commits. Raises Diverged for weights that the last update made infinite: its own loss was
    finite, and a checkpoint that can't be gone on from is no good one."""
    learning, settings = this.learning, this.job.training
    if not all(bool(parameter.isfinite().all()) for parameter in learning.model.parameters()):
        raise Diverged(this.job.into, step, this.last_good)
    this.rows.append(_evaluate(this, step))
    with scratch_directory() as directory:
        files = {MODEL: directory / MODEL, STATE: directory / STATE}
        save_weights(files[MODEL], learning.model.state_dict(), learning.about)
        if this.ema is not None:
            files[EMA] = directory / EMA
            save_weights(files[EMA], this.ema.module.state_dict(), learning.about)
        averagings = this.ema.averagings if this.ema else 0
        torch.save({"optimizer": this.optimizer.state_dict(), "averagings": averagings}, files[STATE])
        _doing(this.heart, "draws its sheet")
        sheet = learning.sheet(this.published)
        _doing(this.heart, "writes a checkpoint")
        cursor, made = step * settings.batch, made_with(this.worker)
        keep = settings.keep_checkpoints
        write_checkpoint(this.store, step, cursor, files, this.rows, sheet, keep, made, this.check_owner)
    _doing(this.heart, "trains")


def _restore(
    store: Store,
    checkpoint: Checkpoint,
    batch: int,
    learning: Learning,
    optimizer: torch.optim.Optimizer,
    ema: Ema | None,
) -> None:
    if checkpoint.cursor != checkpoint.step * batch:  # what is random hangs on the position, rates on the step
        place = f"{store.location}/steps/{checkpoint.step:07d}/receipt.json"
        raise DamagedArtifact(place, f"step {checkpoint.step} of {batch} positions", f"the cursor {checkpoint.cursor}")

    def weights(name: str) -> dict[str, Tensor]:
        return load_weights(read_checkpoint_file(store, checkpoint, name), f"{store.location}/{name}")[0]

    learning.model.load_state_dict(weights(MODEL))
    state = load_state(read_checkpoint_file(store, checkpoint, STATE))
    optimizer.load_state_dict(state["optimizer"])
    if ema is not None:
        ema.load_state_dict({"averagings": state["averagings"], "weights": weights(EMA)})
