"""A program for kill tests: trains jobs at the same time, on a Ray of its own, and prints their lines of progress.

python -m tests.training_driver JOBS     (JOBS: a pickled list of (Job, Place))
"""

from __future__ import annotations

import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from infra.cluster import Cluster, Place, connect, quiet_environment
from ops.jobs import Job


def _train(job: Job, place: Place) -> None:
    from ops.training import train

    train(job, place, lambda line: print(Path(job.into).name, line, flush=True))


def main(jobs: list[tuple[Job, Place]]) -> None:
    """Raises what the first of the jobs raised, after all have ended."""
    with (
        connect(Cluster(address=None, cpus=sum(place.workers for _, place in jobs))),
        ThreadPoolExecutor(len(jobs)) as pool,
    ):
        for done in [pool.submit(_train, *each) for each in jobs]:
            done.result()


if __name__ == "__main__":
    quiet_environment()
    main(pickle.loads(Path(sys.argv[1]).read_bytes()))
