"""Rounds of SIGKILL against trainings on Ray: of a worker, of the driver, or of the `machine`: driver and Ray at once.

All jobs train at the same time in one driver. A round waits until each has committed a checkpoint since it was started
last, then kills: at once when it sees files of a step that has no receipt yet (every second round), or after a random
time. The jobs have no end: after the last round each commits two more checkpoints, and the last of them must have the
digests of an undisturbed run that stopped there.
"""

from __future__ import annotations

import multiprocessing
import pickle
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from infra.cluster import Place
from infra.store import open_store
from ops.jobs import Job, Worker
from ops.run_record import claim_run, end_run, read_run, read_runs
from ops.trained import latest_checkpoint
from ops.training import prepare
from ops.training_loop import run_loop
from tests.kills import Driver, kill

WORKERS = ("worker", "peer")

PATIENCE_S = 600.0
"""For one start of Ray and its workers, imports of torch included, on a machine that does much else."""


@dataclass
class Kill:
    """What one job was doing when it, or its driver, was killed."""

    victim: str
    run: int
    committed: int
    in_writing: bool


@dataclass
class Target:
    """One training under fire."""

    job: Job
    place: Place
    kills: list[Kill] = field(default_factory=list)

    @property
    def committed(self) -> int:
        """The step of the latest checkpoint."""
        latest = latest_checkpoint(open_store(self.job.into))
        return latest.step if latest else 0

    def record(self) -> dict[str, Any]:
        """The record of its latest run."""
        record = read_run(open_store(self.job.into))
        assert record is not None
        return record

    def has_committed(self, checkpoints: int) -> bool:
        """Whether it committed so many since it was started again after the last kill."""
        record = read_run(open_store(self.job.into))
        if record is None or "from_step" not in record or (self.kills and record["run"] <= self.kills[-1].run):
            return False
        return self.committed >= int(record["from_step"]) + checkpoints * self.job.training.checkpoint_every

    def is_writing(self) -> bool:
        """Whether there are files of a step past the latest checkpoint."""
        steps = (path for path in (Path(self.job.into) / "steps").glob("*") if any(path.iterdir()))
        return any(int(path.name) > self.committed for path in steps)

    def digests(self) -> dict[str, str]:
        """Weights, averaged weights and optimizer of the latest checkpoint."""
        latest = latest_checkpoint(open_store(self.job.into))
        assert latest is not None
        return {name: ref.sha256 for name, ref in latest.files.items()}


def wait_for(what: Callable[[], bool], driver: Driver, said: str) -> None:
    """Looks every millisecond or so."""
    give_up_s = time.monotonic() + PATIENCE_S
    while not what():
        assert driver.process.poll() is None, f"the driver ended before {said}"
        assert time.monotonic() < give_up_s, f"no {said} within {PATIENCE_S:.0f} s"
        time.sleep(0.001)


def training_rounds(folder: Path, targets: list[Target], victims: list[str], seed: int) -> None:
    """One kill for each of `victims`, then a check of all targets. `worker` kills rank 0 of each target, `peer` the
    highest rank of those that have two workers (and rank 0 of the others)."""
    chance, jobs, driver = random.Random(seed), folder / "jobs", None
    jobs.write_bytes(pickle.dumps([(target.job, target.place) for target in targets]))
    try:
        for number, victim in enumerate(victims):
            driver = driver or Driver("tests.training_driver", jobs, log=folder / "log")
            for struck in [[target] for target in targets] if victim in WORKERS else [targets]:
                _strike(driver, struck, targets, victim, chance, is_in_writing=number % 2 == 1)
            driver = driver if victim in WORKERS else None
        driver = driver or Driver("tests.training_driver", jobs, log=folder / "log")
        for target in targets:
            wait_for(lambda t=target: t.has_committed(2), driver, "two more checkpoints")
    finally:
        if driver is not None:
            driver.end()
    for target in targets:
        _check(target)


