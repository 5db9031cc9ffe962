"""A program for test_training.py: trains to a checkpoint again and again, killed before or after its n-th write.

    cut_each_write.py BEGUN WHERE JOB     (JOB: a pickled job of one worker that BEGUN, a copy of its stage, belongs to)

Each round copies BEGUN, forks a child that kills itself at one call of fsync, link, replace or mkdir, and then a child
that is left alone; one JSON line a round says where the first was cut and which digests the second ended with. Forks of
one process, since imports take longer than a round.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from infra.store import open_store
from ops.errors import DamagedArtifact
from ops.jobs import Job
from ops.trained import latest_checkpoint, read_checkpoint_file
from ops.training import train_here

WRITES = ("fsync", "link", "replace", "mkdir")


def train_in_child(job: Job, kill_at: int | None, when: str, result: Path) -> int:
    """Returns the status of os.waitpid."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    try:
        calls: list[str] = []

        def deadly(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*args: Any, **kwargs: Any) -> Any:
                calls.append(f"{name} {args[-1]}")
                n = len(calls)
                if n == kill_at and when == "before":
                    os.kill(os.getpid(), signal.SIGKILL)
                answer = call(*args, **kwargs)
                if n == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return answer

            return wrapped

        for name in WRITES:
            setattr(os, name, deadly(name, getattr(os, name)))
        train_here(job, threads=1)
        result.write_text(json.dumps(calls))
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def main(begun: Path, where: Path, job: Job) -> None:
    torch.set_num_threads(1)  # no pool of threads that a fork would lose
    where.mkdir()
    result = where / "calls.json"

    def copy(name: str) -> Job:
        return replace(job, into=str(shutil.copytree(begun, where / name)))

    # Once in this process: what is imported at first use is there in every child.
    train_here(copy("at-first"), threads=1)
    assert train_in_child(copy("undisturbed"), None, "", result) == 0
    for n in range(1, len(json.loads(result.read_text())) + 1):
        for when in ("before", "after"):
            cut = copy(f"{n}-{when}")
            killed = train_in_child(cut, n, when, result)
            left = latest_checkpoint(open_store(cut.into))
            is_whole = left is not None and all(_is_whole(cut.into, name) for name in left.files)
            again = train_in_child(cut, None, "", result)
            assert again == 0, (n, when)
            end = latest_checkpoint(open_store(cut.into))
            told = {
                "killed_by": os.WTERMSIG(killed),
                "left_at": left.step if left else 0,
                "left_whole": is_whole,
                "ended_at": end.step if end else 0,
                "digests": {name: ref.sha256 for name, ref in end.files.items()} if end else {},
            }
            print(json.dumps(told), flush=True)


def _is_whole(into: str, name: str) -> bool:
    store = open_store(into)
    checkpoint = latest_checkpoint(store)
    assert checkpoint is not None
    try:
        read_checkpoint_file(store, checkpoint, name)
    except DamagedArtifact:
        return False
    return True


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), pickle.loads(Path(sys.argv[3]).read_bytes()))
