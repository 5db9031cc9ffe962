"""The training loop, one for both models. It knows no Ray: a `Worker` is a rank, a sum over ranks, and a report.

A batch is the global positions [step·B, (step + 1)·B); each rank takes its contiguous slice, holes are left out. The
objective is a sum over what is valid divided by its count over *all* ranks, and gradients are summed: any number of
workers, with copies of the model or with shares of it, and any split of a slice follow the same path up to rounding. A
resume starts at the latest checkpoint, and the cursor is one number. With as many workers and threads, on the same kind
of processor, it repeats the bytes of a run that was never disturbed.
May not live here: what is learned (ops/learning.py), how a model is spread (ops/spread.py), how checkpoints are written
(ops/checkpoints.py), how a run is launched.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import time
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from infra.store import Store, open_store
from models.ema import Ema
from models.optimizer import parameter_groups
from models.schedules import learning_rate, plateau_halvings
from ops.checkpoints import Tensors, Writer, restore
from ops.errors import DamagedArtifact, Diverged
from ops.jobs import Job, TrainSettings, Worker
from ops.learning import LEARN, Batch, Learning
from ops.reader import Prefetch
from ops.run_record import Heartbeat, check_owner
from ops.snapshot import read_snapshot
from ops.spread import Spread, autocast
from ops.trained import Checkpoint, forget_after, latest_checkpoint, read_checkpoint

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class _Run:
    """What the parts of the loop share on one rank. `rows` are the metrics since the last checkpoint (rank 0), `losses`
    those of its updates, and `interval_losses` the means of all intervals before."""

    job: Job
    worker: Worker
    store: Store
    learning: Learning
    spread: Spread
    optimizer: torch.optim.Optimizer
    ema: Ema | None
    writer: Writer
    heart: Heartbeat | None
    begun_cpu_s: float
    last_good: int | None = None
    cursor: int = 0
    updates: int = 0
    losses: list[float] = field(default_factory=list)
    interval_losses: list[float] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def published(self) -> dict[str, Tensor]:
        """This rank's part of the weights that are evaluated, drawn and used: the averages where there are any."""
        return self.ema.averages if self.ema else self.spread.weights

    @property
    def tensors(self) -> Tensors:
        """All that a resume needs of each weight, on this rank."""
        moments: dict[str, dict[str, Tensor]] = {name: {} for name in MOMENTS}
        for name, weight in self.spread.weights.items():
            for moment, named in moments.items():
                named[name] = self.optimizer.state[weight][moment]
        averages = {"average": self.ema.averages} if self.ema else {}
        return {"weight": self.spread.weights, **moments, **averages}


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
        checkpoint = _agreed_checkpoint(store, worker)
        source = learning.initial() if checkpoint is None and worker.rank == 0 else None
        spread = Spread(learning.build, worker, settings.precision, source)
        del source
        optimizer = _optimizer(spread, settings, worker)
        ema = Ema(spread.weights, settings.ema, settings.ema_every, settings.ema_warmup) if settings.ema else None
        writer = Writer(store, run, worker, settings.keep_checkpoints, owns)
        this = _Run(job, worker, store, learning, spread, optimizer, ema, writer, heart, begun_cpu_s)
        if checkpoint is not None:
            _restore(this, checkpoint)
        ranks = worker.gather(f"{socket.gethostname()}:{os.getpid()}")
        if heart is not None:
            heart.facts = heart.facts | {
                "from_step": this.last_good or 0,
                "made_with": made_with(worker),
                "ranks": ranks,
            }
            forget_after(store, this.last_good or 0, owns)
        try:
            _steps(this, stop_after)
        except Diverged:
            writer.wait()  # the last good checkpoint, which the message names
            raise
        writer.wait()
        if heart is not None:
            owns()


def _optimizer(spread: Spread, settings: TrainSettings, worker: Worker) -> torch.optim.Optimizer:
    """AdamW, with its moments in place: a checkpoint may be written, or read, before the first update."""
    optimizer = torch.optim.AdamW(
        parameter_groups((weight for weight in spread.weights.values() if weight.numel()), settings.weight_decay),
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        eps=settings.adam_eps,
        fused=True,
    )
    for weight in spread.weights.values():
        moments = {name: torch.zeros_like(weight, requires_grad=False) for name in MOMENTS}
        optimizer.state[weight] = {"step": torch.zeros((), device=worker.device), **moments}
    return optimizer


def _agreed_checkpoint(store: Store, worker: Worker) -> Checkpoint | None:
    """The latest checkpoint as rank 0 sees it: a frozen run may commit one more between two ranks' looks."""
    latest = latest_checkpoint(store) if worker.rank == 0 else None
    step = int(worker.sum(torch.tensor(latest.step if latest else 0, dtype=torch.int64, device=worker.device)))
    return latest or (read_checkpoint(store, step) if step else None)