def _strike(
    driver: Driver,
    struck: list[Target],
    targets: list[Target],
    victim: str,
    chance: random.Random,
    *,
    is_in_writing: bool,
) -> None:
    for target in struck:
        wait_for(lambda t=target: t.has_committed(1), driver, "a checkpoint")
    driver.note_family()
    if is_in_writing:
        wait_for(chance.choice(struck).is_writing, driver, "files of a checkpoint")
    else:
        time.sleep(chance.uniform(0, 0.5))
    pid = _worker(driver, struck[0], targets, victim) if victim in WORKERS else driver.process.pid
    before = [(target.record()["run"], target.committed) for target in struck]
    kill(pid)
    for member in driver.family if victim == "machine" else ():
        kill(member)
    for target, (run, committed) in zip(struck, before, strict=True):
        target.kills.append(Kill(victim, run, committed, target.is_writing()))
    if victim not in WORKERS:
        assert driver.process.wait() == -signal.SIGKILL


def _worker(driver: Driver, target: Target, targets: list[Target], victim: str) -> int:
    """The process of rank 0 of a target, or of its highest rank."""
    ranks = [int(rank.rpartition(":")[2]) for rank in target.record()["ranks"]]
    assert len(ranks) == target.place.workers
    assert len(driver.living(ranks)) == len(ranks), "a rank was dead already"
    return ranks[0 if victim == "worker" else -1]


def _check(target: Target) -> None:
    """Equal digests; and from the run records: after each kill no checkpoint was done again, and at most one interval
    and what was trained while its checkpoint was being written, which is a tenth of one at most."""
    store, every = open_store(target.job.into), target.job.training.checkpoint_every
    runs = read_runs(store)
    assert len(runs) > len(target.kills)
    for met in target.kills:
        killed, after = runs[met.run - 1], runs[met.run]
        assert after["from_step"] >= met.committed, "what was committed was done again"
        assert killed.get("step", 0) - after["from_step"] <= every + every // 10, "more than that was done again"
    undisturbed = Target(replace(target.job, into=f"{target.job.into}-undisturbed"), target.place)
    train_undisturbed(undisturbed.job, target.place, target.committed)
    assert undisturbed.committed == target.committed
    assert undisturbed.digests() == target.digests()


def train_undisturbed(job: Job, place: Place, steps: int) -> None:
    """Trains without Ray and without a kill, in a process for each rank, and stops after `steps` of this call."""
    import torch.multiprocessing as processes

    prepare(job)
    run = claim_run(open_store(job.into))
    meeting = Path(f"{job.into}.meeting-{run}")
    multiprocessing.set_forkserver_preload(["ops.training_loop", "torch.distributed.fsdp"])  # imported once for all
    args = (job, place, run, steps, str(meeting))
    processes.start_processes(_rank, args, nprocs=place.workers, start_method="forkserver")
    end_run(open_store(job.into), run, "stopped")


def _rank(rank: int, job: Job, place: Place, run: int, steps: int, meeting: str) -> None:
    from torch import distributed

    distributed.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=place.workers)
    how = {name: getattr(place, name) for name in ("sharded", "accumulate", "recompute", "compile")}
    run_loop(job, Worker(rank, place.workers, threads=1, **how), run, stop_after=steps)
    distributed.destroy_process_group()


def describe(targets: list[Target], seconds: float) -> str:
    """What the kills met, for people."""
    lines = [f"{sum(len(target.kills) for target in targets)} kills of trainings in {seconds:.0f} s"]
    for target in targets:
        in_writing = sum(met.in_writing for met in target.kills)
        how = f"{target.place.workers} workers{', sharded' if target.place.sharded else ''}"
        lines.append(
            f"{target.job.kind}, {how}: {len(target.kills)} kills "
            f"({', '.join(met.victim for met in target.kills)}), {in_writing} within the writing of a checkpoint; "
            f"stopped at step {target.committed}, after {len(read_runs(open_store(target.job.into)))} runs"
        )
    return "\n".join(lines)