def made_with(worker: Worker) -> dict[str, Any]:
    """What decides the last bits of the weights besides the recipe: the order in which numbers are added up."""
    is_gpu = worker.device == "cuda"
    device = torch.cuda.get_device_name() if is_gpu else f"cpu ({torch.backends.cpu.get_cpu_capability()})"
    how = {name: getattr(worker, name) for name in ("sharded", "accumulate", "recompute", "compile")}
    made = {"workers": worker.world, "threads": torch.get_num_threads(), "device": device, "torch": torch.__version__}
    return made | {name: value for name, value in how.items() if value != getattr(Worker, name)}


def _doing(heart: Heartbeat | None, what: str) -> None:
    if heart is not None:
        heart.facts = heart.facts | {"doing": what}


def _steps(this: _Run, stop_after: int | None) -> None:
    settings, worker = this.job.training, this.worker
    first = this.last_good or 0
    last = settings.steps if stop_after is None else min(settings.steps, first + stop_after)

    def batch(step: int) -> list[Batch | None]:
        begin, end = worker.part(settings.batch)
        share = max(1, -(-(end - begin) // worker.accumulate))
        position = this.cursor + (step - first) * settings.batch
        starts = [min(begin + part * share, end) for part in range(worker.accumulate + 1)]
        return [this.learning.batch(position + a, position + b) if b > a else None for a, b in pairwise(starts)]

    if first == 0:
        row = _evaluate(this, 0, this.spread.replica(this.published, settings.precision))
        this.rows += [row] if worker.rank == 0 else []
    _warm_up(this)
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
            this.losses.append(update.loss)
            is_checkpoint = done % settings.checkpoint_every == 0 or done == settings.steps
            if done - (this.last_good or 0) == max(1, settings.checkpoint_every // 10):
                this.writer.wait()  # so that a kill costs no more than one interval and a tenth
            if done % settings.log_every == 0 or is_checkpoint:
                now_s = time.perf_counter()
                row = _row(interval, done, now_s - marked_s, batches.waited_s - marked_wait_s)
                # The CPU time of this process since the last row, evaluations and checkpoints between them included.
                cpu_s, marked_cpu_s = time.process_time() - marked_cpu_s, time.process_time()
                tokens_per_s = row["steps_per_s"] * settings.batch * this.learning.tokens
                row |= {"tokens_per_s": tokens_per_s, "learning_rate": _rate(this, step), "cpu_s": cpu_s}
                this.rows += [row] if worker.rank == 0 else []
                if this.heart is not None:
                    this.heart.facts = this.heart.facts | _progress(row, settings.steps)
                    worker.tell(row | {"is_checkpoint": is_checkpoint})
                if is_checkpoint:
                    _write(this, done)
                    worker.report({"step": done, "loss": row["loss"]})
                interval = []
                marked_s, marked_wait_s = time.perf_counter(), batches.waited_s


def _warm_up(this: _Run) -> None:
    """One pass that counts for nothing: DDP orders its sums by the first one it sees, and a resume must add up in the
    order of a run that was never disturbed."""
    if this.worker.world > 1 and not this.spread.is_sharded:
        with autocast(this.worker.device, this.job.training.precision):
            totals = this.learning.measure(this.spread.forward, this.learning.filler(), 0)
        (0.0 * sum(totals.values())).backward()  # type: ignore[union-attr]
        this.spread.forget_gradients()


def _update(this: _Run, parts: list[Batch | None], step: int) -> _Update:
    """Forward and backward of each part, one sum over the ranks of what was measured, and the step."""
    learning, worker, spread = this.learning, this.worker, this.spread
    names, device = learning.measures, worker.device
    counts = {name: sum(part.counts[name] for part in parts if part) for name in names}
    must_stop = float(this.heart is not None and this.heart.must_stop)
    # What the objective is divided by, known before the first pass; on the device, so that nobody waits for it.
    numbers = torch.tensor([*counts.values(), must_stop], dtype=torch.float64).to(device, non_blocking=True)
    counted = worker.sum(numbers)
    divisor = dict(zip(names, counted.clamp(min=1.0), strict=False))
    totals = {name: torch.zeros((), dtype=torch.float64, device=device) for name in names}
    spread.forget_gradients()
    for number, part in enumerate(parts):
        is_last = number == len(parts) - 1
        # Where ranks add up their gradients, all of them take part, those too that have holes only.
        if part is None and (worker.world == 1 or not (is_last or spread.is_sharded)):
            continue
        _pass(this, part or learning.filler(), step, divisor, totals, is_last=is_last)
    gradients = spread.gradients()
    norm = spread.norm(gradients)
    measured = worker.sum(torch.stack(list(totals.values())))
    # The one wait for the device in a step: the loss is looked at before the weights are touched.
    agreed = torch.cat([measured, counted, norm.double()[None]]).tolist()
    of_totals = dict(zip(names, agreed, strict=False))
    of_counts = dict(zip(names, agreed[len(names) :], strict=False))
    stop, length = agreed[-2] > 0.0, agreed[-1]
    weights = {name: weight for name, weight in learning.objective.items() if weight and of_counts[name]}
    loss = sum(weight * of_totals[name] / of_counts[name] for name, weight in weights.items())
    if not stop and weights:  # a batch may be all holes: then there is nothing to learn from
        if not (math.isfinite(loss) and math.isfinite(length)):
            raise Diverged(this.job.into, step + 1, this.last_good)
        if this.job.training.clip:
            torch._foreach_mul_(gradients, torch.clamp(this.job.training.clip / (norm + 1e-6), max=1.0))
        for group in this.optimizer.param_groups:
            group["lr"] = _rate(this, step)
        this.optimizer.step()
        this.updates += 1
        if this.ema is not None:
            this.ema.update(step)
    return _Update(loss, of_totals, of_counts, length, stop)


def _pass(
    this: _Run, part: Batch, step: int, divisor: dict[str, Tensor], totals: dict[str, Tensor], *, is_last: bool
) -> None:
    """Forward and backward of one part of this rank's batch; adds what was measured to `totals`."""
    learning, spread = this.learning, this.spread
    with spread.part_of_a_batch(is_last=is_last):
        with autocast(this.worker.device, this.job.training.precision):
            measured = learning.measure(spread.forward, part, step)
        share = 0.0 if part.is_filler else 1.0
        objective = sum(share * weight * measured[name] / divisor[name] for name, weight in learning.objective.items())
        objective.float().backward()  # type: ignore[union-attr]
    for name, total in measured.items():
        totals[name] += share * total.detach().double()


def _rate(this: _Run, step: int) -> float:
    training = this.job.training
    return rate(training, step, plateau_halvings(this.interval_losses, training.plateau_patience))


def rate(settings: TrainSettings, step: int, halvings: int = 0) -> float:
    """The learning rate of update `step` (0-based); `halvings` are the plateaus met so far, for that schedule."""
    return learning_rate(
        step,
        peak=settings.learning_rate,
        final=settings.final_learning_rate,
        steps=max(1, round(settings.decay_share * settings.steps)),
        warmup_steps=settings.warmup_steps,
        shape=settings.schedule,
        halvings=halvings,
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


def _evaluate(this: _Run, step: int, model: Any) -> dict[str, Any]:
    _doing(this.heart, "evaluates")
    with torch.no_grad(), autocast(this.worker.device, this.job.training.precision):
        return {"kind": "evaluation", "step": step, **this.learning.evaluate(model, step)}


def _write(this: _Run, step: int) -> None:
    """Evaluates and draws, all ranks together, and begins to write. Raises Diverged for weights that the last update
    made infinite: its own loss was finite, and a checkpoint that can't be gone on from is no good one."""
    settings, worker, spread = this.job.training, this.worker, this.spread
    finite = torch.stack([weight.isfinite().all() for weight in spread.weights.values()]).all()
    if worker.sum((~finite).float().reshape(1)).item():
        raise Diverged(this.job.into, step, this.last_good)
    this.interval_losses.append(sum(this.losses) / len(this.losses))
    this.losses = []
    replica = spread.replica(this.published, settings.precision)
    evaluation = _evaluate(this, step, replica)
    _doing(this.heart, "draws its sheet")
    with torch.no_grad(), autocast(worker.device, settings.precision):
        sheet = this.learning.sheet(replica)
    del replica
    _doing(this.heart, "writes a checkpoint")
    model: dict[str, Tensor] = {}
    for name, weight in spread.whole(this.published):
        if worker.rank == 0:
            model[name] = weight.to("cpu", copy=True)
    commit = {
        "cursor": step * settings.batch,
        "rows": [*this.rows, evaluation],
        "sheet": sheet,
        "state": {
            "updates": this.updates,
            "averagings": this.ema.averagings if this.ema else 0,
            "interval_losses": list(this.interval_losses),
        },
        "made_with": made_with(worker),
    }
    this.writer.begin(step, spread, this.tensors, model, this.learning.about, commit)
    this.rows, this.last_good = [], step
    if step == settings.steps:
        this.writer.wait()
    _doing(this.heart, "trains")


def _restore(this: _Run, checkpoint: Checkpoint) -> None:
    batch = this.job.training.batch
    if checkpoint.cursor != checkpoint.step * batch:  # what is random hangs on the position, rates on the step
        place = f"{this.store.location}/steps/{checkpoint.step:07d}/receipt.json"
        raise DamagedArtifact(place, f"step {checkpoint.step} of {batch} positions", f"the cursor {checkpoint.cursor}")
    restore(this.store, checkpoint, this.spread, this.tensors)
    this.last_good, this.cursor, this.updates = checkpoint.step, checkpoint.cursor, checkpoint.state["updates"]
    this.interval_losses = list(checkpoint.state["interval_losses"])
    for state in this.optimizer.state.values():
        state["step"].fill_(this.updates)
    if this.ema is not None:
        this.ema.averagings = checkpoint.state["averagings"]
